"""AdapterCheckpoint: Trainer's checkpoints hold adapters alone and resume to the bit."""

import copy
import functools
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from helpers.trainer_runs import (
    HALF,
    RUNS,
    STEPS,
    Stop,
    adapted,
    assert_same,
    base,
    logits,
    losses,
    prepared,
    trainer_of,
)
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import spawn
from transformers import LlamaForCausalLM, TrainerCallback

import lorafast
from lorafast import AdaLoRA, LoRA, PiSSA, schedule
from lorafast.checkpoint import trainer_files
from lorafast.integrations.trainer import AdapterCheckpoint, ScheduleCallback
from lorafast.methods import svd

pytestmark = [
    pytest.mark.peft,
    # Some of the runs train a LaMDA without its schedule.
    pytest.mark.filterwarnings("ignore:.* LaMDA adapters train without a schedule"),
]

runs = pytest.mark.parametrize("run", RUNS)


@runs
def test_a_resumed_run_is_the_one_that_never_stopped(run, tmp_path):
    straight, callback = prepared(run)
    whole = trainer_of(straight, tmp_path / "straight", callback, save_strategy="no")
    whole.train()
    model, callback = prepared(run)
    trainer_of(model, tmp_path / "half", callback, Stop()).train()
    checkpoint = tmp_path / "half" / f"checkpoint-{HALF}"
    model, callback = prepared(run)
    torch.rand(5)
    again = trainer_of(model, tmp_path / "again", callback)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    assert len(losses(again)) == STEPS
    assert_same(model, straight)
    if callback.schedule is not None:
        assert (
            {layer.frozen_columns for layer in callback.schedule.layers}
            == {callback.schedule.frozen_columns(4, STEPS)}
            != {0}
        )


def test_what_one_run_froze_trains_in_the_next(tmp_path):
    model, callback = prepared("lamda-frozen")
    layer = model.model.layers[0].mlp.up_proj
    straight = trainer_of(model, tmp_path, callback)
    straight.train()
    assert not layer.lora_B.requires_grad
    want, frozen = copy.deepcopy(model.state_dict()), layer.lora_B.clone()
    again = trainer_of(model, tmp_path / "again", callback)
    assert layer.lora_B.requires_grad
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert losses(again) == losses(straight)
    assert_same(model, SimpleNamespace(state_dict=lambda: want))
    trainer_of(model, tmp_path / "anew", callback).train()
    assert not torch.equal(layer.lora_B, frozen)


@runs
def test_a_checkpoint_is_an_adapter_without_base_weights(run, tmp_path):
    model, callback = prepared(run)
    trainer_of(model, tmp_path, callback, Stop()).train()
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    plain = base(tie_word_embeddings=run == "tied")
    kept = load_file(checkpoint / "model.safetensors")
    trained = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or "lora_" in name
    }
    assert {name for name in kept if not name.startswith("lorafast.")} == trained
    starts = {
        name
        for name in trained
        if name.endswith(("lora_A", "lora_B", "lora_core")) and RUNS[run][0].residual
    }
    assert kept.keys() - trained == {f"lorafast.start.{name}" for name in starts} | {
        "lorafast.adapters"
    }
    frozen = [parameter for name, parameter in model.named_parameters() if name not in trained]
    for tensor in [*kept.values(), *load_file(checkpoint / "adapter_model.safetensors").values()]:
        assert not [
            weight
            for weight in frozen
            if weight.shape == tensor.shape and torch.equal(weight, tensor)
        ]
    written = {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    }
    ours = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert {path.name for path in checkpoint.iterdir()} == ours | written
    torch.testing.assert_close(
        logits(lorafast.load_adapter(plain, checkpoint)), logits(model), rtol=0, atol=0
    )


def test_peft_loads_a_checkpoint(tmp_path):
    model = adapted()
    trainer_of(model, tmp_path, AdapterCheckpoint(), Stop()).train()
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / f"checkpoint-{HALF}")
    torch.testing.assert_close(logits(theirs), logits(model))


