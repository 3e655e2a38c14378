"""lorafast.adapt: give a model's linears and embeddings adapters, in place, and freeze the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorafast.methods.adapter import Adapter
from lorafast.models import (
    adapt_record,
    adapt_warnings,
    extra_trainables,
    fused_mlp,
    observers,
    peft_config,
    task_heads,
)
from lorafast.models.adapt_spec import (
    ALL_LINEAR,
    TASK_TYPE_ATTRIBUTE,
    AdaptSpec,
)
from lorafast.models.module_names import adapter_layers, canonical_name, require_module
from lorafast.models.target_modules import (
    Targets,
    find_targets,
    layer_class_for,
    parameter_owners,
    select_names,
    uncalled_linears,
)
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import ExpertParameter, ParameterExperts
from lorafast.nn.experts import why_not_adapter
from lorafast.quantised import formats
from lorafast.runtime.torch_internals import share_call_hooks, storage_key

# Gives an adapted layer its values. Called with the layer's name in the model and the layer.
SetValues = Callable[[str, AdapterLayer], None]


def adapt(
    model: nn.Module,
    adapter: Adapter,
    target_modules: str | Collection[str] | None = "all-linear",
    *,
    target_parameters: Collection[str] = (),
    exclude_modules: str | Collection[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_pattern: Mapping[str, Adapter] | None = None,
    modules_to_save: Collection[str] = (),
    task_type: str | None = None,
    bias: str = "none",
    seed: int | None = None,
    adapter_dtype: torch.dtype | None = None,
    fuse_mlp: bool = False,
) -> nn.Module:
    """Put an adapter on every targeted module, in place, freeze the rest, and return the model.

    Weights and biases stay the same Parameters. A module used in several places is replaced in all
    of them. Adapters are initialised in module order, those of experts last. All checks run before
    the first change; if an init fails midway, weights it has changed are restored to within one
    rounding.

    Args:
        model: any module that is not adapted yet; adapt before wrapping it in DDP.
        adapter: an adapter such as lorafast.LoRA(r=8), or a PEFT LoraConfig or VeraConfig, which
            then sets everything except seed and adapter_dtype.
        target_modules: "all-linear" (every nn.Linear, quantised linear and transformers Conv1D
            except the output head), a regular expression that matches whole names, or a list of
            names, each a whole name or its end after a dot. nn.Embedding can be named too. None
            adapts target_parameters alone.
        target_parameters: names of weights [E,N,K] of transformers' experts, each a whole name or
            its end after a dot, such as "mlp.experts.gate_up_proj" (docs/experts.md).
        exclude_modules: a regular expression or names, as above, of modules to leave out.
        rank_pattern: {regular expression: r} for layers whose name, or its end after a dot,
            matches.
        alpha_pattern: {regular expression: alpha}, likewise.
        adapter_pattern: {regular expression: another adapter}, likewise. An adapter file holds one
            method, or DoRA beside DoRA(magnitude_only=True); other mixtures only train.
        modules_to_save: names of modules that train as a whole and are saved with the adapter.
            None may be quantised.
        task_type: PEFT's word for what the model does. "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS"
            add the model's head to modules_to_save; "CAUSAL_LM", "SEQ_2_SEQ_LM" and
            "FEATURE_EXTRACTION" are only written into the adapter's config. Without it, a head that
            is newly initialised gives a warning.
        bias: "none", "all" or "lora_only" (those of adapted layers): which biases train.
        seed: seed of a separate random generator for the inits; None uses torch's generators.
        adapter_dtype: dtype of the factors; None is fp32 on a bf16 or fp16 weight, else the
            weight's dtype.
        fuse_mlp: True lets gated MLPs, down(act(gate(x)) * up(x)), keep the outputs of gate and up
            for backward, and compute down's input, their widest activation, again of them. The
            numbers are the same; lorafast.ungroup undoes it.

    Returns:
        The same model object.

    Raises:
        ValueError: a name or pattern matches nothing, task_type is unknown or its head not found, a
            weight that an init would change is quantised or tied to another, or the model is
            adapted already or inside DistributedDataParallel.
        TypeError: a match is no plain nn.Linear, Conv1D or nn.Embedding, is quantised in an unknown
            format or damaged there, or has a patched forward (offloading); or a match of
            target_parameters is no projection of experts that transformers' registry serves. Hooks
            of its call move to the adapted layer.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        lorafast.adapt(model, lorafast.LoRA(r=4, alpha=8), target_modules=["1"])
        model(torch.randn(8, 16)).sum().backward()
        assert model[1].lora_B.grad is not None and model[0].weight.grad is None
    """
    require_module(model)
    arguments = {
        "target_modules": () if target_modules is None else target_modules,
        "target_parameters": target_parameters,
        "exclude_modules": exclude_modules,
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "adapter_pattern": adapter_pattern or {},
        "modules_to_save": modules_to_save,
        "task_type": task_heads.check_task_type(task_type),
        "bias": bias,
    }
    spec, inference_mode = _spec_of(model, adapter, arguments)
    refuse_parallel(model)
    targets = find_targets(model, spec)
    if spec.targets_all_linear:
        adapt_warnings.warn_about_untargeted(model, targets.values())
        adapt_warnings.warn_about_uncalled(uncalled_linears(model, spec, select_names(model, spec)))
    with temporary_seed(seed, model):
        install(model, spec, targets, adapter_dtype)
    if inference_mode:
        set_trainable(model, False)
    task_heads.warn_about_unsaved(model)
    if fuse_mlp:
        fused_mlp.fuse_mlps(model)
    return model


def _spec_of(
    model: nn.Module, adapter: Adapter, arguments: dict[str, Any]
) -> tuple[AdaptSpec, bool]:
    """Return the spec of adapt's arguments, and whether a PEFT config asks for inference mode."""
    if not peft_config.is_peft_config(adapter):
        return with_heads(model, AdaptSpec(adapter, **arguments)), False
    defaults = {"target_modules": ALL_LINEAR, "bias": "none"}
    conflicts = [
        name
        for name, value in arguments.items()
        if (value != defaults[name] if name in defaults else value)
    ]
    if conflicts:
        raise ValueError(
            f"adapter is a {type(adapter).__name__}, which says {', '.join(conflicts)} itself"
        )
    config = peft_config.complete_config(adapter, model)
    return peft_config.spec_from_config(config), bool(config.get("inference_mode"))


