"""lorafast.adapt: give a model's linears and embeddings an adapter, in place, and freeze everything else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorafast.methods.adapter import Adapter
from lorafast.models import extra_trainables, peft_config
from lorafast.models.adapt_spec import ALL_LINEAR, Names, Plan
from lorafast.models.module_names import adapted, clean, some
from lorafast.models.target_modules import layer_for, owners, places, storage
from lorafast.nn.adapter_layer import AdapterLayer

Fill = Callable[[str, AdapterLayer], None]


def adapt(
    model: nn.Module,
    adapter: Adapter,
    target_modules: Names = ALL_LINEAR,
    *,
    exclude_modules: Names | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_pattern: Mapping[str, Adapter] | None = None,
    modules_to_save: Collection[str] = (),
    bias: str = "none",
    seed: int | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put an adapter on every module that target_modules names, in place, and freeze everything else. Returns the model.

    adapter: one of lorafast's, or a PEFT LoraConfig or VeraConfig, which then says all but seed and adapter_dtype.
    target_modules: "all-linear" (every nn.Linear and transformers Conv1D but the model's output embeddings), a regular expression
    that must match a whole name, or names, each whole or the end of one after a dot. nn.Embedding can be named too.
    exclude_modules: names or an expression, as above. rank_pattern, alpha_pattern: {expression: r or alpha} for layers whose name,
    or its end after a dot, matches. adapter_pattern: {expression: another adapter} for such layers, as DoRA with
    DoRA(magnitude_only=True) for some; other mixtures of methods train, but a file cannot hold them. modules_to_save: modules that
    train as a whole and are saved with the adapter. bias: "all" and "lora_only" (the adapted layers') train biases too. seed: start
    from a generator of its own. adapter_dtype: as for Linear.
    Weights and biases stay the same Parameters; a module used in several places is replaced in all. Adapters start in module order.
    Raises ValueError or TypeError, and changes nothing, where a name or pattern matches nothing, a match is no plain nn.Linear,
    Conv1D or nn.Embedding or carries hooks, a weight that would change is tied to another, or the model is adapted already, or in
    DDP. If an init fails midway, weights it has already changed are restored to within one rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    options = {
        "exclude_modules": exclude_modules, "rank_pattern": rank_pattern or {}, "alpha_pattern": alpha_pattern or {},
        "adapter_pattern": adapter_pattern or {}, "modules_to_save": modules_to_save, "bias": bias,
    }  # fmt: skip
    if peft_config.is_one(adapter):
        given = {"target_modules": target_modules != ALL_LINEAR, **options, "bias": bias != "none"}
        said = [name for name, value in given.items() if value]
        if said:
            raise ValueError(
                f"adapter is a {type(adapter).__name__}, which says {', '.join(said)} itself"
            )
        asked = peft_config.asked(adapter, model)
        plan, resting = peft_config.plan_of(asked), asked.get("inference_mode")
    else:
        plan, resting = Plan(adapter, target_modules, **options), False
    refuse_parallel(model)
    found = places(model, plan)
    _warn_of_experts(model, plan, found)
    with seeded(seed, model):
        install(model, plan, found, adapter_dtype)
    if resting:
        let_train(model, False)
    return model


def refuse_parallel(model: nn.Module) -> None:
    """DDP sums the gradients of the parameters it was made with, and of no adapter that comes later."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model {type(model).__name__} is in DistributedDataParallel already: put the adapters in before wrapping it"
        )


def _warn_of_experts(model: nn.Module, plan: Plan, found: dict[nn.Module, list[str]]) -> None:
    """What "all-linear" passes over without a word would be taken for adapted."""
    if not (isinstance(plan.target_modules, str) and plan.target_modules.lower() == ALL_LINEAR):
        return
    left = [
        f"{name}.{key}" for name, module in model.named_modules() if not type(module).__module__.startswith("torch.nn.")
        for key, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3
    ]  # fmt: skip
    if left:
        warnings.warn(
            f"target_modules='all-linear' adapts no 3-D weight of fused experts: {some(left)}",
            stacklevel=3,
        )


def install(
    model: nn.Module,
    plan: Plan,
    found: dict[nn.Module, list[str]],
    adapter_dtype: torch.dtype | None = None,
    fill: Fill | None = None,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Carry out a plan on the modules found for it. fill: gives each layer (by name) its values instead of the adapter's start.

    finish: what else belongs to it. Whatever fails, finish included, the model is as it was.
    """
    own = plan.adapters(clean(names[0]) for names in found.values())
    shapes = [tuple(_matrix(module).shape) for module in found]
    specs = {module: own[clean(names[0])].bind_model(shapes) for module, names in found.items()}
    _refuse_tied(model, found, specs)
    also = extra_trainables.chosen(model, plan, found)
    if fill is None:
        specs = {
            module: spec.bind_layer(clean(found[module][0]), _matrix(module))
            for module, spec in specs.items()
        }
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: dict[nn.Module, AdapterLayer] = {}
    try:
        for module, names in found.items():
            layers[module] = layer_for(module)[0]._from(
                module, specs[module], adapter_dtype, start=fill is None
            )
            if fill is not None:
                fill(names[0], layers[module])
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        _share(layers.values())
        for module, names in found.items():
            if layers[module].lora_magnitude is not None:
                layers[module].lora_magnitude.lorafast_name = names[0]
            put(model, names, layers[module])
        extra_trainables.train(also, layers)
        finish()
    except BaseException:
        extra_trainables.undo(also, layers)
        for module, names in found.items():
            put(model, names, module)
        for layer in layers.values():
            layer.restore_base()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    model.__dict__["_lorafast_task_type"] = plan.task_type


def let_train(model: nn.Module, trainable: bool) -> None:
    """Let everything an adapter file of the model holds train as adapt does, or nothing of it."""
    for layer in adapted(model).values():
        for name, part in layer._parts().items():
            # What a schedule has frozen is its to thaw.
            if name not in layer.frozen_parts and (
                name != "lora_B" or layer.frozen_columns < layer.r
            ):
                getattr(layer, name).requires_grad_(trainable and part.trained)
    extra_trainables.let_train(model, trainable)


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Put a module in every place of these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight as [N,K]."""
    return module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().t()


def _share(layers: Collection[AdapterLayer]) -> None:
    """One Parameter for every tensor that layers hold in common."""
    first: dict[tuple, nn.Parameter] = {}
    for layer in layers:
        for name, part in layer._parts().items():
            if part.shared:
                held = getattr(layer, name)
                setattr(
                    layer, name, first.setdefault((name, held.shape, held.dtype, held.device), held)
                )


def _refuse_tied(
    model: nn.Module, found: dict[nn.Module, list[str]], specs: dict[nn.Module, Adapter]
) -> None:
    changed = {
        module: names
        for module, names in found.items()
        if specs[module].residual and not module.weight.is_meta
    }
    held = owners(model) if changed else {}
    for module, names in changed.items():
        sharing = held[storage(module.weight)]
        if len(sharing) > 1:
            both = " and ".join(sharing.values())
            raise ValueError(
                f"{specs[module]} would change {both}, which are one tensor: leave {names[0]} out, or choose another init"
            )


@contextlib.contextmanager
def seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    """A generator of its own for what is drawn inside; torch's go on as if nothing had been drawn."""
    if seed is None:
        yield
        return
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
