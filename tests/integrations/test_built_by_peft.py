"""What lorafast run does to the models that PEFT builds, and its one report."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import peft_models
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import lorafast
from lorafast.integrations import built_by_peft, peft_linear

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:fan_in_fan_out")]

ROOT = Path(lorafast.__file__).resolve().parent.parent
SCRIPT = """
import os, peft, torch
from torch import nn
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
model = peft.get_peft_model(
    nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"])
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
print(type(model.base_model.model[0]).__module__)
"""


@pytest.fixture
def install(monkeypatch):
    """A function that installs an Accelerator until the test ends."""
    monkeypatch.setattr(BaseTuner, "inject_adapter", BaseTuner.inject_adapter)
    made = []

    def install(dropout_on=None, keep="inner", quiet=False):
        made.append(built_by_peft.Accelerator(dropout_on, keep, quiet))
        made[-1]._patch(peft)
        return made[-1]

    yield install
    for accelerator in made:
        accelerator._hook.remove()


def step(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    sum(p.sum() for p in trained).backward()
    torch.optim.SGD(trained, lr=0.1).step()


class Net(peft_models.Net):
    """A linear beside an embedding, which stays PEFT's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 8)


def test_every_layer_is_served_and_the_report_comes_once_with_the_first_step(install, capsys):
    install()
    model = peft.get_peft_model(Net(), peft_models.config(targets=[*peft_models.ALL, "table"]))
    assert [type(m) for m in model.modules()].count(peft_linear.Linear) == 3
    assert capsys.readouterr().err == ""
    step(model)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "lorafast run: 3 of 4 PEFT layers run on lorafast",
        "lorafast run: left 1: is a peft.tuners.lora.layer.Embedding",
    ]
    step(model)
    peft.get_peft_model(Net(), peft_models.config())
    assert capsys.readouterr().err == ""


def test_adapters_added_later_injected_and_loaded_are_served(install, tmp_path):
    install()
    model = peft_models.peft_model()
    model.add_adapter("other", peft_models.config(targets=["mixed"]))
    assert type(model.base_model.model.mixed) is peft_linear.Linear
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = peft.PeftModel.from_pretrained(peft_models.Net(), tmp_path)
    injected = peft.inject_adapter_in_model(peft_models.config(), peft_models.Net())
    for one in (loaded, injected):
        assert [type(m) for m in one.modules()].count(peft_linear.Linear) == 2


def test_it_trains_as_accelerate_does(install):
    theirs = peft_models.peft_model(use_dora=True, lora_dropout=0.3)
    lorafast.accelerate(theirs)
    install()
    ours = peft_models.peft_model(use_dora=True, lora_dropout=0.3)
    want = peft_models.output_and_gradients(theirs, peft_models.X)
    found = peft_models.output_and_gradients(ours, peft_models.X)
    peft_models.assert_same(found, want, 0, 0)


def test_the_options_are_accelerate_s(install):
    install("adapter", "output")
    layer = peft_models.peft_model(use_dora=True).base_model.model.up
    assert (layer.lorafast_dropout_on, layer.lorafast_keep) == ("adapter", "output")


def test_layers_on_quantised_weights_are_served(install, capsys):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    install()
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu"))
    base.is_loaded_in_4bit = True
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    assert type(model.base_model.model[0]).__module__ == "lorafast.integrations.peft_quantised"
    step(model)
    assert "1 of 1 PEFT layers run on lorafast" in capsys.readouterr().err


def test_at_the_end_it_says_what_there_was(install, capsys):
    nothing = install()
    nothing._report(at_end=True)
    assert capsys.readouterr().err == (
        "lorafast run: PEFT built no adapter, and there is nothing to accelerate\n"
    )
    some = install()
    peft_models.peft_model()
    gc.collect()  # the model is gone
    some._report(at_end=True)
    some._report(at_end=True)
    assert capsys.readouterr().err.splitlines() == [
        "lorafast run: 2 of 2 PEFT layers run on lorafast",
        "lorafast run: no optimizer of torch has made a step",
    ]


def test_other_methods_of_peft_stay_and_are_named(install, capsys):
    install()
    config = peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    step(peft.get_peft_model(peft_models.Net(), config))
    assert capsys.readouterr().err.splitlines() == [
        "lorafast run: 0 of 1 PEFT layers run on lorafast",
        "lorafast run: left 1: is a peft.tuners.ia3.layer.Linear",
    ]


def test_other_ranks_and_quiet_print_nothing(install, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    install()
    install(quiet=True)
    step(peft_models.peft_model())
    assert capsys.readouterr().err == ""


def test_a_peft_that_it_does_not_know_is_left_alone(tmp_path):
    (tmp_path / "peft.py").write_text("")
    (tmp_path / "a.py").write_text("import peft; print('ran')")
    words = ["-m", "lorafast", "run", "a.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "ran\n"
    assert "lorafast run: PEFT's layers stay as they are: ModuleNotFoundError: " in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--nproc-per-node", "2", "-m"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "-m"], 1),
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_below_a_launcher_every_rank_is_served_and_one_reports(launcher, processes, tmp_path):
    pytest.importorskip(launcher[0].partition(".")[0])
    (tmp_path / "a.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "lorafast", "run", "a.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("lorafast.integrations.peft_linear") == processes
    assert done.stderr.count("lorafast run: 1 of 1 PEFT layers run on lorafast") == 1