def with_heads(model: nn.Module, spec: AdaptSpec) -> AdaptSpec:
    """Return the spec with the heads that its task trains. ValueError if there is none."""
    names = task_heads.add_heads(model, spec.task_type, spec.modules_to_save)
    task_heads.require_heads(model, spec.task_type, names)
    return replace(spec, modules_to_save=names)


def refuse_parallel(model: nn.Module) -> None:
    """Raise ValueError if the model is in DDP: it would not sum the gradients of new Parameters."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model {type(model).__name__} is in DistributedDataParallel already: put the adapters "
            "in before wrapping it"
        )


def install(
    model: nn.Module,
    spec: AdaptSpec,
    targets: Targets,
    adapter_dtype: torch.dtype | None = None,
    set_values: SetValues | None = None,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Replace the targets by adapted layers, and set which parameters train as the spec says.

    If anything fails, set_values and finish included, the model is restored.

    Args:
        model: the model that contains the targets.
        spec: which adapter goes where.
        targets: the modules to replace, as find_targets returns them.
        adapter_dtype: dtype of the factors, as in adapt.
        set_values: gives each layer its values, instead of the adapter's init.
        finish: called when all layers are in place.
    """
    adapters = _bind_adapters(model, spec, targets, bind_layers=set_values is None)
    extra = extra_trainables.collect(model, spec, targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: dict[nn.Module, AdapterLayer] = {}
    try:
        for module, names in targets.items():
            layer_class, _ = layer_class_for(module)
            layers[module] = layer_class._from(
                module, adapters[module], adapter_dtype, start=set_values is None
            )
            share_call_hooks(module, layers[module])
            if set_values is not None:
                set_values(names[0], layers[module])
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        share_tensors(layers.values())
        for module, names in targets.items():
            magnitude: Any = layers[module].lora_magnitude
            if magnitude is not None:
                magnitude.lorafast_name = names[0]
            replace_module(model, names, layers[module])
        extra_trainables.enable_training(extra, layers)
        finish()
    except BaseException:
        extra_trainables.undo_training(extra, layers)
        for module, names in targets.items():
            replace_module(model, names, module)
        for layer in layers.values():
            layer.restore_base()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    model.__dict__[TASK_TYPE_ATTRIBUTE] = spec.task_type
    adapt_record.remember(model)
    observers.tell_adapted(model)


def _bind_adapters(
    model: nn.Module, spec: AdaptSpec, targets: Targets, bind_layers: bool
) -> dict[nn.Module, Adapter]:
    """Return the adapter of each target. bind_layers: its init will run, which may need the layer.

    ValueError if an adapter would change a tied weight.
    """
    names = [canonical_name(names[0]) for names in targets.values()]
    by_name = spec.adapters(names)
    shapes: list[Any] = [weight_shape(module) for module in targets]
    adapters = {
        module: by_name[name].bind_model(shapes)
        for module, name in zip(targets, names, strict=True)
    }
    _refuse_tied(model, targets, adapters)
    for module, name in zip(targets, names, strict=True):
        if isinstance(module, ExpertParameter) and (why := why_not_adapter(adapters[module])):
            raise ValueError(f"{name}: {adapters[module]} on experts: {why}")
    if not bind_layers:
        return adapters
    layers = zip(adapters.values(), shapes, strict=True)
    adapt_warnings.warn_about_sizes(dict(zip(names, layers, strict=True)))
    return {
        module: adapter.bind_layer(canonical_name(targets[module][0]), weight_matrix(module))
        for module, adapter in adapters.items()
    }


def set_trainable(model: nn.Module, trainable: bool) -> None:
    """Let everything that an adapter file of the model holds train as adapt does, or freeze it."""
    for layer in adapter_layers(model).values():
        for name, part in layer._tensor_specs().items():
            # What a schedule has frozen stays frozen until the schedule changes it.
            frozen = name in layer.frozen_parts or (
                name == "lora_B" and layer.frozen_columns == layer.r
            )
            if not frozen:
                getattr(layer, name).requires_grad_(trainable and part.trained)
    extra_trainables.set_trainable(model, trainable)


def replace_module(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Set the module under each of these names of the model."""
    if isinstance(module, ExpertParameter | ParameterExperts):
        module.put()
        return
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def weight_matrix(module: Any) -> torch.Tensor:
    """Return the weight as [N,K]. nn.Linear stores it so; Conv1D and nn.Embedding transposed.

    A quantised one is dequantised. That of experts is [E,N,K].
    """
    if isinstance(module, ExpertParameter):
        return module.matrix().detach()
    if quantised := formats.of(module):
        return quantised.dense()
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def weight_shape(module: Any) -> tuple[int, int]:
    """Return N and K of the weight."""
    quantised = formats.of(module)
    if quantised is not None:
        return quantised.shape
    N, K = weight_matrix(module).shape[-2:]
    return N, K


def share_tensors(layers: Collection[AdapterLayer]) -> None:
    """Let the layers hold one Parameter for every tensor that they have in common (VeRA)."""
    shared: dict[tuple, nn.Parameter] = {}
    for layer in layers:
        for name, part in layer._tensor_specs().items():
            if part.shared:
                parameter = getattr(layer, name)
                key = (name, parameter.shape, parameter.dtype, parameter.device)
                setattr(layer, name, shared.setdefault(key, parameter))


def _refuse_tied(model: nn.Module, targets: Targets, adapters: dict[nn.Module, Adapter]) -> None:
    """Raise ValueError if an init would change a weight that another module holds too."""
    changed = {
        module: names
        for module, names in targets.items()
        # Such an adapter refuses a quantised weight, which may have another name.
        if adapters[module].residual and formats.of(module) is None and not module.weight.is_meta
    }
    owners = parameter_owners(model) if changed else {}
    for module, names in changed.items():
        weight: Any = module.weight
        holders = owners[storage_key(weight)]
        if len(holders) > 1:
            raise ValueError(
                f"{adapters[module]} would change {' and '.join(holders.values())}, which are one "
                f"tensor: leave {names[0]} out, or choose another init"
            )


@contextlib.contextmanager
def temporary_seed(seed: int | None, model: nn.Module) -> Iterator[None]:
    """A context in which torch's generators start from seed; their states are restored on exit.

    seed=None changes nothing. The generators are the CPU's and those of the model's CUDA devices.
    """
    if seed is None:
        yield
        return
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
