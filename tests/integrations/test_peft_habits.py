"""Special cases of PEFT's files and configs: ties, copied biases, embeddings, odd names."""

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import LoRA

pytestmark = pytest.mark.peft

peft = pytest.importorskip("peft")


def tied():
    return tiny_transformers.llama(tie_word_embeddings=True)


def config(**fields):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | fields)


def assert_read(make, theirs, folder, **options):
    """PEFT's model, saved and read here, gives the same."""
    theirs.save_pretrained(folder, **options)
    found = lorafast.load_adapter(make(), folder)
    torch.testing.assert_close(
        tiny_transformers.outputs(found), tiny_transformers.outputs(theirs), rtol=1e-4, atol=2e-6
    )
    return found


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_modules_to_save_of_a_tied_model_are_untied_as_in_peft(saved, tmp_path):
    found = assert_read(
        tied,
        tiny_transformers.peft_adapted(tied(), config(modules_to_save=saved)),
        tmp_path / "theirs",
    )
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    ours = tiny_transformers.perturb(lorafast.adapt(tied(), config(modules_to_save=saved)))
    lorafast.save_adapter(ours, tmp_path / "ours")
    for loaded in (
        lorafast.load_adapter(tied(), tmp_path / "ours"),
        tiny_transformers.loaded_by_peft(tied(), tmp_path / "ours"),
    ):
        torch.testing.assert_close(
            tiny_transformers.outputs(loaded), tiny_transformers.outputs(ours), rtol=1e-4, atol=2e-6
        )
    with lorafast.disable_adapter(ours):
        torch.testing.assert_close(
            tiny_transformers.outputs(ours), tiny_transformers.outputs(tied())
        )


def test_what_stays_tied_is_loaded_tied(tmp_path):
    ours = tiny_transformers.adapted(
        tied(), LoRA(r=4), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    lorafast.save_adapter(ours, tmp_path / "tied")
    again = lorafast.load_adapter(tied(), tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(tiny_transformers.outputs(again), tiny_transformers.outputs(ours))
    theirs = tiny_transformers.peft_adapted(
        tied(), config(modules_to_save=["embed_tokens", "lm_head"])
    )
    theirs.save_pretrained(tmp_path / "apart")
    before = tiny_transformers.copied_tensors(again)
    with pytest.raises(
        ValueError, match=r"are one tensor \(99, 32\) in the model, and two in the file"
    ):
        lorafast.load_adapter(again, tmp_path / "apart")
    assert all(
        torch.equal(value, before[name])
        for name, value in tiny_transformers.copied_tensors(again).items()
    )


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x):
        return self.out(self.norm(self.dense(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.classifier = nn.Linear(8, 32), Head()

    def forward(self, x):
        return self.classifier(torch.relu(self.base(x)))


def test_a_head_of_many_parts_with_biases_and_counters(tmp_path):
    theirs = tiny_transformers.peft_adapted(
        Net(),
        peft.LoraConfig(r=4, target_modules=["base"], bias="all", modules_to_save=["classifier"]),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_transformers.perturb(
        lorafast.adapt(Net(), LoRA(r=4), ["base"], bias="all", modules_to_save=["classifier"])
    )
    ours.train()(torch.randn(16, 8))
    lorafast.save_adapter(ours.eval(), tmp_path / "ours")
    x = torch.randn(5, 8)
    torch.testing.assert_close(
        lorafast.load_adapter(Net().eval(), tmp_path / "theirs")(x), theirs(x)
    )
    again = lorafast.load_adapter(Net().eval(), tmp_path / "ours")
    torch.testing.assert_close(again(x), ours(x))
    assert again.classifier.norm.num_batches_tracked == 1


def test_embeddings_saved_for_safety(tmp_path):
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), config())
    assert_read(tiny_transformers.llama, theirs, tmp_path, save_embedding_layers=True)
    other = tiny_transformers.llama()
    nn.init.normal_(other.lm_head.weight)
    loaded = lorafast.load_adapter(other, tmp_path)
    assert torch.equal(loaded.lm_head.weight, theirs.base_model.model.lm_head.weight)


def test_pissa_on_the_head_comes_with_its_residual(tmp_path):
    assert_read(
        tiny_transformers.llama,
        tiny_transformers.peft_adapted(
            tiny_transformers.llama(), config(target_modules=["lm_head"], init_lora_weights="pissa")
        ),
        tmp_path,
    )


def test_patterns_of_groups_and_full_names(tmp_path):
    pattern = {r"layers\.(0|1)\.(self_attn\.)?q_proj": 3, r".*\.(up|down)_proj": 2}
    assert_read(
        tiny_transformers.llama,
        tiny_transformers.peft_adapted(
            tiny_transformers.llama(), config(target_modules="all-linear", rank_pattern=pattern)
        ),
        tmp_path / "a",
    )
    names = ["model.layers.0.self_attn.q_proj", "v_proj"]
    fields = {"target_modules": names, "layers_to_transform": [1]}
    found = assert_read(
        tiny_transformers.llama,
        tiny_transformers.peft_adapted(tiny_transformers.llama(), config(**fields)),
        tmp_path / "b",
    )
    adapted = [
        name
        for name, m in lorafast.adapt(tiny_transformers.llama(), config(**fields)).named_modules()
        if hasattr(m, "adapter")
    ]
    assert adapted == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert [name for name, m in found.named_modules() if hasattr(m, "adapter")] == adapted


def test_a_config_for_inference_trains_nothing():
    assert (
        lorafast.trainable_summary(
            lorafast.adapt(tiny_transformers.llama(), config(inference_mode=True))
        ).trainable
        == 0
    )


def test_what_cannot_be_adapted_twice_or_at_once():
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), config())
    lorafast.accelerate(theirs)
    modules = list(theirs.modules())
    with pytest.raises(ValueError, match="carries PEFT adapters already"):
        lorafast.adapt(theirs, LoRA(r=2))
    assert list(theirs.modules()) == modules
    both = config(target_modules=["q_proj", "lm_head"], modules_to_save=["head"])
    with pytest.raises(ValueError, match="a module is one or the other"):
        lorafast.adapt(tiny_transformers.llama(), both)


@pytest.mark.compile
def test_expressions_mean_names_without_wrappers():
    model = tiny_transformers.llama()
    model.model.layers[0].self_attn = torch.compile(
        model.model.layers[0].self_attn, backend="eager"
    )
    lorafast.adapt(model, LoRA(r=2), r"model\.layers\.0\.self_attn\.q_proj")
    assert isinstance(model.model.layers[0].self_attn._orig_mod.q_proj, lorafast.Linear)


def test_fused_experts_are_told_not_passed_over():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(2, 4, 4))

    model = nn.ModuleDict({"q": nn.Linear(4, 4), "experts": Experts(), "conv": nn.Conv1d(2, 2, 1)})
    with pytest.warns(
        UserWarning, match=r"no 3-D weight, as fused experts have them: experts\.gate_up$"
    ):
        lorafast.adapt(model, LoRA(r=2))


def test_a_layer_in_two_places_is_told_before_peft_halves_it(tmp_path):
    shared = nn.Linear(4, 4)
    model = lorafast.adapt(nn.Sequential(shared, nn.ReLU(), shared), LoRA(r=2))
    with pytest.warns(UserWarning, match="0 and 2 are one layer: PEFT will put"):
        lorafast.save_adapter(model, tmp_path)
