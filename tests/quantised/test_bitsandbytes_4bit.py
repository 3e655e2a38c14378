"""Weights of bitsandbytes' Linear4bit: the bits of its own dequantisation, in every state."""

import copy
import io
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.rotations import rotating, thinned
from torch import nn

import lorafast
from lorafast.quantised import formats

bnb = pytest.importorskip("bitsandbytes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, K): blocks that end inside rows, an odd K, a short last block, rows of whole blocks.
SHAPES = ((37, 130), (5, 63), (64, 256), (33, 7), (1, 9), (40, 96))


def linear4bit(N, K, quant_type="nf4", blocksize=64, nested=True, dtype=torch.float32, **options):
    """A quantised layer without bias."""
    generator = torch.Generator().manual_seed(N * 1000 + K)
    module = bnb.nn.Linear4bit(
        K, N, bias=False, quant_type=quant_type, compress_statistics=nested, **options
    )
    module.weight.data = torch.randn(N, K, generator=generator).to(dtype)
    module.weight.blocksize = blocksize
    return module.to("cpu")


def dequantised(module):
    """bitsandbytes' own W, by its formula in torch.

    Its kernel for AVX512 differs where K is a multiple of 16 and not of the blocksize.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = module.weight.quant_state
    absmax = dequantised_absmax(state)
    packed = module.weight.data.reshape(-1).view(torch.uint8)
    compute = _dequantize_4bit_compute.__wrapped__
    return compute(packed, absmax, state.code, state.blocksize, state.shape, state.dtype)


def dequantised_absmax(state):
    """absmax in fp32."""
    if not state.nested:
        return state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def whole(module, dtype=torch.float32):
    """W as lorafast reads it."""
    weight = formats.of(module)
    assert weight.why_not() is None
    return weight.whole(torch.empty(weight.shape, dtype=dtype))


CASES = rotating(
    [(q, n, b) for q in ("nf4", "fp4") for n in (True, False) for b in (32, 64, 128, 2048)],
    [(shape, dtype) for dtype in DTYPES for shape in SHAPES],
    count=5,
    step=4,
)


@pytest.mark.parametrize(("how", "what"), thinned(CASES, kept=3))
def test_the_bits_are_those_of_bitsandbytes(how, what):
    (quant_type, nested, blocksize), (shape, dtype) = how, what
    module = linear4bit(*shape, quant_type, blocksize, nested, dtype)
    right = dequantised(module)
    assert right.dtype == dtype
    for asked in DTYPES:
        assert torch.equal(whole(module, asked), right.to(asked))
    weight = formats.of(module)
    for start in range(0, shape[0], 3):
        for stop in {start + 1, min(start + 5, shape[0]), shape[0]}:
            rows = weight.rows(start, stop, dtype)
            assert torch.equal(rows, right[start:stop])
            assert rows.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_own_kernel_gives_the_same(dtype):
    module = linear4bit(48, 256, dtype=dtype)
    right = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert torch.equal(whole(module, dtype), right)


def test_many_row_blocks_are_one_weight(monkeypatch):
    module = linear4bit(37, 130)
    right = whole(module)
    monkeypatch.setattr("lorafast.engine.row_blocks.CPU_ELEMENTS", 390)
    assert torch.equal(whole(module), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_its_kernel_writes_the_whole(monkeypatch, dtype):
    module = linear4bit(48, 256, dtype=torch.bfloat16)
    weight, calls = formats.of(module), []

    def dequantize_4bit(packed, state, out):
        calls.append((packed.data_ptr(), state, out))

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", dequantize_4bit)
    monkeypatch.setattr(formats.BitsAndBytes4Bit.__mro__[1], "whole", lambda self, out: "by rows")
    # Of a GPU's tensor it reads the device and the dtype alone.
    out = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    right = (module.weight.data_ptr(), module.weight.quant_state, out)
    assert weight.whole(out) is (out if dtype == torch.bfloat16 else "by rows")
    assert calls == [right] * (dtype == torch.bfloat16)
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    assert weight.whole(out) == "by rows"
    monkeypatch.delenv("LORAFAST_BACKEND")
    # As unpacking leaves it, bitsandbytes reads the wrong numbers.
    module.weight.quant_state.absmax = torch.ones(4, 48)
    assert weight.whole(out) == "by rows"


def _pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _loaded(module):
    """As transformers loads: the weight from its packed bytes and the statistics beside them."""
    state = dict(module.state_dict())
    fresh = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, device="meta")
    fresh.weight = bnb.nn.Params4bit.from_prequantized(
        data=state.pop("weight"),
        quantized_stats={key.removeprefix("weight."): value for key, value in state.items()},
        device="cpu",
        module=fresh,
    )
    return fresh


def _without_the_weights_state(module):
    """As FSDP leaves it."""
    module.weight = nn.Parameter(module.weight.data, requires_grad=False)
    return module


MOVES = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "state_dict": _loaded,
    "fsdp": _without_the_weights_state,
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_the_weight_stays_itself(move, nested):
    module = linear4bit(37, 130, nested=nested)
    right = whole(module)
    assert torch.equal(whole(MOVES[move](module)), right)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_bytes_may_be_stored_as_floats(storage):
    module = linear4bit(16, 64, quant_storage=storage)
    assert module.weight.dtype == storage
    assert torch.equal(whole(module), whole(linear4bit(16, 64)))
    module.to(torch.float16)
    assert "destroys" in formats.of(module).why_not()


@pytest.fixture
def packing():
    """bitsandbytes' packing for CPUs, whose inference does it on a CPU with AVX512-BF16."""

    def pack(module):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        weight = module.weight
        weight.data, state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        assert state.packing_format_for_cpu
        return module

    return pack


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_packed_for_cpus_is_read(packing, nested, dtype):
    module = linear4bit(96, 128, nested=nested, dtype=dtype)
    weight = formats.of(module)
    state, packed = module.weight.quant_state, module.weight.data.view(-1)
    index = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1).long()
    # Packing rounds absmax to bf16, and nothing else.
    rounded = dequantised_absmax(state).bfloat16().float().repeat_interleave(64)
    right = (state.code[index] * rounded).view(96, 128).to(dtype)
    packing(module)
    assert weight.dtype == dtype
    assert torch.equal(whole(module, dtype), right)
    for start, stop in ((0, 1), (31, 33), (15, 17), (5, 96), (64, 96)):
        assert torch.equal(weight.rows(start, stop, dtype), right[start:stop])
    again = copy.deepcopy(module)
    assert torch.equal(whole(again, dtype), right)
    again.state_dict()  # Unpacks it.
    assert not again.weight.quant_state.packing_format_for_cpu
    unpacked = whole(again, dtype)
    if nested:  # It quantises absmax anew.
        assert (unpacked - right).abs().max() <= 0.02 * right.abs().max()
    else:
        assert again.weight.quant_state.absmax.shape == (2, 96)
        assert torch.equal(unpacked, right)


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes packs with AVX512-BF16 alone"
)
def test_inference_packs_the_weight_and_it_is_read():
    module = linear4bit(64, 128).eval()
    before = whole(module)
    with torch.no_grad():
        module(torch.randn(2, 128))
    assert module.weight.quant_state.packing_format_for_cpu
    assert (whole(module) - before).abs().max() <= 2**-8 * before.abs().max()