def test_transformers_loads_a_checkpoint(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = lorafast.adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoRA(r=4))
    trainer_of(model, tmp_path, AdapterCheckpoint(), Stop()).train()
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    for kind in (LlamaForCausalLM, transformers.AutoModelForCausalLM):
        torch.testing.assert_close(logits(kind.from_pretrained(checkpoint)), logits(model))


@pytest.mark.parametrize("run", ["lora", "pissa", "lamda-freezing", "vera"])
def test_the_best_model_is_loaded_and_old_checkpoints_go(run, tmp_path):
    model, callback = prepared(run)
    arguments = {
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
    }
    trainer = trainer_of(
        model, tmp_path, callback, **arguments, metric_for_best_model="loss", greater_is_better=True
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        best.name,
        f"checkpoint-{STEPS}",
    }
    assert best.name != f"checkpoint-{STEPS}"
    torch.testing.assert_close(
        logits(model), logits(lorafast.load_adapter(base(), best)), rtol=0, atol=0
    )
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


@pytest.mark.parametrize(
    "arguments",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_resuming_under(arguments, tmp_path):
    half = tmp_path / f"checkpoint-{HALF}"
    straight, again = (
        trainer_of(adapted(), tmp_path, AdapterCheckpoint(), **arguments) for _ in range(2)
    )
    straight.train()
    again.train(resume_from_checkpoint=str(half))
    assert losses(again) == losses(straight)
    assert_same(again.model, straight.model)


@pytest.mark.compile
def test_a_compiled_model_and_a_plain_one_share_checkpoints(tmp_path, few_tokens_by_op):
    def compiled():
        return torch.compile(adapted(), backend="eager")

    found = []
    for first, second in ((compiled, adapted), (adapted, compiled)):
        folder = tmp_path / first.__name__
        straight, again = (
            trainer_of(make(), folder, AdapterCheckpoint(), remove_unused_columns=False)
            for make in (first, second)
        )
        straight.train()
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
        found += [losses(straight), losses(again)]
    assert found == found[:1] * 4


@pytest.mark.parametrize("run", ["pissa", "dora-pissa", "lamda"])
def test_a_start_computed_otherwise_is_replaced_by_the_runs(run, tmp_path, monkeypatch):
    straight, callback = prepared(run)
    trainer_of(straight, tmp_path, callback, Stop()).train()
    monkeypatch.setattr(svd, "truncated_svd", functools.partial(_least, svd.truncated_svd))
    other, callback = prepared(run)
    monkeypatch.undo()
    callback.on_init_end(None, None, None, model=other)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other.state_dict(), straight.state_dict(), rtol=1e-3, atol=1e-3)
    other.load_state_dict(load_file(tmp_path / f"checkpoint-{HALF}" / "model.safetensors"))
    trained = {
        name: parameter for name, parameter in straight.named_parameters() if "lora_" in name
    }
    assert not [
        name for name in trained if not torch.equal(trained[name], other.get_parameter(name))
    ]
    torch.testing.assert_close(other.state_dict(), straight.state_dict(), rtol=1e-5, atol=1e-6)
    lorafast.save_adapter(other, tmp_path / "other")
    want, found = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in (f"checkpoint-{HALF}", "other")
    )
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def _least(top, weight, r, niter):
    """The smallest singular values instead of the largest."""
    U, S, Vh = top(weight, min(weight.shape), 0)
    return U[:, -r:], S[-r:], Vh[-r:]


def test_saving_the_model_is_saving_its_adapter_until_it_is_merged(tmp_path):
    model = adapted()
    trainer = trainer_of(model, tmp_path, AdapterCheckpoint(), max_steps=1)
    trainer.train()
    trainer.save_model()
    two = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == two | {
        "training_args.bin"
    }
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
        other.model.layers[0].self_attn.q_proj.lora_B.add_(1)
    other.save_pretrained(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == two
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(
        load_file(tmp_path / "copy" / "adapter_model.safetensors")[key],
        other.get_submodule(key[17:-14]).lora_B,
    )
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    lorafast.merge(model).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(model), rtol=0, atol=0
    )


