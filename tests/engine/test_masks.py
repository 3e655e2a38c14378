"""Which way plain torch drops: by a kernel that may serve, or by a mask, made once a backward."""

import pytest
import torch

from lorafast import testing
from lorafast.engine import masks, philox, row_blocks, trial
from lorafast.engine.backends import eager
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm
from lorafast.engine.trial import Form, Verdict

SEED = torch.tensor([2**63 - 3])
GPU = torch.device("cuda")


def test_the_kernel_serves_where_a_trial_has_shown_it_right(monkeypatch):
    monkeypatch.delenv("LORAFAST_BACKEND", raising=False)
    known = {"streams": Verdict({str(Form("drop", torch.bfloat16)): ""}, reason="is wrong")}
    with trial.assuming(known):
        assert masks.kernel_serves(GPU, torch.bfloat16)
        assert masks.kernel_serves(torch.device("xpu"), torch.bfloat16)
        assert not masks.kernel_serves(GPU, torch.float16)
        assert not masks.kernel_serves(GPU, torch.float64)
        assert not masks.kernel_serves(torch.device("cpu"), torch.bfloat16)
        assert not masks.kernel_serves(torch.device("mps"), torch.bfloat16)
        monkeypatch.setenv("LORAFAST_BACKEND", "eager")
        assert not masks.kernel_serves(GPU, torch.bfloat16)
        monkeypatch.setenv("LORAFAST_BACKEND", "triton")
        assert masks.kernel_serves(GPU, torch.float16)
        assert not masks.kernel_serves(GPU, torch.float64)


def test_without_triton_torch_serves(monkeypatch):
    monkeypatch.setattr(masks, "kernel_serves", lambda device, dtype: True)
    monkeypatch.setattr(masks, "_load", lambda: None)
    x = torch.randn(3, 10)
    assert torch.equal(masks.drop(x, SEED, 0.5), philox.drop(x, SEED, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [1 << 19, 170])
def test_the_kernel_drops_what_the_mask_drops(dtype, block, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(row_blocks, "CPU_ELEMENTS", block)
    M, K, N, p = 37, 83, 5, 0.5
    x, dy = torch.randn(2, M, K + 2)[..., 1:-1].to(dtype).unbind()
    # Small whole numbers: no sum is rounded, in whatever order it is computed.
    A, v = torch.randint(-2, 3, (4, K)).to(dtype), torch.randint(-2, 3, (M, 4)).to(dtype)
    base = BaseTerm(torch.zeros(M, N, dtype=dtype), torch.zeros(N, K, dtype=dtype))
    term = LowRankTerm(v, A, SEED, p, masks.shared(M, K))
    other = LowRankTerm(v, A, SEED - 1, p)

    def found():
        return (
            masks.drop(x.view(1, M, K), SEED, p),
            eager.project(x, [DownProj(A, None, SEED, p)])[0][0],
            eager.grad_project(dy, [term, other])[1],
            eager.grad_input([base], [term, other]),
        )

    want = found()
    assert (want[3] == 0).sum() > M * K / 4
    # In the interpreter, by which Triton runs on CPU tensors.
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    monkeypatch.setattr(philox, "keep_mask", None)
    assert masks.kernel_serves(x.device, dtype)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found(), want, strict=True))


@pytest.mark.parametrize("name", ["lora", "lamda", "dora-output", "dora-in"])
@pytest.mark.usefixtures("few_tokens_by_op")
def test_a_backward_makes_its_mask_once_where_that_is_small(name, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    form = next(form for form in testing.FORMS if form.name == name)
    case = testing.Case(form, 12, 16, 24, 4, torch.float32, dropout=0.3)
    tensors, made = testing.make(case), []
    of_philox = philox.keep_mask
    monkeypatch.setattr(
        philox, "keep_mask", lambda *asked: made.append(asked[2]) or of_philox(*asked)
    )
    once = testing.run(testing.ours, case, tensors)
    assert made == [slice(0, 12)] * 2
    monkeypatch.setattr(row_blocks, "ELEMENTS", 12 * 24 - 1)
    thrice = testing.run(testing.ours, case, tensors)
    assert len(made) == 2 + 3
    assert all(torch.equal(once[key], thrice[key]) for key in once if once[key] is not None)


def test_a_mask_of_the_whole_activation_is_read_by_rows(monkeypatch):
    monkeypatch.setattr(row_blocks, "CPU_ELEMENTS", 3 * 10)
    x, v, A = torch.randn(11, 10), torch.randn(11, 2), torch.randn(2, 10)
    alone, shared = LowRankTerm(v, A, SEED, 0.4), masks.shared(11, 10)
    together = alone._replace(shared=shared)
    assert torch.equal(eager.grad_project(x, [alone])[0], eager.grad_project(x, [together])[0])
    assert torch.equal(shared.mask, philox.keep_mask(SEED, 0.4, slice(0, 11), 10))
    base = BaseTerm(torch.randn(11, 3), torch.randn(3, 10))
    assert torch.equal(eager.grad_input([base], [alone]), eager.grad_input([base], [together]))