@pytest.mark.parametrize("shape", [(37, 128), (64, 96)])
def test_packing_that_fails_leaves_the_weight(packing, shape):
    module = linear4bit(*shape)
    before = whole(module)
    # N is no multiple of 32, or K none of the blocksize; it changes the state before it notices.
    with pytest.raises((AssertionError, RuntimeError)):
        packing(module)
    assert torch.equal(whole(module), before)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("packed", [False, True])
def test_requantising_is_quantising_anew(packing, quant_type, nested, packed):
    N, K = (32, 128) if packed else (37, 130)
    module = linear4bit(N, K, quant_type, 32, nested, torch.bfloat16)
    if packed:
        packing(module)
    held = module.weight
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    anew = bnb.nn.Linear4bit(K, N, False, quant_type=quant_type, compress_statistics=nested)
    anew.weight.data, anew.weight.blocksize = W.clone(), 32
    right = whole(anew.to("cpu")).to(torch.bfloat16)
    formats.of(module).requantise(W.double())
    state = module.weight.quant_state
    assert module.weight is held
    assert module.quant_state is state
    assert (state.dtype, state.nested, state.blocksize) == (torch.bfloat16, nested, 32)
    assert torch.equal(whole(module, torch.bfloat16), right)
    module(torch.randn(2, K))


