"""adapt(..., fuse_mlp=True): the same numbers, less kept, and everything else as it was."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from helpers import tiny_transformers
from helpers.tiny_transformers import IDS
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

import lorafast
from lorafast import testing
from lorafast.nn.gated_mlp import GatedMLP, Parts, parts_of

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class MLP(nn.Module):
    def __init__(self, act=None, K=16, N=24):
        super().__init__()
        self.gate, self.up = nn.Linear(K, N), nn.Linear(K, N)
        self.down, self.act = nn.Linear(N, K), act or nn.SiLU()

    def forward(self, x):
        return self.down(self.up(x) * self.act(self.gate(x)))


class Counting(nn.Module):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return nn.functional.silu(x) * self.calls


class NamedActivation(MLP):
    def forward(self, x):
        """A docstring."""
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y  # noqa: RET504


class Reused(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(self.gate(x)))


class Added(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) + self.up(x))


class Keyword(MLP):
    def forward(self, hidden_states):
        return self.down(self.act(self.gate(hidden_states)) * self.up(hidden_states))


class More(MLP):
    def forward(self, x, **more):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Wrapped(MLP):
    @functools.wraps(MLP.forward)
    def forward(self, x):
        return MLP.forward(self, x) * 3


class Cast(MLP):
    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return self.down(y.float())


def pair(make, adapter, **options):
    """Two models with the same weights and adapters, of which the second one is fused."""
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = make()
        lorafast.adapt(model, adapter, **options, seed=1, fuse_mlp=fused)
        for parameter in lorafast.adapter_parameters(model):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 8)
        models.append(model)
    return models


def step(model, *given, call=None, **named):
    """Return the output and every gradient of one step."""
    model.zero_grad()
    torch.manual_seed(3)
    made = (model if call is None else call)(*given, **named)
    y = made if isinstance(made, torch.Tensor) else made.logits
    y.square().mean().backward()
    return {"y": y.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "adapter",
    [
        lorafast.LoRA(r=2, dropout=0.3), lorafast.DoRA(r=2, keep="inner"),
        lorafast.DoRA(r=2, keep="recompute", dropout=0.3), lorafast.LaMDA(r=2, init="zero"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*train without a schedule")
def test_the_numbers_are_those_of_the_plain_mlp(adapter, dtype):
    plain, fused = pair(
        lambda: tiny_transformers.llama().to(dtype), adapter, target_modules=TARGETS
    )
    assert_same(step(fused, IDS), step(plain, IDS))
    with torch.no_grad():
        assert torch.equal(fused(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    "act",
    [
        nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Identity(), nn.Softplus(),
        nn.ReLU(inplace=False), "silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_python",
        "relu2",
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(act, dtype):
    act = ACT2FN[act] if isinstance(act, str) else act
    plain, fused = pair(lambda: MLP(act).to(dtype), lorafast.LoRA(r=2, dropout=0.2))
    x = torch.randn(5, 3, 16, dtype=dtype, requires_grad=True)
    expected, d_x = step(plain, x), x.grad.clone()
    x.grad = None
    assert_same(step(fused, x), expected)
    assert torch.equal(x.grad, d_x)


def kept(model, x):
    """The bytes that autograd keeps for a call, x and parameters apart."""
    return testing.saved(lambda: model(x), {"x": x}, [*model.parameters()]).own


def test_the_product_and_the_activation_are_not_kept():
    M, K, N, r = 6, 16, 24, 2
    plain, fused = pair(MLP, lorafast.LoRA(r=r))
    x = torch.randn(M, K, requires_grad=True)
    # gate, act(gate), up and the product; and h of the three layers.
    assert kept(plain, x) == 4 * M * (4 * N + 3 * r)
    assert kept(fused, x) == 4 * M * (2 * N + 3 * r)
    frozen = MLP().requires_grad_(False)
    assert kept(frozen, x) == 4 * M * 3 * N > kept(fused, x)


def test_the_peak_of_a_step_falls():
    M, N = 64, 512
    plain, fused = pair(lambda: MLP(K=16, N=N), lorafast.LoRA(r=2))
    x = torch.randn(M, 16, requires_grad=True)
    peaks = []
    for model in (plain, fused):
        model(x).sum().backward()

        def step(model=model):
            model(x).sum().backward()

        peaks.append(testing.allocated(step).peak)
    # Six activations of the MLP's width, and five.
    assert peaks[0] - peaks[1] > 0.8 * 4 * M * N


def test_a_block_of_llama3_8b_keeps_what_the_arithmetic_says():
    """Bytes a token that adapted linears keep by reference, at a hundredth of the sizes."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    wide, narrow, M = 128, 448, 10
    config = LlamaConfig(
        hidden_size=wide, intermediate_size=narrow, num_attention_heads=4, num_key_value_heads=1
    )
    config._attn_implementation = "sdpa"
    for fuse_mlp, bytes_kept in ((False, 3 * wide + narrow), (True, 3 * wide)):
        block = LlamaDecoderLayer(config, 0).bfloat16()
        lorafast.adapt(block, lorafast.LoRA(r=2, dropout=0.05), fuse_mlp=fuse_mlp)
        inputs, saved = {}, {}
        for layer in block.modules():
            if isinstance(layer, lorafast.Linear):
                layer.register_forward_pre_hook(
                    lambda _, given, inputs=inputs: inputs.setdefault(given[0].data_ptr(), given[0])
                )

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor
            return tensor

        x = torch.randn(1, M, wide, dtype=torch.bfloat16, requires_grad=True)
        position = torch.randn(1, M, wide // 4, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, position_embeddings=(position, position))
        bytes_of = {key: t.numel() * t.itemsize for key, t in inputs.items() if key in saved}
        assert sum(bytes_of.values()) == M * 2 * bytes_kept
    # At the sizes of the model: 53,248 and 24,576 bytes a token.
    assert (2 * (3 * 4096 + 14336), 2 * 3 * 4096) == (53_248, 24_576)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    plain, fused = pair(MLP, lorafast.LoRA(r=2, dropout=0.3))
    x = torch.randn(6, 16, requires_grad=True)

    def call(model):
        return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)

    assert_same(step(fused, x, call=call(fused)), step(plain, x, call=call(plain)))
    if not use_reentrant:
        saved = testing.saved(lambda: call(fused)(x), {"x": x}, [*fused.parameters()])
        assert saved.own == 0