def test_only_checkpoints_go_through_the_hooks(tmp_path):
    model = adapted()
    plain = base().state_dict()
    trainer = trainer_of(model, tmp_path, AdapterCheckpoint(), Stop())
    trainer_of(model, tmp_path, AdapterCheckpoint())
    trainer.train()
    kept = load_file(tmp_path / f"checkpoint-{HALF}" / "model.safetensors")
    want = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        model.model.layers[0].self_attn.q_proj.reset_adapter()
        assert model.load_state_dict(kept, strict=strict) == nn.Module().load_state_dict({})
    assert_same(model, SimpleNamespace(state_dict=lambda: want))
    model.load_state_dict(plain)
    assert not model.model.layers[0].self_attn.q_proj.lora_B.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_a_model_that_model_init_makes(tmp_path):
    trainer = trainer_of(None, tmp_path, AdapterCheckpoint(), model_init=lambda: adapted())
    trainer.train()
    assert len(load_file(tmp_path / f"checkpoint-{HALF}" / "model.safetensors")) == 2 * 14 + 1
    with pytest.raises(RuntimeError, match="not model_init="):
        trainer.train(resume_from_checkpoint=True)


def test_a_start_saved_after_its_scaling_changed(tmp_path):
    model = adapted(LoRA(r=4, init=PiSSA()))
    for layer in model.modules():
        if isinstance(layer, lorafast.Linear):
            layer.scaling *= 3
    lorafast.save_adapter(model, tmp_path)
    torch.testing.assert_close(
        logits(lorafast.load_adapter(base(), tmp_path)), logits(model), rtol=1e-5, atol=1e-6
    )


def _in_a_group(rank, folder):
    """End the process by itself.

    The destructor of torch's gloo group holds the GIL while it waits for a thread that may want it.
    """
    torch.set_num_threads(1)
    try:
        _save_and_resume(rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _save_and_resume(rank, folder):
    # What torchrun sets; nobody asks for the address, for the group meets in a file.
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    written, write = [], trainer_files.write_weights
    trainer_files.write_weights = lambda model, folder, state_dict: (
        written.append(folder.name),
        write(model, folder, state_dict),
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    straight, again = (
        trainer_of(adapted(), folder, AdapterCheckpoint(), ddp_backend="gloo") for _ in range(2)
    )
    straight.train()
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}"))
    assert_same(again.model, straight.model)
    assert losses(again) == losses(straight)
    assert written == ([] if rank else ["checkpoint-3", "checkpoint-6", "checkpoint-6"])
    _penalty_in_a_group(folder)
    torch.distributed.barrier()


class FirstGradients(TrainerCallback):
    """Notes the gradients of the first step as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not state.global_step:
            named = model.named_parameters()
            self.taken = {name: p.grad.clone() for name, p in named if p.grad is not None}


def _penalty_in_a_group(folder):
    """AdaLoRA's penalty enters the mean of the ranks' gradients once, and its run resumes."""

    def run(name, *more, resume=None, weight=0.7):
        model = adapted(AdaLoRA(r=4, target_r=2))
        seen = FirstGradients()
        callback = ScheduleCallback(schedule.AdaLoRA, orth_reg_weight=weight)
        trainer = trainer_of(
            model, folder / name, callback, seen, *more, ddp_backend="gloo", max_grad_norm=0.0,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen, callback.schedule

    straight, with_penalty, planned = run("straight")
    _, without, _ = run("without", weight=0.0)
    fresh = adapted(AdaLoRA(r=4, target_r=2))
    schedule.AdaLoRA(fresh, STEPS, orth_reg_weight=0.7).penalty().backward()
    added = {name: g - without.taken[name] for name, g in with_penalty.taken.items()}
    for name, parameter in fresh.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(added[name], parameter.grad, rtol=1e-4, atol=1e-5)
    half = str(folder / "straight" / f"checkpoint-{HALF}")
    again, _, resumed = run("again", resume=half)
    assert_same(again.model, straight.model)
    assert str(resumed.state_dict()) == str(planned.state_dict())
    for parameter in again.model.parameters():
        theirs = parameter.detach().clone()
        torch.distributed.broadcast(theirs, 0)
        assert torch.equal(theirs, parameter)


@pytest.mark.slow
@pytest.mark.distributed
def test_in_a_process_group_rank_0_writes_and_all_resume(tmp_path):
    spawn(_in_a_group, args=(tmp_path,), nprocs=2)
