"""What serving engines refuse or misread in an adapter's folder, from what is known of their code.

That is vLLM's lora/peft_helper.py, SGLang 0.5.23's lora/lora.py, llama.cpp's
convert_lora_to_gguf.py and PEFT 0.21, as read in November 2026. The folder's config and the header
of its safetensors are read; nothing is unpickled, and no engine is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from lorafast.checkpoint import files, keys
from lorafast.checkpoint.keys import KeyGroups
from lorafast.models import peft_config
from lorafast.models.adapt_spec import match_patterns
from lorafast.models.module_names import format_names

# What an engine does: it says no, it computes something else without a word, or it may do either.
REFUSED, MISREAD, UNSURE = "refused", "misread", "unsure"
# The largest rank that vLLM can be configured for.
_VLLM_MAX_RANK = 512
_EXPORT = "python -m lorafast export DIR --to lora"
# Inits that change the base's weights, which a file is then not for.
_WEIGHT_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


class Finding(NamedTuple):
    """What one engine does with one property of a folder.

    verdict: REFUSED, MISREAD or UNSURE. remedy: what to do about it.
    """

    engine: str
    verdict: str
    what: str
    remedy: str


class Folder(NamedTuple):
    """An adapter's folder as engines see it.

    ranks: the rank of each layer's tensors. scalings: PEFT's scaling of each layer.
    """

    config: dict[str, Any]
    groups: KeyGroups
    ranks: dict[str, int]
    scalings: dict[str, float]

    @property
    def is_lora(self) -> bool:
        """True if PEFT calls it a LoRA."""
        return self.config.get("peft_type") == "LORA"

    @property
    def biases(self) -> list[str]:
        """Layers with lora_bias, and trained biases of the base."""
        own = [name for name, parts in self.groups.layers.items() if "lora_bias" in parts]
        return own + [name for name in self.groups.extra if name.endswith(".bias")]

    @property
    def saved(self) -> list[str]:
        """Tensors of modules to save, and base weights."""
        extra = [name for name in self.groups.extra if not name.endswith(".bias")]
        return extra + list(self.groups.bases)

    @property
    def has_magnitude(self) -> bool:
        """True for DoRA."""
        layers = self.groups.layers.values()
        return bool(self.config.get("use_dora")) or any("lora_magnitude" in one for one in layers)


def check(path: str | os.PathLike, engines: Iterable[str]) -> list[Finding]:
    """Return what the engines would refuse or misread; empty if nothing is known.

    Args:
        path: an adapter's folder.
        engines: some of ENGINES.

    Raises:
        ValueError: the folder's files are malformed, or hold a pickle, which is not opened.
        FileNotFoundError: a folder or a file is missing.

    Example:
        import tempfile, torch, lorafast
        from lorafast.checkpoint import serving

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        lorafast.adapt(model, lorafast.LoRA(r=2, rslora=True))
        with tempfile.TemporaryDirectory() as folder:
            lorafast.save_adapter(model, folder)
            (finding,) = serving.check(folder, ["sglang"])
        assert finding.verdict == "misread"
    """
    with files.open_adapter(files.locate(path)) as file:
        groups = keys.group_keys(file.entries)
        ranks = {
            name: file.entries[parts["lora_A"]].shape[0]
            for name, parts in groups.layers.items()
            if "lora_A" in parts
        }
        folder = Folder(file.config, groups, ranks, _scalings(file.config, ranks))
    return [finding for engine in engines for finding in ENGINES[engine](folder)]


def _scalings(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, float]:
    """Return PEFT's scaling of every layer: alpha/r, or alpha/√r for rsLoRA."""
    pattern = config.get("alpha_pattern") or {}
    keys_of = match_patterns(pattern, ranks, untrusted=True)
    root = math.sqrt if config.get("use_rslora") else float
    alpha = config.get("lora_alpha") or 8
    return {
        name: (pattern[keys_of[name]] if name in keys_of else alpha) / (root(r) or 1.0)
        for name, r in ranks.items()
    }


def _misread_scalings(
    engine: str, folder: Folder, scaling: Callable[[str], float], does: str
) -> Iterator[Finding]:
    """Yield a finding if the engine's scaling of a layer is not PEFT's."""
    if not folder.is_lora:
        return
    wrong = {
        name: scaling(name) / true
        for name, true in folder.scalings.items()
        if true and not math.isclose(scaling(name), true, rel_tol=1e-6)
    }
    if wrong:
        factors = sorted({f"{factor:.3g}" for factor in wrong.values()})
        shown = ", ".join(factors[:4]) + (", …" if len(factors) > 4 else "")
        what = f"{does}: {len(wrong)} of {len(folder.scalings)} layers are scaled by {shown} times"
        yield Finding(engine, MISREAD, f"{what} what they trained with", _EXPORT)


