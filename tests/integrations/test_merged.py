"""lorafast.merged: the base weights hold the adapters for a while, and come back bit for bit."""

import contextlib
import copy
import gc
import os
import weakref

import peft
import pytest
import torch
import torch.distributed as dist
from helpers import peft_models, tiny_transformers
from helpers.merged_models import IDS, Embedder, assert_unchanged, bits, models, on_peft
from helpers.whole_models import each_adapter
from torch import nn
from torch.multiprocessing import spawn

import lorafast
from lorafast import DoRA, LaMDA, LoRA

pytestmark = pytest.mark.peft

CYCLES = 1000


@each_adapter("gpt2", "bart", "llama")
def test_an_adapted_model_is_the_merged_one_and_comes_back(adapter, kind, dtype):
    model = tiny_transformers.adapted(tiny_transformers.KINDS[kind]().to(dtype), adapter)
    before, want = bits(model), tiny_transformers.outputs(model)
    folded = tiny_transformers.outputs(lorafast.merge(copy.deepcopy(model)))
    with lorafast.merged(model) as nothing:
        assert nothing is None
        assert bits(model)[1] == before[1]
        assert torch.equal(tiny_transformers.outputs(model), folded)
    assert_unchanged(model, before)
    assert torch.equal(tiny_transformers.outputs(model), want)


def several(dtype):
    model = peft_models.peft_model(dtype, targets=peft_models.ALL)
    peft_models.add_second_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def conv(dtype):
    base = nn.Sequential(nn.Conv1d(24, 8, 3, padding=1), nn.ReLU())
    return on_peft(base, dtype, targets=["0"])


PEFT = {
    "lora": lambda dtype: peft_models.peft_model(dtype, targets=peft_models.ALL).eval(),
    "bias": lambda dtype: peft_models.peft_model(dtype, targets=["up"], lora_bias=True).eval(),
    "dora": lambda dtype: peft_models.peft_model(dtype, targets=peft_models.ALL, use_dora=True),
    "several": several,
    "lamda": lambda dtype: peft_models.lamda_model(dtype, targets=peft_models.ALL),
    "embedding": lambda dtype: on_peft(Embedder(), dtype, targets=["table", "up"]),
    "conv": conv,
    "tokens": lambda dtype: on_peft(Embedder(), dtype, trainable_token_indices={"table": [1, 3]}),
}


def input_for(kind, dtype):
    if kind in ("embedding", "tokens"):
        return IDS
    x = peft_models.X.to(dtype)
    return x[:, :1].expand(3, 24, 24).contiguous() if kind == "conv" else x


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:accelerate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_model_is_what_peft_merges_and_comes_back(kind, dtype):
    model, x = PEFT[kind](dtype).eval(), input_for(kind, dtype)
    for accelerated in (False, True):
        if accelerated:
            lorafast.accelerate(model)
        with torch.no_grad():
            before, want = bits(model), model(x)
            again = copy.deepcopy(model)
            again.merge_adapter()
            with lorafast.merged(model):
                assert bits(model)[1] == before[1]
                assert torch.equal(model(x), again(x))
            assert_unchanged(model, before)
            assert torch.equal(model(x), want)
        model.merge_adapter()
        model.unmerge_adapter()


