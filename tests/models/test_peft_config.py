"""Fields of PEFT's configs that change nothing are taken, those that lorafast lacks are refused."""

import pytest

from lorafast import LoRA
from lorafast.models.peft_config import spec_from_config

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"loftq_config": {"loftq_bits": 4}},
        {"corda_config": {"sample_count": 1}},
        {"eva_config": {"rho": 2.0}},
        {"lora_ga_config": {"direction": "ArB2r"}, "init_lora_weights": "gaussian"},
        {"merge_weights": True},
        {"some_field_of_a_later_version": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("loading", [False, True])
def test_fields_that_change_nothing_are_taken(fields, loading):
    init = fields.get("init_lora_weights", "kaiming")
    spec = spec_from_config(CONFIG | fields, loading)
    assert spec.adapter == LoRA(r=4, alpha=8, init=init)


def test_what_changes_training_alone_is_taken_from_a_file():
    fields = {"velora_config": {"num_groups": 2}}
    assert spec_from_config(CONFIG | fields, loading=True).adapter == LoRA(r=4, alpha=8)
    with pytest.raises(ValueError, match=r"velora_config=.*: lorafast has no such thing"):
        spec_from_config(CONFIG | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_qalora": True}, "use_qalora=True: lorafast has no such thing"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.*: lorafast has no such thing"),
        ({"some_field_of_a_later_version": 3}, "later_version=3: lorafast has no such thing"),
        ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"}, "init_lora_weights="),
        ({"corda_config": {"rho": 1}, "init_lora_weights": "corda"}, "init_lora_weights="),
    ],
    ids=str,
)
@pytest.mark.parametrize("loading", [False, True])
def test_fields_that_change_something_are_refused(fields, message, loading):
    with pytest.raises(ValueError, match=message):
        spec_from_config(CONFIG | fields, loading)