def test_offloaded_activations():
    plain, fused = pair(MLP, lorafast.LoRA(r=2))
    x = torch.randn(6, 16)
    expected = step(plain, x)
    with torch.autograd.graph.save_on_cpu():
        found = step(fused, x)
    assert_same(found, expected)


def test_autocast():
    plain, fused = pair(MLP, lorafast.LoRA(r=2, dropout=0.3))
    x = torch.randn(6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(fused, x), step(plain, x))


@pytest.mark.compile
def test_compiled_whole():
    plain, fused = pair(MLP, lorafast.LoRA(r=2))
    x = torch.randn(6, 16)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found, expected = step(fused, x, call=compiled), step(plain, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_an_output_of_gate_that_is_modified_is_an_error():
    _, fused = pair(MLP, lorafast.LoRA(r=2))
    outputs = []
    fused.gate.register_forward_hook(lambda *given: outputs.append(given[2]))
    y = fused(torch.randn(6, 16))
    with torch.no_grad():
        outputs[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        y.sum().backward()


def test_hooks_see_what_they_see_in_the_plain_mlp():
    plain, fused = pair(MLP, lorafast.LoRA(r=2, dropout=0.2))
    x, seen = torch.randn(6, 16), []
    for model in (plain, fused):
        model.act.register_forward_hook(lambda _, given, y: seen.append(y))
        model.act.register_full_backward_hook(lambda _, d_in, d_out: seen.append(d_out[0]))
    expected, found = step(plain, x), step(fused, x)
    assert_same(found, expected)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_a_hook_that_changes_the_input_of_down():
    plain, fused = pair(MLP, lorafast.LoRA(r=2))
    for model in (plain, fused):
        model.down.register_forward_pre_hook(lambda _, given: (given[0].mul_(2.0),))
    x = torch.randn(6, 16)
    assert_same(step(fused, x), step(plain, x))


def test_a_class_whose_forward_is_replaced_later(monkeypatch):
    _, fused = pair(MLP, lorafast.LoRA(r=2))
    x, forward = torch.randn(6, 16), MLP.forward
    before = fused(x)
    monkeypatch.setattr(MLP, "forward", lambda self, x: 3 * forward(self, x))
    assert torch.equal(fused(x), 3 * before)


def test_an_input_by_keyword():
    plain, fused = pair(Keyword, lorafast.LoRA(r=2))
    x = torch.randn(6, 16)
    assert_same(step(fused, hidden_states=x), step(plain, hidden_states=x))


def test_where_hooks_on_saved_tensors_are_forbidden_or_mutation_is_allowed():
    plain, fused = pair(MLP, lorafast.LoRA(r=2))
    x = torch.randn(6, 16)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same(step(fused, x), step(plain, x))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        assert_same(step(fused, x), step(plain, x))


def test_a_fused_mlp_is_copied_and_pickled():
    _, fused = pair(MLP, lorafast.LoRA(r=2))
    x = torch.randn(6, 16)
    expected = step(fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other, GatedMLP)
        assert type(other).__name__ == "MLP"
        assert isinstance(other, MLP)
        assert_same(step(other, x), expected)
    assert list(fused.state_dict()) == list(pair(MLP, lorafast.LoRA(r=2))[0].state_dict())


def test_ungroup_merge_and_unload_give_the_class_back():
    _, fused = pair(tiny_transformers.llama, lorafast.LoRA(r=2))
    mlp = type(tiny_transformers.llama().model.layers[0].mlp)
    assert type(fused.model.layers[0].mlp) is not mlp
    assert lorafast.ungroup(fused) == 2
    assert lorafast.ungroup(fused) == 0
    assert type(fused.model.layers[0].mlp) is mlp
    for undo in (lorafast.merge, lorafast.unload):
        _, fused = pair(tiny_transformers.llama, lorafast.LoRA(r=2))
        assert type(undo(fused).model.layers[0].mlp) is mlp


@pytest.mark.peft
def test_accelerate_fuses_and_restore_undoes():
    import peft

    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=TARGETS)
    models = []
    for fuse_mlp in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_transformers.llama(), config)
        lorafast.accelerate(model, fuse_mlp=fuse_mlp)
        models.append(model)
    plain, fused = models
    assert sum(isinstance(module, GatedMLP) for module in fused.modules()) == 2
    assert_same(step(fused, IDS), step(plain, IDS))
    lorafast.restore(fused)
    assert not any(isinstance(module, GatedMLP) for module in fused.modules())


