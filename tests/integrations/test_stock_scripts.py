"""python -m lorafast run on scripts in the manner of stock ones: unchanged, all layers served."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lorafast

SCRIPTS = Path(__file__).parent / "stock_scripts"
ROOT = Path(lorafast.__file__).resolve().parent.parent
_TRAINER = ["--max_steps", "3", "--logging_steps", "1", "--report_to", "none", "--use_cpu"]
# The arguments of each script, and its layers with LoRA.
RUNS = {
    "run_clm": (["--text_file", "corpus.txt", "--output_dir", "out", *_TRAINER], 8),
    "run_glue": (
        ["--task_name", "thirds", "--output_dir", "out", "--do_train", "--do_eval", *_TRAINER], 13,
    ),
    "sft": (
        ["--output_dir", "out", "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj",
         "v_proj", "down_proj", "--bf16", "False", *_TRAINER], 6,
    ),
    "peft_example": (["out"], 6),
    "plain_loop": (["out"], 2),
}  # fmt: skip


def run(words, folder):
    """The finished process of a script in a folder of its own."""
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(f"line {i} of a text {i * i}" for i in range(40)))
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.parametrize("name", RUNS)
def test_a_stock_script_trains_alike_with_all_its_layers_served(name, tmp_path):
    if name == "sft" and not (find_spec("trl") and find_spec("datasets")):
        pytest.skip("TRL is not installed")
    arguments, layers = RUNS[name]
    script = SCRIPTS / f"{name}.py"
    assert not re.search(r"\blorafast\b", script.read_text())
    plain = run([script, *arguments], tmp_path / "plain")
    ours = run(["-m", "lorafast", "run", script, *arguments], tmp_path / "ours")
    report = f"lorafast run: {layers} of {layers} PEFT layers run on lorafast\n"
    assert report in ours.stderr
    assert "left" not in re.sub(r"(?m)^(?!lorafast run:).*", "", ours.stderr)
    assert "lorafast" not in plain.stderr
    losses = [json.loads((tmp_path / n / "out/losses.json").read_text()) for n in ("plain", "ours")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] != losses[0][0]
    files = [tmp_path / n / "out/adapter_model.safetensors" for n in ("plain", "ours")]
    theirs, ours = map(load_file, files)
    assert ours.keys() == theirs.keys()
    assert any(tensor.any() for key, tensor in ours.items() if "lora_B" in key)
