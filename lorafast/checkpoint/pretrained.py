"""save_pretrained of an adapted transformers model: its adapter, or all of it merged.

transformers' own would write base weights beside keys of adapters that from_pretrained drops; and
of a base that quantize_base made, numbers in few bits that it takes for weights.
Imports no transformers.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafast.checkpoint import files, keys, trainer_files
from lorafast.checkpoint.file_format import MixtureError
from lorafast.checkpoint.save_load import file_content, warn_about_base, warn_about_peft
from lorafast.models import adapt_record, observers
from lorafast.models.instance_methods import (
    adapted_transformers,
    replace_method,
    restore_method,
)
from lorafast.models.merge import merged_copies
from lorafast.models.module_names import (
    adapter_layers,
    canonical_name,
    format_names,
    is_pretrained_model,
)
from lorafast.quantised import formats
from lorafast.runtime.torch_internals import storage_key

# The folders from which Trainer resumes.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_METHOD = "save_pretrained"
# Attribute of a transformers model that quantize_base was given.
_QUANTISED = "_lorafast_quantised"
# Models whose user knows that their checkpoints hold no adapter file.
_told_mixtures: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _attach(model: nn.Module) -> None:
    """Let every transformers model in it that has adapters save them."""
    for module in adapted_transformers(model):
        replace_method(module, _METHOD, _save_pretrained)
        trainer_files.register_hooks(module)


def _mark_quantised(model: nn.Module) -> None:
    """Let every transformers model in it refuse to save layers that quantize_base quantises."""
    for module in model.modules():
        if is_pretrained_model(module):
            vars(module)[_QUANTISED] = True
            replace_method(module, _METHOD, _save_pretrained)


def _quantised_layer(model: nn.Module) -> str | None:
    """Return the name of a layer in few bits of a model that quantize_base was given, or None."""
    if _QUANTISED not in vars(model):
        return None
    named = model.named_modules()
    return next((canonical_name(name) for name, part in named if formats.of(part)), None)


def _detach(model: nn.Module) -> None:
    """Undo _attach, except where a quantised base still refuses to be saved."""
    for module in model.modules():
        trainer_files.remove_hooks(module)
        if _quantised_layer(module) is not None:
            continue
        vars(module).pop(_QUANTISED, None)
        restore_method(module, _METHOD, _save_pretrained)


observers.on_adapted.append(_attach)
observers.on_quantised.append(_mark_quantised)
observers.on_plain.append(_detach)


def _save_pretrained(
    model: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    *,
    merged: bool = False,
    **kwargs: Any,
) -> None:
    """Save the adapter as lorafast.save_adapter does, or the whole model with merged weights.

    A model that has no adapter any more is saved as transformers saves it. One that quantize_base
    quantised is refused as a whole, except in a folder from which Trainer resumes.

    Args:
        model: a transformers model.
        save_directory: folder, created if need be.
        is_main_process: False writes nothing.
        state_dict: a state dict of the whole model, from which the adapter's values are then read.
        push_to_hub: upload the adapter too, to kwargs["repo_id"] or the name of the folder.
        merged: write plain merged weights, which from_pretrained loads without lorafast. The model
            stays as it is. A weight that is tied to an adapted one gets its own tensor in the file,
            and tie_word_embeddings is False in the config there.
        kwargs: transformers' arguments. How weights are split into files, and their format, matter
            with merged=True alone: an adapter is one safetensors file.

    Raises:
        ValueError: the state dict lacks a tensor, cannot be merged or distributed, the folder
            holds an adapter that would be added to merged weights, or quantize_base quantised what
            is to be saved as a whole.
    """
    own = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
    adapted = bool(adapter_layers(model, required=False))
    if merged or not adapted:
        _refuse_quantised(model, Path(save_directory))
    if not adapted:
        type(model).save_pretrained(model, save_directory, **own, **kwargs)
    elif merged:
        _save_merged(model, Path(save_directory), own | kwargs)
    else:
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint=True: an adapter is one file; leave it out, or save the "
                "whole model with merged=True"
            )
        _save_adapter(model, Path(save_directory), is_main_process, state_dict)
        if push_to_hub and is_main_process:
            _upload(Path(save_directory), **kwargs)


def _refuse_quantised(model: nn.Module, folder: Path) -> None:
    name = _quantised_layer(model)
    if name is not None and not _TRAINER_FOLDER.fullmatch(folder.name):
        raise ValueError(
            f"{name} was quantised by lorafast.quantize_base, of which from_pretrained knows "
            "nothing: it would take the numbers in few bits for weights. Save the adapter, keep "
            "the dense checkpoint and quantise it again; or merge the adapter by "
            "lorafast.merge_quantised(model, 'dequantise') and save that; or keep the model by "
            "torch.save"
        )


def _save_adapter(
    model: nn.Module,
    folder: Path,
    is_main_process: bool,
    state_dict: dict[str, torch.Tensor] | None,
) -> None:
    if state_dict is not None and not state_dict:
        # What Trainer passes where DeepSpeed does not gather the weights of ZeRO-3.
        warnings.warn(
            f"state_dict is empty: no adapter is written into {os.fspath(folder)!r}", stacklevel=4
        )
        return
    adapt_record.warn_about_lost(model)
    resumes = _TRAINER_FOLDER.fullmatch(folder.name)
    try:
        content = file_content(model, state_dict)
    except MixtureError as error:
        if not resumes:
            raise ValueError(f"{error}; save the whole model with merged=True") from error
        if is_main_process:
            _write_mixture(model, folder, state_dict, error)
        return
    if not is_main_process:
        return
    warn_about_peft(model, content.config, stacklevel=5)
    files.write_adapter(folder, *content)
    if resumes:
        trainer_files.write_weights(model, folder, state_dict)
    else:
        warn_about_base(model, folder, content.config, stacklevel=4)
        _warn_about_left_out(model)


def _write_mixture(
    model: nn.Module,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None,
    error: MixtureError,
) -> None:
    """Write what Trainer resumes a mixture of adapters from, and warn of it once for a model."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer_files.write_weights(model, folder, state_dict)
    if model not in _told_mixtures:
        _told_mixtures.add(model)
        warnings.warn(
            f"the checkpoints hold no adapter file, but Trainer resumes from them: {error}. Save "
            "the trained model with save_pretrained(folder, merged=True)",
            stacklevel=4,
        )