def test_which_classes_are_gated_mlps():
    parts = Parts("gate", "up", "down", "act")
    assert parts_of(NamedActivation) == parts
    assert parts_of(MLP) == parts._replace(up_first=True)
    for other in (Reused, Added, Cast, More, Wrapped, nn.Linear, nn.Sequential, nn.Module):
        assert parts_of(other) is None


@pytest.mark.parametrize(
    "name",
    [
        "llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP", "qwen3.Qwen3MLP",
        "gemma.GemmaMLP", "gemma2.Gemma2MLP", "olmo2.Olmo2MLP", "granite.GraniteMLP",
        "cohere2.Cohere2MLP", "smollm3.SmolLM3MLP", "qwen3_moe.Qwen3MoeMLP",
    ],
)  # fmt: skip
def test_families(name):
    import importlib

    family, _, kind = name.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    expected = Parts("gate_proj", "up_proj", "down_proj", "act_fn")
    assert parts_of(getattr(module, kind)) == expected


def test_what_is_no_gated_mlp_is_told():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="fuse_mlp: no gated MLP was found: no module computes"):
        lorafast.adapt(model, lorafast.LoRA(r=2), fuse_mlp=True)
    with pytest.warns(UserWarning, match="its activation PReLU has parameters"):
        lorafast.adapt(MLP(nn.PReLU()), lorafast.LoRA(r=2), fuse_mlp=True)
    for act in (Counting(), nn.RReLU(), nn.Sequential(nn.SiLU(), nn.Dropout(0.5))):
        with pytest.warns(UserWarning, match="its activation .* may have a state"):
            lorafast.adapt(MLP(act), lorafast.LoRA(r=2), fuse_mlp=True)
    with pytest.warns(UserWarning, match="its activation ReLU works in place"):
        lorafast.adapt(MLP(nn.ReLU(inplace=True)), lorafast.LoRA(r=2), fuse_mlp=True)
    patched = MLP()
    patched.forward = patched.forward
    with pytest.warns(UserWarning, match="has a patched forward"):
        lorafast.adapt(patched, lorafast.LoRA(r=2), fuse_mlp=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafast.adapt(MLP(), lorafast.LoRA(r=2), fuse_mlp=True)
