"""A tiny C++ module to build in place of the kernels, and compilers that fail in their own ways."""

# Python's own interface: it compiles in a moment.
FILES = {
    "answer.h": "#pragma once\nconstexpr long kAnswer = 42;\nint threads();\n",
    "threads.cpp": """#include <omp.h>
#include "answer.h"
int threads() { return omp_get_max_threads(); }
""",
    "bindings.cpp": """
#include <Python.h>
#include "answer.h"
#define INIT(name) PyInit_##name
#define INIT_OF(name) INIT(name)
static PyObject *answer(PyObject *, PyObject *) { return PyLong_FromLong(kAnswer); }
static PyObject *counted(PyObject *, PyObject *) { return PyLong_FromLong(threads()); }
static PyMethodDef methods[] = {
  {"answer", answer, METH_NOARGS, ""}, {"threads", counted, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", "", -1, methods};
PyMODINIT_FUNC INIT_OF(LORAFAST_MODULE)() { return PyModule_Create(&module); }
""",
}


def write_sources(folder):
    """Write the module's source into a new folder and return the folder."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def compiler(folder, script, name="cxx"):
    """A compiler that runs a shell line for every word of its command line, then the real one."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nfor word; do {script}; done\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def refuses(pattern):
    """The shell line of a compiler that does not know some options."""
    complaint = "cxx: error: unrecognized command-line option '$word'"
    return f"""case "$word" in {pattern}) echo "{complaint}" >&2; exit 1;; esac"""


def dies(how):
    """The shell line of a compiler that says its version and ends when it is to compile."""
    return f"case $word in -c) {how};; esac"