def _warn_about_left_out(model: nn.Module) -> None:
    """Warn about weights that train beside the adapter and are not in its file."""
    if names := keys.left_out(model):
        warnings.warn(
            "weights that train are no part of the adapter, and not in its file: "
            f"{format_names(names)}. Name their modules in adapt's modules_to_save=, or save the "
            "whole model with merged=True",
            stacklevel=4,
        )


def _save_merged(model: Any, folder: Path, arguments: dict[str, Any]) -> None:
    if arguments["state_dict"] is not None:
        raise ValueError("merged=True merges the model's own weights: leave state_dict out")
    if (folder / files.CONFIG).exists():
        raise ValueError(
            f"{os.fspath(folder)!r} holds an adapter, which from_pretrained would add to the "
            "merged weights once more: choose another folder"
        )
    with merged_copies(model) as tied:
        if not tied:
            type(model).save_pretrained(model, folder, **arguments)
            return
        arguments["state_dict"] = _without_aliases(model.state_dict())
        with _untied(model.config):
            type(model).save_pretrained(model, folder, **arguments)


def _without_aliases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with copies of those that share storage with an earlier one."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        key = storage_key(tensor)
        result[name] = tensor.clone() if key in seen else tensor
        seen.add(key)
    return result


@contextlib.contextmanager
def _untied(config: Any) -> Iterator[None]:
    """A context in which a model's config says that no weight is tied."""
    parts = [config, config.get_text_config()]
    tied = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    try:
        for part in tied:
            part.tie_word_embeddings = False
        yield
    finally:
        for part in tied:
            part.tie_word_embeddings = True


def _upload(
    folder: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    **_: Any,
) -> None:
    """Upload a folder's adapter to the hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or folder.name, exist_ok=True, private=private)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        allow_patterns=[files.CONFIG, files.WEIGHTS],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