def test_parameters_of_fused_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (
                nn.Parameter(torch.randn(3, 6, 8)),
                nn.Parameter(torch.randn(3, 8, 6)),
            )

        def forward(self, x):
            return x @ self.down[0] @ self.up[0]

    model = on_peft(
        nn.Sequential(Experts()), targets=[], target_parameters=["0.up", "0.down"], lora_alpha=64
    )
    x = torch.randn(2, 8)
    with torch.no_grad():
        before, want = bits(model), model(x)
        with lorafast.merged(model):
            torch.testing.assert_close(model(x), want)
            assert not torch.equal(bits(model)[0][0], before[0][0])
        assert_unchanged(model, before)
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_layers_of_experts(transposed):
    weight = nn.Parameter(torch.randn(3, 8, 6))
    layer = lorafast.Experts.from_parameter(weight, DoRA(r=2), transposed=transposed)
    model = tiny_transformers.perturb(nn.Sequential(layer))
    before = bits(model)
    folded = copy.deepcopy(layer)
    folded.merge()
    with lorafast.merged(model):
        assert bits(model)[1] == before[1]
        assert torch.equal(layer.weight, folded.weight)
        assert not torch.equal(bits(model)[0][0], before[0][0])
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "model_of",
    [
        lambda: lorafast.adapt(nn.Sequential(nn.Linear(24, 16)), LoRA(r=4)),
        lambda: lorafast.adapt(nn.Sequential(nn.Linear(24, 16)), DoRA(r=4)),
        lambda: on_peft(nn.Sequential(nn.Linear(24, 16)), targets=["0"]),
        lambda: on_peft(nn.Sequential(nn.Linear(24, 16)), targets=["0"], use_dora=True),
    ],
    ids=["LoRA", "DoRA", "PEFT-LoRA", "PEFT-DoRA"],
)
def test_a_thousand_cycles_of_training_change_no_bit_of_the_base(model_of, dtype):
    torch.manual_seed(0)
    model = model_of().to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    (base,) = (p for n, p in model.named_parameters() if n.endswith(("0.weight", "layer.weight")))
    want, place = base.detach().clone().view(torch.uint8), base.data_ptr()
    moved = 0
    for _ in range(CYCLES):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        with lorafast.merged(model):
            moved += not torch.equal(base.view(torch.uint8), want)
    assert moved == CYCLES
    assert torch.equal(base.view(torch.uint8), want)
    assert base.data_ptr() == place


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_an_exception_inside_restores(which):
    model = models()[which]
    before = bits(model)
    with pytest.raises(KeyError, match="inside"), lorafast.merged(model):
        raise KeyError("inside")
    assert_unchanged(model, before)
    with lorafast.merged(model):  # no layer is left merged
        pass


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_the_modes_of_the_caller_change_nothing(which):
    model = models()[which]
    before = bits(model)
    with lorafast.merged(model):
        want = bits(model)[0]
    for modes in (
        [torch.inference_mode],
        [torch.no_grad],
        [lambda: torch.autocast("cpu", torch.bfloat16)],
        [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            with lorafast.merged(model):
                assert all(map(torch.equal, bits(model)[0], want))
        assert_unchanged(model, before)
    context = lorafast.merged(model)
    with torch.inference_mode():
        context.__enter__()
    context.__exit__(None, None, None)
    assert_unchanged(model, before)
    tiny_transformers.outputs(model)
    model(input_ids=tiny_transformers.IDS)[0].sum().backward()


def test_a_backward_through_the_base_of_before_raises():
    model = lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2))
    y = model(torch.randn(4, 8, requires_grad=True))
    with lorafast.merged(model):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("few", [1, 600], ids=["few", "many"])
