"""The instruction sets of a machine, and the one that LORAFAST_CPU_ISA asks for."""

import sys

import pytest

from lorafast.runtime import instruction_sets


def test_what_the_machine_has_is_read_from_cpuinfo(tmp_path):
    told = tmp_path / "cpuinfo"
    old = "fpu avx avx2 fma f16c bmi2"
    for features, isas in (
        ("fpu sse2 avx", ("scalar",)),
        (old, ("avx2", "scalar")),
        (f"{old} avx512f avx512bw avx512vl", ("avx2", "scalar")),
        (f"{old} avx512f avx512bw avx512vl avx512dq avx512_bf16", instruction_sets.ISAS),
    ):
        told.write_text(f"processor\t: 0\nflags\t\t: {features}\nbugs\t\t: avx2\n")
        instruction_sets.available.cache_clear()
        assert instruction_sets.available(told) == isas
    assert instruction_sets.available(tmp_path / "nowhere") == ("scalar",)
    instruction_sets.available.cache_clear()


def test_the_flags_of_the_compiler():
    assert instruction_sets.compiler_flags("scalar") == ()
    assert instruction_sets.compiler_flags("avx512bf16")[-2:] == ("-mavx512dq", "-mavx512bf16")


def test_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(instruction_sets, "available", lambda: ("avx2", "scalar"))
    assert instruction_sets.candidates("auto") == ("avx2", "scalar")
    assert instruction_sets.candidates("scalar") == ("scalar",)
    known = "auto, avx512bf16, avx512, avx2, scalar"
    with pytest.raises(ValueError, match=f"^LORAFAST_CPU_ISA=sse9 is not one of {known}$"):
        instruction_sets.candidates("sse9")
    with pytest.raises(ValueError, match=r"; did you mean avx512bf16\?$"):
        instruction_sets.candidates("avx512bf")
    lacking = "LORAFAST_CPU_ISA=avx512 cannot run: this machine has avx2, scalar "
    with pytest.raises(RuntimeError, match=lacking):
        instruction_sets.candidates("avx512")
    # What a machine has is unknown where no kernel is built.
    monkeypatch.setattr(sys, "platform", "darwin")
    assert instruction_sets.candidates("avx512") == ("avx512",)
