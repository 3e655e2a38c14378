"""LoRA-GA, and PiSSA where they are alike: the start in float64, PEFT's, copies, refusals."""

import copy
import pickle

import pytest
import torch
from helpers.gradient_nets import K, N, R, X, gradients_of, loss_of, matrices, net
from torch import nn

import lorafast
from lorafast import DoRA, LoRA, LoRAGA, PiSSA
from lorafast.methods import lora_ga
from lorafast.methods.lora_ga import DIRECTIONS, SCALES


def adapted(**settings):
    """An adapted net, its weights as they were, and their gradients."""
    model = net()
    weights, gradients = matrices(model), gradients_of(model)
    lorafast.adapt(model, LoRA(r=R, alpha=5, rslora=True, init=LoRAGA(gradients, **settings)))
    return model, weights, gradients


def best(G, r):
    """The nearest matrix of rank r."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_first_step_is_the_best_one_of_rank_2r(direction, scale):
    model, _, gradients = adapted(direction=direction, scale=scale)
    loss_of(model, X).backward()
    for name, layer in model.named_children():
        s, A, B = layer.scaling, layer.lora_A.detach(), layer.lora_B.detach()
        c = A.norm(dim=1)[0]
        step = s * (layer.lora_B.grad @ A + B @ layer.lora_A.grad)
        torch.testing.assert_close(
            step, (s * c) ** 2 * best(gradients[name], 2 * R), rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_start_is_exact_and_of_the_right_size(direction, scale):
    model, weights, gradients = adapted(direction=direction, scale=scale, gamma=4)
    torch.testing.assert_close(model(X), net()(X), rtol=1e-12, atol=1e-13)
    for name, layer in model.named_children():
        W, s, A, B = weights[name], layer.scaling, layer.lora_A.detach(), layer.lora_B.detach()
        torch.testing.assert_close(layer._W() + s * B @ A, W, rtol=1e-13, atol=1e-13)
        c = {
            "stable": W.shape[0] ** 0.25 / 2, "gd": 1 / s, "unit": 1.0,
            "weightS": float((torch.linalg.svdvals(W)[:R] / s).sqrt().mean()),
        }[scale]  # fmt: skip
        for found in (A @ A.t(), B.t() @ B):
            torch.testing.assert_close(
                found, c**2 * torch.eye(R, dtype=W.dtype), rtol=1e-12, atol=1e-12
            )
        U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        taken = [(A @ Vh[: 2 * R].t()).abs().amax(0) / c, (U[:, : 2 * R].t() @ B).abs().amax(1) / c]
        ours, theirs = ([i for i in range(2 * R) if one[i] > 0.5] for one in taken)
        assert sorted(ours + theirs) == list(range(2 * R))
        want = {"ArB2r": [0, 1, 2], "A2rBr": [3, 4, 5], "ArBr": [1, 3, 5]}
        assert direction == "random" or ours == want[direction]


def test_norm_clip_keeps_what_is_taken_out_below_the_weight():
    plain, (model, weights, _) = adapted(gamma=1e-3)[0], adapted(gamma=1e-3, norm_clip=True)
    for name, layer in model.named_children():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        torch.testing.assert_close(layer.scaling * (B @ A).abs().max(), weights[name].abs().max())
        unclipped = getattr(plain, name).lora_A.detach()
        torch.testing.assert_close(A / A.norm(), unclipped / unclipped.norm())
        torch.testing.assert_close(A.norm(dim=1)[:1], B.norm(dim=0)[:1])
    small, same = adapted(gamma=1e6)[0], adapted(gamma=1e6, norm_clip=True)[0]
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True)
    )


@pytest.mark.parametrize("start", ["pissa", "lora-ga"])
@pytest.mark.parametrize(("axis", "dim"), [("out", 1), ("in", 0)])
def test_dora_measures_the_weight_as_it_was(start, axis, dim):
    model = net()
    weights, init = matrices(model), PiSSA() if start == "pissa" else LoRAGA(gradients_of(model))
    lorafast.adapt(model, DoRA(r=R, axis=axis, init=init))
    torch.testing.assert_close(model(X), net()(X), rtol=1e-12, atol=1e-13)
    for name, layer in model.named_children():
        torch.testing.assert_close(
            layer.magnitude.detach(), weights[name].norm(dim=dim), rtol=1e-12, atol=0
        )


THEIRS = {"stable": "stable", "gd": "gd_scale", "unit": "unit", "weightS": "weight_svd"}


@pytest.mark.peft
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_compat_is_pefts(direction, scale):
    peft = pytest.importorskip("peft")
    loraga = pytest.importorskip("peft.tuners.lora.loraga")
    targets = ["up", "down"] if scale == "stable" else ["up", "down", "mixed"]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=THEIRS[scale], stable_gamma=9),
    )  # fmt: skip
    theirs, ours, x = net(torch.float32), net(torch.float32), X.float()
    want = theirs(x).detach()
    gradients = gradients_of(ours, target_modules=targets)
    loraga.preprocess_loraga(theirs, config, lambda: loss_of(theirs, x).backward())
    for name in targets:
        G = getattr(theirs, name)._peft_loraga_grad
        torch.testing.assert_close(gradients[name], G.t() if name == "mixed" else G)
    theirs = peft.get_peft_model(theirs, config).base_model.model
    adapter = LoRA(r=3, alpha=6, init=LoRAGA(gradients, direction, scale, gamma=9, compat="peft"))
    lorafast.adapt(ours, adapter, targets)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    for name in targets:
        one, other = getattr(ours, name), getattr(theirs, name)
        A, B = (part["default"].weight.detach() for part in (other.lora_A, other.lora_B))
        # The sign of a pair of singular vectors is anybody's; A and B share no pair.
        signs, turns = (
            (a * b).sum(dim).sign() for a, b, dim in ((one.lora_A, A, 1), (one.lora_B, B, 0))
        )
        torch.testing.assert_close(one.lora_A, signs[:, None] * A, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            one.lora_B, turns * B, rtol=1e-3, atol=1e-5 * float(B.abs().max())
        )


def test_pefts_random_takes_the_same_triplets_for_both():
    model, weights, gradients = adapted(direction="random", scale="unit", compat="peft")
    for name, layer in model.named_children():
        U, S, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        taken = (layer.lora_A.detach() @ Vh.t()).abs() > 0.5
        torch.testing.assert_close((layer.lora_B.detach().t() @ U).abs(), taken * S)
        torch.testing.assert_close(
            layer._W() + layer.scaling * layer.lora_B @ layer.lora_A, weights[name]
        )


@pytest.mark.parametrize(
    "init",
    [LoRAGA(direction="random"), LoRAGA(compat="peft", direction="A2rBr", scale="weightS")],
    ids=str,
)
def test_a_layer_keeps_what_it_needs_and_starts_anew_alike(init):
    model = net()
    mapping = gradients_of(model)
    asked = LoRA(r=R, init=LoRAGA(mapping, **init.settings()))
    lorafast.adapt(model, asked, seed=3)
    again = lorafast.adapt(net(), asked, seed=3)
    for name, layer in model.named_children():
        assert layer.adapter == asked
        assert layer.adapter.init.gradients is None
        assert sum(tensor.numel() for tensor in layer.adapter.init.layer_factors) == R * (
            sum(layer._W().shape) + 1
        )
        first, weight = copy.deepcopy(dict(layer.named_parameters())), layer.weight.detach().clone()
        assert all(
            torch.equal(value, first[key]) for key, value in getattr(again, name).named_parameters()
        )
        nn.init.normal_(layer.lora_A)
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for one in (layer, copied, pickled):
            one.reset_adapter()
            assert torch.equal(one.lora_A, first["lora_A"])
            # A scale of the weight's is of one that was given back to within a rounding.
            torch.testing.assert_close(
                one.lora_B, first["lora_B"], rtol=1e-12 if init.scale == "weightS" else 0, atol=0
            )
            torch.testing.assert_close(one.weight, weight, rtol=1e-13, atol=1e-14)
    assert asked.init.gradients is mapping


def test_the_spec_is_a_value_without_its_tensors():
    G = torch.randn(6, 8)
    one, other = LoRA(init=LoRAGA(G)), LoRA(init=LoRAGA({"a": G}))
    assert one == other
    assert hash(one) == hash(other)
    assert one != LoRA(init=LoRAGA(G, scale="gd"))
    assert "tensor" not in repr(one)
    assert "LoRAGA(direction='ArB2r', scale='stable', gamma=16" in repr(one)


def test_one_layer_takes_one_tensor():
    linear, G = nn.Linear(K, N), torch.randn(N, K)
    x = X.float()
    want = linear(x)
    with pytest.warns(UserWarning, match="now holds the residual"):
        layer = lorafast.Linear.from_linear(linear, LoRA(r=R, init=LoRAGA(G)))
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    U, _, Vh = torch.linalg.svd(G)
    torch.testing.assert_close(
        (layer.lora_A @ Vh[:R].t()).abs(), N**0.25 / 4 * torch.eye(R), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        (layer.lora_B.t() @ U[:, R : 2 * R]).abs(), N**0.25 / 4 * torch.eye(R), rtol=1e-4, atol=1e-5
    )
    assert layer.adapter.init.gradients is None


def test_a_randomised_svd_is_close_to_the_exact_one():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 20, dtype=torch.float64))[0] for n in (60, 50))
    G = U * 0.5 ** torch.arange(20) @ V.t()
    weight = torch.randn(60, 50, dtype=torch.float64)
    exact, quick = (
        LoRA(r=4, init=LoRAGA(G, svd_niter=niter)).init_tensors(weight) for niter in (0, 8)
    )
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(exact[name].abs(), quick[name].abs(), rtol=0, atol=1e-8)
    exact, quick = (LoRA(r=4, init=PiSSA(niter)).init_tensors(G) for niter in (0, 8))
    torch.testing.assert_close(
        exact["lora_B"] @ exact["lora_A"], quick["lora_B"] @ quick["lora_A"], rtol=0, atol=1e-10
    )


def test_a_run_that_goes_on_from_its_state_is_the_same_to_the_bit():
    def made():
        model = net()
        lorafast.adapt(model, LoRA(r=R, alpha=6, init=LoRAGA(gradients)))
        return model, torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-2)

    def train(model, optimizer, steps):
        for _ in range(steps):
            loss_of(model, X).backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss_of(model, X).detach())

    gradients = gradients_of(net())
    straight, optimizer = made()
    first = float(loss_of(straight, X).detach())
    train(straight, optimizer, 5)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    assert train(straight, optimizer, 20) < 0.5 * first
    resumed, again = made()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, 20)
    assert all(
        torch.equal(value, straight.state_dict()[name])
        for name, value in resumed.state_dict().items()
    )


def test_an_embedding_and_a_model_on_the_meta_device():
    table = nn.Sequential(nn.Embedding(12, 7), nn.Linear(7, 8)).double()
    ids = torch.arange(10)
    gradients = lorafast.estimate_gradients(
        table, [ids], lambda model, ids: model(ids).square().mean(), ["0", "1"]
    )
    assert gradients["0"].shape == (7, 12)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Embedding(12, 7), nn.Linear(7, 8))
    empty = lorafast.adapt(empty.double(), LoRA(r=2, init=LoRAGA(gradients)), ["0", "1"])
    empty.load_state_dict(table.state_dict(), assign=True)
    ours = lorafast.adapt(copy.deepcopy(table), LoRA(r=2, init=LoRAGA(gradients)), ["0", "1"])
    for model in (empty, ours):
        torch.testing.assert_close(model(ids), table(ids), rtol=1e-12, atol=1e-13)
    assert torch.equal(empty[0].lora_A, ours[0].lora_A)


@pytest.mark.parametrize(
    ("spoil", "r", "error", "message"),
    [
        (lambda G: G.pop("mixed"), 2, ValueError, "gradients has none for mixed: estimate them"),
        (
            lambda G: G.update(mixd=G.pop("mixed")),
            2,
            ValueError,
            "gradients has none for mixed; near it: mixd",
        ),
        (
            lambda G: G.update(down=G["down"].t()),
            2,
            ValueError,
            r"gradient of down \(13, 11\) must be \(11, 13\)",
        ),
        (
            lambda G: G.update(down=G["down"][0]),
            2,
            ValueError,
            r"gradient of down \(13,\) must be \[N, K\]",
        ),
        (
            lambda G: G.update(down=[1.0]),
            2,
            TypeError,
            "gradient of down must be a tensor, not list",
        ),
        (
            lambda G: G.update(mixed=G["mixed"] * 0),
            2,
            ValueError,
            r"gradient of mixed \(9, 11\) is 0 .*exclude_modules",
        ),
        (
            lambda G: G.update(mixed=G["mixed"] / 0),
            2,
            ValueError,
            r"gradient of mixed \(9, 11\) is not finite",
        ),
        (
            lambda G: None,
            5,
            ValueError,
            r"mixed: r=5 takes 2r=10 triplets of a gradient \(9, 11\), which has 9",
        ),
        (lambda G: G.clear(), 2, ValueError, "gradients has none for up"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(spoil, r, error, message):
    model = net()
    gradients = gradients_of(model)
    spoil(gradients)
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(error, match=message):
        lorafast.adapt(model, LoRA(r=r, init=LoRAGA(gradients)))
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gradients": [1]}, TypeError, "gradients must be a dict"),
        ({"direction": "ArB3r"}, ValueError, "direction='ArB3r' must be one of 'ArB2r'"),
        ({"scale": "gd_scale"}, ValueError, "scale='gd_scale' must be one of 'stable', 'gd'"),
        ({"gamma": 0}, ValueError, "gamma=0 must be a positive number"),
        ({"gamma": True}, ValueError, "gamma=True"),
        ({"svd_niter": -1}, ValueError, "svd_niter=-1"),
        ({"compat": "PEFT"}, ValueError, "compat='PEFT' must be one of 'peft'"),
        ({"norm_clip": 1}, TypeError, "norm_clip=1 must be True or False"),
        ({"norm_clip": True, "compat": "peft"}, ValueError, "leave compat='peft' out"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        LoRAGA(**settings)


def test_a_tensor_is_for_a_layer_and_a_dict_for_a_model():
    G = torch.randn(N, K, dtype=torch.float64)
    with pytest.raises(
        TypeError, match="gradients is a Tensor, and must be a dict from layer names"
    ):
        lorafast.adapt(net(), LoRA(r=2, init=LoRAGA(G)))
    with pytest.raises(
        TypeError, match="gradients is a dict, and must be the one tensor of a layer by itself"
    ):
        lorafast.Linear.from_linear(net().up, LoRA(r=2, init=LoRAGA({"up": G})))
    with pytest.raises(ValueError, match="has no gradients"):
        lorafast.adapt(net(), LoRA(r=2, init=LoRAGA()))
    with pytest.raises(ValueError, match=r"alpha=0 must be positive for init=LoRAGA"):
        LoRA(alpha=0, init=LoRAGA(G))
    spec = LoRA(r=2, init=LoRAGA(G)).bind_layer("", net().up.weight)
    with pytest.raises(
        ValueError, match=r"made for A \(2, 11\) and B \(13, 2\), not for r=2 and weight \(11, 13\)"
    ):
        spec.init_tensors(net().down.weight)


def test_an_initialization_pickled_by_version_0_1_has_its_vectors():
    init = LoRAGA(torch.randn(N, K)).bind_layer("", torch.randn(N, K), 2)
    state = {"own" if name == "layer_factors" else name: v for name, v in vars(init).items()}
    loaded = LoRAGA.__new__(LoRAGA)
    loaded.__setstate__(state)
    assert loaded == init
    assert loaded.layer_factors is init.layer_factors
    assert lora_ga.Own is type(init.layer_factors)