@pytest.mark.parametrize("adapter", [LoRA(r=4), DoRA(r=4, cache_norm=True), LaMDA(r=4)], ids=str)
def test_calls_before_inside_and_after_keep_nothing_of_each_other(adapter, few):
    """The host path, the ops and the cached norm read the weight that there is."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24))
    model = tiny_transformers.perturb(lorafast.adapt(base, adapter)).eval()
    x = torch.randn(few, 32)
    with torch.no_grad():
        want = model(x)
        for _ in range(2):
            assert torch.equal(model(x), want)
            with lorafast.merged(model):
                inside = model(x)
                torch.testing.assert_close(inside, want)
                assert torch.equal(inside, nn.functional.linear(x, model[0].weight, model[0].bias))
            assert torch.equal(model(x), want)


def test_peft_s_cached_norm_is_the_base_s():
    model = peft_models.peft_model(use_dora=True).eval()
    lorafast.accelerate(model)
    with peft.helpers.DoraCaching(), torch.no_grad():
        want = model(peft_models.X)
        with lorafast.merged(model):
            torch.testing.assert_close(model(peft_models.X), want)
        assert torch.equal(model(peft_models.X), want)


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_the_copies_are_on_the_device_that_is_asked_for(which):
    model = models()[which]
    before = bits(model)
    for keep_on in ("cpu", None, torch.device("cpu")):
        with lorafast.merged(model, keep_on=keep_on):
            pass
        assert_unchanged(model, before)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of new tensors that are alive, as large as a weight at the least."""

    def __init__(self, smallest, model):
        super().__init__()
        self.smallest, self.found = smallest, {}
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.nbytes >= self.smallest:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.found[storage.data_ptr()] = (weakref.ref(tensor), storage.nbytes())
        return result

    def alive(self):
        gc.collect()
        return sum(size for tensor, size in self.found.values() if tensor() is not None)


@pytest.mark.parametrize("theirs", [False, True], ids=["adapted", "peft"])
def test_it_keeps_one_copy_of_every_adapted_weight_and_nothing_more(theirs):
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 64)).bfloat16()
    if theirs:
        model = on_peft(base, torch.bfloat16, targets=["0", "1"])
    else:
        model = lorafast.adapt(base, LoRA(r=2), ["0", "1"])
    with Counted(64 * 32 * 2, model) as counted:
        context = lorafast.merged(model)
        context.__enter__()
        assert counted.alive() == 2 * (64 * 64 + 32 * 64)
        context.__exit__(None, None, None)
        del context
        assert counted.alive() == 0


@pytest.mark.compile
@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_a_compiled_model_sees_what_the_plain_one_does(which):
    model = models()[which]
    compiled = torch.compile(model, backend="eager")
    want = tiny_transformers.outputs(model)
    torch.testing.assert_close(tiny_transformers.outputs(compiled), want)
    for _ in range(2):
        with lorafast.merged(compiled):
            inside = tiny_transformers.outputs(model)
            assert not torch.equal(inside, want)
            torch.testing.assert_close(tiny_transformers.outputs(compiled), inside)
        torch.testing.assert_close(tiny_transformers.outputs(compiled), want)


def test_the_state_dict_inside_is_refused_and_parameters_are_the_merged():
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    folded = dict(lorafast.merge(copy.deepcopy(model)).named_parameters())
    with lorafast.merged(model):
        with pytest.raises(RuntimeError, match="is merged"):
            model.state_dict()
        found = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    assert found.keys() == folded.keys()
    assert all(torch.equal(found[name], folded[name]) for name in folded)


def test_a_layer_and_a_wrapped_model():
    layer = lorafast.Linear(8, 8, adapter=LoRA(r=2))
    model = lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2))
    for one in (layer, nn.DataParallel(model)):
        before = bits(one)
        with lorafast.merged(one):
            pass
        assert_unchanged(one, before)


def _trains_with_rollouts(rank, path, which):
    """Two steps under DDP, with the base merged between them, as without."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    ends = []
    for rollouts in (False, True):
        model = models()[which]
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            if rollouts:
                before = bits(model)
                with lorafast.merged(wrapped), torch.no_grad():
                    wrapped(input_ids=tiny_transformers.IDS + rank)
                assert_unchanged(model, before)
            optimizer.zero_grad()
            wrapped(input_ids=tiny_transformers.IDS + rank)[0].square().mean().backward()
            optimizer.step()
        ends.append(bits(model)[0])
    assert all(map(torch.equal, *ends))
    dist.destroy_process_group()
    # Left without ado: DDP's reducer would wait for gloo's threads, and they may wait for the
    # interpreter.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_under_ddp_training_goes_on_as_if_nothing_had_been_merged(which, tmp_path):
    spawn(_trains_with_rollouts, args=(tmp_path / "rendezvous", which), nprocs=2)