def test_the_dtype_is_that_of_the_layers_products():
    module = linear4bit(8, 64, dtype=torch.bfloat16)
    assert formats.of(module).dtype == torch.bfloat16
    module(torch.randn(2, 64, requires_grad=True))
    assert formats.of(module).dtype == torch.float32


def test_words_of_its_kind():
    kind = "bitsandbytes fp4, single quantisation"
    assert formats.of(linear4bit(8, 64, "fp4", nested=False)).kind == kind
    weight = formats.of(linear4bit(8, 64))
    assert weight.kind == "bitsandbytes nf4, double quantisation"
    assert (weight.shape, weight.device) == ((8, 64), torch.device("cpu"))
    assert formats.of(bnb.nn.LinearNF4(8, 8)).kind == "bitsandbytes nf4, single quantisation"


def _set(path, value):
    """A change of one attribute of a layer, to a value or to what a function makes of the old."""

    def change(module):
        *owners, name = path.split(".")
        owner = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return change


STATE = "weight.quant_state"
FAULTS = {
    "absmax": (_set(f"{STATE}.absmax", lambda t: t[:-1]), "absmax is [75] and should be [76]"),
    "no absmax": (_set(f"{STATE}.absmax", None), "absmax is missing; it should be [76]"),
    "2-D absmax": (
        _set(f"{STATE}.absmax", lambda t: t[:74].view(37, 2)),
        "absmax is [37, 2] and should be [2, 37]",
    ),
    "nested absmax": (
        _set(f"{STATE}.state2.absmax", lambda t: t.repeat(2)),
        "nested absmax is [2] and should be [1]",
    ),
    "nested code": (
        _set(f"{STATE}.state2.code", None),
        "nested code is missing; it should be [256]",
    ),
    "offset": (_set(f"{STATE}.offset", None), "offset of its absmax is missing"),
    "no code": (_set(f"{STATE}.code", None), "code is missing; it should be [16]"),
    "code": (_set(f"{STATE}.code", lambda t: t[:8]), "code is [8] and should be [16]"),
    "bytes": (_set("weight.data", lambda t: t[:-1]), "has 2404 bytes; [37, 130] takes 2405"),
    "N and K": (_set("in_features", 65), "a weight [37, 130], the layer's is [37, 65]"),
    "no shape": (_set(f"{STATE}.shape", None), "quant_state has no shape"),
    "no dtype": (_set(f"{STATE}.dtype", None), "quant_state has no dtype"),
    "no blocksize": (_set(f"{STATE}.blocksize", None), "quant_state has no blocksize"),
    "cpu": (
        _set(f"{STATE}.packing_format_for_cpu", True),
        "packed for CPUs, which [37, 130] cannot be",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupted_state_is_one_reason(fault):
    module = linear4bit(37, 130)
    change, words = FAULTS[fault]
    change(module)
    weight = formats.of(module)
    reason = weight.why_not()
    assert words in reason
    assert "\n" not in reason
    with pytest.raises(NotImplementedError) as raised:
        weight.requantise(torch.zeros(37, 130))
    assert str(raised.value) == reason


def test_a_weight_that_is_not_there_is_one_reason():
    fresh = bnb.nn.Linear4bit(8, 8, bias=False)
    assert "not quantised yet" in formats.of(fresh).why_not()
    assert formats.of(fresh).kind == "bitsandbytes fp4, single quantisation"
    assert "meta device" in formats.of(bnb.nn.Linear4bit(8, 8, device="meta")).why_not()
    lost = linear4bit(8, 64)
    lost.quant_state = lost.weight.quant_state = None
    assert "quant_state is lost" in formats.of(lost).why_not()


def _lost(module):
    module.quant_state = module.weight.quant_state = None


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.float64), _lost])
def test_a_weight_that_is_destroyed_after_adapt_is_an_error_of_the_next_call(storage, cast):
    model = nn.Sequential(linear4bit(16, 64, quant_storage=storage))
    lorafast.adapt(model, lorafast.LoRA(r=2), target_modules=["0"])
    x = torch.randn(3, 64, requires_grad=True)
    y = model(x)
    cast(model[0].base_layer)
    weight = model[0].quantised
    reason = re.escape(weight.why_not())
    assert "destroys" in reason or "lost" in reason
    for read in (
        lambda: model(x),
        lambda: y.sum().backward(),
        lambda: weight.rows(0, 3, torch.float32),
        lambda: weight.dtype,
        lambda: lorafast.merge_quantised(model, "dequantise"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            read()