def _common(engine: str, folder: Folder) -> Iterator[Finding]:
    """Yield what vLLM, SGLang and llama.cpp have in common."""
    if not folder.is_lora:
        kind = folder.config.get("peft_type")
        yield Finding(engine, REFUSED, f"peft_type {kind!r}: it serves LoRA alone", _EXPORT)
    if folder.has_magnitude:
        base = f"{_EXPORT} --base BASE, which states its error"
        yield Finding(engine, REFUSED, "DoRA (lora_magnitude_vector)", base)
    init = folder.config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_WEIGHT_CHANGING):
        what = f"init_lora_weights={init!r} changed the base's weights, which it serves unchanged"
        remedy = "save it from PEFT with path_initial_model_for_weight_conversion"
        yield Finding(engine, MISREAD, what, remedy)


def _vllm(folder: Folder) -> Iterator[Finding]:
    yield from _common("vllm", folder)
    config, r = folder.config, folder.config.get("r") or 8
    if folder.biases or config.get("bias", "none") != "none":
        yield Finding("vllm", REFUSED, "biases", "train without them, or serve the merged model")
    if folder.saved or config.get("modules_to_save"):
        what = f"modules_to_save: {format_names(folder.saved or config['modules_to_save'])}"
        yield Finding("vllm", REFUSED, what, "serve the merged model (lorafast.merge)")
    if (most := max(folder.ranks.values(), default=0)) > _VLLM_MAX_RANK:
        what = f"rank {most}: max_lora_rank is at most {_VLLM_MAX_RANK}"
        yield Finding("vllm", REFUSED, what, f"{_EXPORT} --rank {_VLLM_MAX_RANK}")
    root = math.sqrt if config.get("use_rslora") else float
    scaling = (config.get("lora_alpha") or 8) / root(r)
    does = "rank_pattern and alpha_pattern are not read"
    yield from _misread_scalings("vllm", folder, lambda _: scaling, does)
    yield from _experts("vllm", folder)
    if tables := _tables(folder):
        what = f"adapters of the head or an embedding ({format_names(tables)}) are served in part"
        yield Finding("vllm", UNSURE, what, "compare its outputs with PEFT's")


def _sglang(folder: Folder) -> Iterator[Finding]:
    yield from _common("sglang", folder)
    scaling = (folder.config.get("lora_alpha") or 8) / (folder.config.get("r") or 8)
    does = "use_rslora, rank_pattern and alpha_pattern are not read"
    yield from _misread_scalings("sglang", folder, lambda _: scaling, does)
    if folder.config.get("trainable_token_indices"):
        yield Finding("sglang", REFUSED, "added tokens", "serve the merged model (lorafast.merge)")
    if folder.saved or folder.biases:
        what = f"tensors beside the factors: {format_names([*folder.saved, *folder.biases])}"
        yield Finding("sglang", UNSURE, what, "compare its outputs with PEFT's")


def _llama_cpp(folder: Folder) -> Iterator[Finding]:
    yield from _common("llama.cpp", folder)
    if others := [*folder.saved, *folder.biases]:
        what = f"tensors beside the factors: {format_names(others)}"
        yield Finding("llama.cpp", REFUSED, what, "merge, and convert the whole model")
    alpha = folder.config.get("lora_alpha") or 8
    does = "it divides one lora_alpha by the rank of each tensor, without rsLoRA and alpha_pattern"
    yield from _misread_scalings("llama.cpp", folder, lambda name: alpha / folder.ranks[name], does)
    yield from _experts("llama.cpp", folder)


def _peft(folder: Folder) -> Iterator[Finding]:
    kind, init = folder.config.get("peft_type"), folder.config.get("init_lora_weights")
    ours = {
        peft_config.LAMDA: "LaMDA",
        peft_config.OLD_LAMDA: "LaMDA",
        peft_config.DORA_IN: "DoRA with axis='in'",
        peft_config.AFLORA: "AFLoRA",
    }
    if kind in ours:
        remedy = "import lorafast first" if ours[kind] == "LaMDA" else "lorafast.load_adapter"
        yield Finding("peft", REFUSED, f"it has no {ours[kind]}", f"{remedy}, or {_EXPORT}")
    if isinstance(init, str) and init.startswith("pissa_niter"):
        what = f"init_lora_weights={init!r}: it draws another start when it loads"
        remedy = "save it with path_initial_model_for_weight_conversion"
        yield Finding("peft", MISREAD, what, remedy)


def _experts(engine: str, folder: Folder) -> Iterator[Finding]:
    if folder.config.get("target_parameters"):
        what = "fused experts (target_parameters): flags must say how they are stored"
        yield Finding(engine, UNSURE, what, "compare its outputs with PEFT's")


def _tables(folder: Folder) -> list[str]:
    """Return the names of adapted heads and embeddings."""
    return [
        name
        for name, parts in folder.groups.layers.items()
        if "embedding" in parts.get("lora_A", "") or name.rpartition(".")[2] == "lm_head"
    ]


ENGINES: dict[str, Callable[[Folder], Iterator[Finding]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "peft": _peft,
}
