"""lorafast.estimate_gradients: the true mean, one gradient at a time, and the model unchanged."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast import LoRA


class Net(nn.Module):
    """An embedding, a Conv1D, and linears in two places, called twice, and never called."""

    def __init__(self):
        super().__init__()
        self.table, self.mixed = nn.Embedding(11, 6), Conv1D(7, 6)
        self.first = nn.Linear(7, 7)
        self.again, self.twice, self.idle = self.first, nn.Linear(7, 7, bias=False), nn.Linear(7, 5)
        self.norm, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.5)

    def forward(self, ids):
        x = torch.tanh(self.again(torch.tanh(self.first(self.mixed(self.table(ids))))))
        return self.norm(self.drop(self.twice(torch.tanh(self.twice(x)))))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.mixed.weight)
    return model.to(dtype).eval()


BATCHES = [torch.tensor([1, 4, 4, 9]), torch.tensor([0, 2, 7]), torch.tensor([10, 3])]
NAMES = ["table", "mixed", "first", "twice", "idle"]


def loss_of(model, ids):
    return (model(ids) - 1).square().mean()


def test_the_mean_over_the_batches():
    model = net()
    found = lorafast.estimate_gradients(model, iter(BATCHES), loss_of, NAMES)
    assert list(found) == NAMES
    sum(loss_of(model, ids) for ids in BATCHES).div(3).backward()
    for name, G in found.items():
        weight = getattr(model, name).weight
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(
            G,
            grad if isinstance(getattr(model, name), nn.Linear) else grad.t(),
            rtol=1e-12,
            atol=1e-15,
        )
        assert G.is_contiguous()
        assert not G.requires_grad
    assert not found["idle"].any()


def test_names_are_those_of_adapt():
    found = lorafast.estimate_gradients(net(), BATCHES, loss_of, exclude_modules=["idle"])
    model = lorafast.adapt(net(), LoRA(r=2), exclude_modules=["idle"])
    assert list(found) == [
        name for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]
    wrapper = nn.Module()
    wrapper._orig_mod = net()
    with torch.no_grad():
        wrapped = lorafast.estimate_gradients(
            wrapper, BATCHES, lambda model, ids: loss_of(model._orig_mod, ids), ["first"]
        )
    assert wrapped.keys() == {"first"}
    assert torch.equal(wrapped["first"], found["first"])


def test_sums_are_wide_and_on_the_cpu():
    narrow, wide = (
        lorafast.estimate_gradients(net(dtype), BATCHES, loss_of)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for name, G in narrow.items():
        assert G.dtype == torch.float32
        torch.testing.assert_close(
            G.double(), wide[name], rtol=0.1, atol=0.1 * float(wide[name].abs().max())
        )


def test_a_sparse_table_and_a_checkpointed_block():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(9, 5, sparse=True), nn.Linear(5, 5)

        def forward(self, ids):
            x = self.table(ids).requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.out, x, use_reentrant=True).tanh()

    model = Sparse().double()
    found = lorafast.estimate_gradients(model, [torch.tensor([1, 1, 3])], loss_of, ["table", "out"])
    loss_of(model, torch.tensor([1, 1, 3])).backward()
    torch.testing.assert_close(found["table"], model.table.weight.grad.to_dense().t())
    torch.testing.assert_close(found["out"], model.out.weight.grad)


def test_one_gradient_lives_at_a_time():
    model, alive = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))), []
    weights = [block[0].weight for block in model]
    for block in model:
        block[1].register_full_backward_hook(
            lambda *_: alive.append(sum(one.grad is not None for one in weights))
        )
    lorafast.estimate_gradients(model, [torch.randn(3, 4), torch.randn(3, 4)], loss_of)
    assert alive == [0] * 10
    assert all(one.grad is None for one in model.parameters())


class Broken(Exception):
    pass


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_given_back(training, fails):
    model = net()
    model.twice.train()
    model.table.weight.requires_grad_(False)
    loss_of(model, BATCHES[0]).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    flags, modes = (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    state, values = copy.deepcopy(model.state_dict()), copy.deepcopy(grads)
    calls, seen = [], []

    def loss(model, ids):
        calls.append(ids)
        if fails and len(calls) == 2:
            raise Broken
        torch.rand(1)
        seen.append(
            (
                [m.training for m in model.modules()],
                [n for n, p in model.named_parameters() if p.requires_grad],
            )
        )
        return loss_of(model, ids)

    generator = torch.get_rng_state()
    try:
        lorafast.estimate_gradients(model, BATCHES, loss, ["twice", "table"], training=training)
    except Broken:
        assert fails
    assert len(calls) == (2 if fails else 3)
    assert all(one == ([training] * len(modes), ["table.weight", "twice.weight"]) for one in seen)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
        assert not parameter._post_accumulate_grad_hooks


def tied(model):
    model.idle.weight = model.twice.weight


def hooked(model):
    model.first.weight.register_post_accumulate_grad_hook(lambda weight: weight.data.zero_())


def meta(model):
    model.twice.to("meta")


def pole(model):
    nn.init.constant_(model.twice.weight, float("nan"))


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (tied, {}, ValueError, r"twice\.weight and idle\.weight are one tensor"),
        (hooked, {}, ValueError, r"first\.weight \(7, 7\) has hooks"),
        (meta, {}, ValueError, r"twice\.weight \(7, 7\) is on the meta device"),
        (pole, {}, ValueError, r"the gradient of .*twice.* is not finite"),
        (None, {"batches": []}, ValueError, "batches is empty"),
        (
            None,
            {"target_modules": ["frist"]},
            ValueError,
            "'frist' matches no module; near it: first",
        ),
        (None, {"target_modules": ["norm"]}, TypeError, "matches norm, which is a"),
        (
            None,
            {"target_modules": ["idle"]},
            ValueError,
            r"depends on no weight of target_modules=\['idle'\]",
        ),
        (
            None,
            {"loss_fn": lambda model, ids: model(ids)},
            ValueError,
            r"must give a scalar tensor, not a tensor \(4, 7\)",
        ),
        (
            None,
            {"loss_fn": lambda model, ids: loss_of(model, ids).item()},
            ValueError,
            "not a float",
        ),
        (
            None,
            {"loss_fn": lambda model, ids: loss_of(model, ids).detach()},
            ValueError,
            "detached, in torch",
        ),
        (None, {"model": [1]}, TypeError, "model must be a torch.nn.Module, not list"),
        (
            None,
            {"model": lorafast.adapt(nn.Sequential(nn.Linear(3, 3)), LoRA(r=1))},
            ValueError,
            "is adapted already: 0",
        ),
    ],
)
def test_refusals(spoil, options, error, message):
    model = net()
    if spoil:
        spoil(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        lorafast.estimate_gradients(
            **{"model": model, "batches": BATCHES, "loss_fn": loss_of} | options
        )
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
