"""Every test runs with poisoned allocations: what lorafast forgets to write is NaN.

Triton kernels run in Triton's interpreter.
"""

import gc
import os

os.environ["TRITON_INTERPRET"] = "1"
for name in ("LORAFAST_BACKEND", "LORAFAST_LOG", "LORAFAST_CPU_ISA", "LORAFAST_TRIAL"):
    os.environ.pop(name, None)

import pytest
import torch

torch.set_num_threads(1)
# Until all tests are collected: imports leave nothing to collect, and looking takes seconds.
gc.disable()

# Without its device a seed is queued beside the caller's stack, which takes longer than many tests.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True)
def poisoned_and_seeded():
    """torch.empty yields NaN, and the global generator starts alike in every test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_collections():
    """Keep what imports have made out of later garbage collections.

    A collection of a million objects takes half a second, and transformers' Trainer and the bench
    ask for one in every run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def few_tokens_by_op(monkeypatch):
    """Calls of few tokens run on the op too, for tests of what the op itself does."""
    from lorafast.engine import plain_products

    monkeypatch.setattr(plain_products, "MOST_ELEMENTS", -1)
    monkeypatch.setattr(plain_products, "MOST_ELEMENTS_COPIED", -1)


@pytest.fixture
def calls_by_python(monkeypatch):
    """Calls of layers are made by the Python path, for tests of what that does."""
    from lorafast.engine import host

    monkeypatch.setattr(host, "linear", host._declined)


@pytest.fixture
def calls(monkeypatch):
    """How many calls of PEFT's layers ran on lorafast's ops, and why the others did not."""
    from lorafast.integrations import peft_linear as ours

    found = {"fast": 0, "why": []}
    host_forward, op_forward, peft_forward = ours.host_forward, ours.op_forward, ours.peft_forward

    def counted_by_host(layer, x):
        y = host_forward(layer, x)
        found["fast"] += y is not None
        return y

    def counted(layer, x, *usual):
        found["fast"] += 1
        return op_forward(layer, x, *usual)

    def told(layer, why, *args, **kwargs):
        found["why"].append(why)
        return peft_forward(layer, why, *args, **kwargs)

    monkeypatch.setattr(ours, "host_forward", counted_by_host)
    monkeypatch.setattr(ours, "op_forward", counted)
    monkeypatch.setattr(ours, "peft_forward", told)
    return found


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The process in which Triton compiles for the emulator; see emulator.process."""
    from emulator.process import Process

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder of compiled kernels for all workers
        folder = folder.parent
    process = Process(folder / "triton")
    yield process
    process.close()


def pytest_addoption(parser):
    """Add --cases, for a quick look at everything."""
    parser.addoption("--cases", type=int, help="run at most this many cases of each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep --cases of each parametrized test, spread evenly over its list."""
    most = config.getoption("--cases")
    if not most:
        return
    groups = {}
    for item in items:
        groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        cases[i * len(cases) // min(most, len(cases))]
        for cases in groups.values()
        for i in range(min(most, len(cases)))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish():
    """Collect garbage again."""
    gc.enable()


def pytest_ignore_collect(collection_path, config):
    """Leave out modules of which every test needs PEFT, if none of them is to run.

    Importing PEFT takes seconds in every worker.
    """
    if "not peft" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.peft\n" in collection_path.read_text() else None


def pytest_terminal_summary(terminalreporter):
    """Print a table of what the compiled kernels take: registers, stack and shared memory."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
    ]
    rows = [
        row
        for report in reports
        for name, rows in report.user_properties
        if name == "compiled"
        for row in rows
    ]
    if not rows:
        return
    terminalreporter.section("Triton kernels compiled ahead of time")
    terminalreporter.line(
        f"{'kernel':27}{'dtype':7}{'arch':9}{'forms':>5}{'registers':>11}{'stack':>7}"
        f"{'shared, KiB':>13}"
    )
    for dtype, capability, kernel in dict.fromkeys(tuple(row[:3]) for row in rows):
        registers, stack, shared = zip(
            *(row[3:] for row in rows if tuple(row[:3]) == (dtype, capability, kernel)), strict=True
        )
        used = f"{min(registers)}-{max(registers)}"
        memory = f"{min(shared) / 1024:.0f}-{max(shared) / 1024:.0f}"
        terminalreporter.line(
            f"{kernel:27}{dtype:7}{f'sm_{capability}':9}{len(registers):5}{used:>11}{max(stack):7}"
            f"{memory:>13}"
        )
