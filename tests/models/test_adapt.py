"""lorafast.adapt: what is matched, replaced and frozen, and that a refusal changes nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lorafast
from lorafast import DoRA, LaMDA, LoRA


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.out = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, x):
        return self.out(self.query(x) * self.value(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, lorafast.Linear)]


def snapshot(model):
    return [
        (name, p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()
    ], list(model.modules())


def assert_untouched(model, before, exactly=True):
    parameters, modules = before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    for (name, held), (was, p, value, flag) in zip(
        model.named_parameters(), parameters, strict=True
    ):
        assert (name, held.requires_grad) == (was, flag)
        assert held is p
        torch.testing.assert_close(
            held, value, rtol=0 if exactly else 1e-6, atol=0 if exactly else 1e-6, equal_nan=True
        )


IDS = torch.arange(10).reshape(2, 5)
ALL = [f"blocks.{i}.{name}" for i in range(2) for name in ("query", "value", "out.0", "out.2")]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("all-linear", ALL),
        (["query"], ["blocks.0.query", "blocks.1.query"]),
        (("value", "0.out.2"), ["blocks.0.value", "blocks.0.out.2", "blocks.1.value"]),
        ({"lm_head"}, ["lm_head"]),
        (["blocks.1.out.0"], ["blocks.1.out.0"]),
        (
            r".*\.(query|value)",
            ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"],
        ),
        (r"blocks\.1\.out\.\d", None),
    ],
)
def test_targets(target, names):
    if names is None:
        with pytest.raises(
            TypeError,
            match=r"matches blocks\.1\.out\.1, which is a torch.nn.modules.activation.ReLU",
        ):
            lorafast.adapt(Model(), LoRA(r=2), target)
    else:
        assert adapted(lorafast.adapt(Model(), LoRA(r=2), target)) == names


@pytest.mark.parametrize("adapter", [LoRA(r=2), DoRA(r=2), LaMDA(r=2)], ids=repr)
def test_the_model_is_the_same_object_and_starts_as_the_base(adapter):
    model = Model()
    query, want = model.blocks[0].query, model(IDS)
    weight = query.weight.detach().clone()
    assert lorafast.adapt(model, adapter) is model
    assert model.blocks[0].query.weight is query.weight
    assert model.blocks[0].query.bias is query.bias
    torch.testing.assert_close(model(IDS), want)
    assert torch.equal(query.weight, weight) != adapter.residual


def test_only_adapters_train():
    model = lorafast.adapt(Model(), DoRA(r=2))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_magnitude"}
    assert not model.embed.weight.requires_grad
    model(IDS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_starts_follow_the_seed_in_module_order():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(lorafast.adapt(Model(), LoRA(r=2)))
    a, b = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(a[name], b[name]) for name in a if "lora" in name)
    torch.manual_seed(3)
    Model()
    assert torch.equal(
        LoRA(r=2).init_tensors(torch.empty(8, 8))["lora_A"], a["blocks.0.query.lora_A"]
    )


def test_a_linear_in_two_places_is_replaced_in_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    lorafast.adapt(
        model, LoRA(r=2), ["2"]
    )  # named by one of its two names, it would be half adapted
    assert model[0] is model[2]
    assert isinstance(model[0], lorafast.Linear)


def test_the_in_place_error_names_the_layer_as_adapt_found_it():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True))
    lorafast.adapt(model, DoRA(r=2, keep="output"))
    with pytest.raises(RuntimeError, match=r"^0: its output was modified in place"):
        model(torch.randn(3, 4)).sum().backward()


def test_the_meta_device_starts_when_weights_arrive():
    with torch.device("meta"):
        model = lorafast.adapt(Model(), LaMDA(r=2))
    plain = Model()
    model.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(model(IDS), plain(IDS))


@pytest.mark.compile
def test_a_compiled_adapted_model_agrees():
    model = lorafast.adapt(Model(), LoRA(r=2))
    with torch.no_grad():
        model.blocks[0].query.lora_B.normal_()
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(IDS), model(IDS)
    )


def patched(model):
    model.blocks[1].value.forward = lambda x: x


def buffered(model):
    model.blocks[0].value.register_buffer("mask", torch.ones(8))


def listened(model):
    model.blocks[0].query.register_state_dict_post_hook(lambda *_: None)


def normed(model):
    model.norm = nn.LayerNorm(8)


def renormed(model):
    model.embed.max_norm = 1.0


def encoding(model):
    model.blocks[1].encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model.blocks[1].encoder.self_attn = nn.Identity()


def parametrized(model):
    parametrizations.weight_norm(model.blocks[0].out[0])


def attending(model):
    model.blocks[1].attention = nn.MultiheadAttention(8, 2)


def pefted(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"]), model)


@pytest.mark.parametrize(
    ("target", "spoil", "error", "message"),
    [
        (["qeury"], None, ValueError, "'qeury' matches no module; near it: query"),
        (["query", "vale"], None, ValueError, "'vale' matches no module; near it: value"),
        (r"blocks\.\d\.qkv", None, ValueError, "matches no module"),
        ("(", None, ValueError, "is no regular expression"),
        ([], None, ValueError, "must be 'all-linear'"),
        ([3], None, ValueError, "must be 'all-linear'"),
        (
            ["norm"],
            normed,
            TypeError,
            "matches norm, which is a torch.nn.modules.normalization.LayerNorm",
        ),
        (["embed"], renormed, TypeError, "matches embed, which is an embedding with max_norm=1.0"),
        (["out"], None, TypeError, "which is a torch.nn.modules.container.Sequential"),
        ("all-linear", patched, TypeError, "matches blocks.1.value, which has a patched forward"),
        ("all-linear", parametrized, TypeError, "blocks.0.out.0, which is a .*ParametrizedLinear"),
        (
            "all-linear",
            buffered,
            TypeError,
            "matches blocks.0.value, which holds mask besides weight and bias",
        ),
        (
            "all-linear",
            listened,
            TypeError,
            "matches blocks.0.query, which has state_dict_hooks",
        ),
        (
            "all-linear",
            encoding,
            TypeError,
            "encoder.linear1, which nn.TransformerEncoderLayer does not call in eval",
        ),
        (["out_proj"], attending, TypeError, "out_proj, which .* nn.MultiheadAttention reads"),
        pytest.param(
            ["value"],
            pefted,
            ValueError,
            r"carries PEFT adapters already: blocks\.0\.query is a Linear",
            marks=pytest.mark.peft,
        ),
    ],
)
def test_refusals_change_nothing(target, spoil, error, message):
    model = Model()
    if spoil:
        spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lorafast.adapt(model, LoRA(r=2), target)
    assert_untouched(model, before)


def test_a_second_adapt_is_refused():
    model = lorafast.adapt(Model(), LoRA(r=2), ["query"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapted already: blocks\.0\.query"):
        lorafast.adapt(model, LoRA(r=2), ["value"])
    assert_untouched(model, before)


def test_a_model_that_is_one_linear_or_has_none():
    with pytest.raises(TypeError, match="from_linear"):
        lorafast.adapt(nn.Linear(2, 2), LoRA(r=1))
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        lorafast.adapt(nn.Sequential(nn.ReLU()), LoRA(r=1))
    with pytest.raises(TypeError, match="must be a lorafast adapter"):
        lorafast.adapt(nn.Sequential(nn.Linear(2, 2)), "lora")


def test_tied_weights_refuse_an_init_that_changes_them():
    model = Model()
    model.lm_head.weight = model.embed.weight
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"would change embed\.weight and lm_head\.weight, which are one tensor"
    ):
        lorafast.adapt(model, LaMDA(r=2), ["query", "lm_head"])
    assert_untouched(model, before)
    lorafast.adapt(model, LaMDA(r=2, init="zero"), ["query", "lm_head"])
    assert model.lm_head.weight is model.embed.weight


def test_an_init_that_fails_midway_gives_weights_back():
    model = Model()
    with torch.no_grad():
        model.blocks[1].out[0].weight[0, 0] = float("nan")
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(Exception, match=r"(?i)svd|nan|converge"):
        lorafast.adapt(model, LaMDA(r=2))
    assert_untouched(model, before, exactly=False)
