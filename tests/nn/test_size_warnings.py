"""What the constructors of layers warn of: alpha = 0, and ranks above the sizes of the weight."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.user_warnings import messages
from torch import nn

import lorafast
from lorafast import DoRA, LoRA, VeRA

MAKERS = {
    "Linear": lambda adapter: lorafast.Linear(8, 6, adapter=adapter),
    "from_linear": lambda adapter: lorafast.Linear.from_linear(nn.Linear(8, 6), adapter),
    "Embedding": lambda adapter: lorafast.Embedding(8, 6, adapter=adapter),
    "from_embedding": lambda adapter: lorafast.Embedding.from_embedding(
        nn.Embedding(8, 6), adapter
    ),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_maker
def test_a_rank_above_the_sizes_warns_once(make):
    (message,) = messages(lambda: make(LoRA(r=40)))
    kind = type(make(LoRA(r=6))).__name__
    assert message.startswith("r exceeds min(N, K)")
    assert message.endswith(f"in this {kind} (r=40, N=6, K=8)")
    assert messages(lambda: make(LoRA(r=6))) == []


@each_maker
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_alpha_0_warns_once(make, method):
    (message,) = messages(lambda: make(method(r=2, alpha=0)))
    assert message.startswith("alpha=0: the scaling s is 0")
    assert message.endswith(("in this Linear", "in this Embedding"))


def test_both_are_two_warnings():
    assert len(messages(lambda: MAKERS["Linear"](LoRA(r=7, alpha=0)))) == 2


def test_the_default_adapter_counts_too():
    (message,) = messages(lambda: lorafast.Linear(3, 5))
    assert message.endswith("(r=8, N=5, K=3)")


def test_shared_projections_may_have_any_rank():
    assert messages(lambda: lorafast.Linear(8, 6, adapter=VeRA(r=64))) == []


def test_copies_and_states_do_not_warn_again():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = lorafast.Linear(8, 6, adapter=LoRA(r=40))

    def copies():
        copy.deepcopy(layer)
        pickle.loads(pickle.dumps(layer)).load_state_dict(layer.state_dict())
        layer(torch.randn(2, 8)).sum().backward()

    assert messages(copies) == []


@pytest.mark.parametrize("make", [lorafast.Linear.from_linear, lorafast.Embedding.from_embedding])
def test_a_warning_that_is_an_error_leaves_the_base_as_it_was(make):
    base = nn.Linear(8, 6) if "Linear" in str(make) else nn.Embedding(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="r exceeds"):
            make(base, LoRA(r=9))
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_what_is_no_adapter_is_still_a_type_error():
    with pytest.raises(TypeError, match="must be a lorafast adapter"):
        lorafast.Linear(8, 6, adapter=40)
