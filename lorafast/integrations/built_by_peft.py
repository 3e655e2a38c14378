"""Every model that PEFT builds in this process accelerated, and one report, for lorafast run.

Imports neither torch nor PEFT before the program does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import weakref
from types import ModuleType
from typing import Any

from lorafast.runtime import env
from lorafast.runtime.import_hooks import after_import


class Accelerator:
    """What accelerates PEFT's models as they are built, and reports once.

    The report is printed after the first step of an optimizer, or else when the process ends; on
    rank 0 alone.

    Args:
        dropout_on: as in lorafast.accelerate.
        keep: as in lorafast.accelerate.
        quiet: print no report.
    """

    def __init__(self, dropout_on: str | None, keep: str, quiet: bool) -> None:
        self._options = ("both" if dropout_on is None else dropout_on, keep)
        # The models, each with its report at the time it was built: it may be gone at the end.
        self._built: list[tuple[weakref.ref, Any]] = []
        self._waits = not quiet
        self._hook: Any = None
        self._failure = ""

    def install(self) -> None:
        """Wait for PEFT's import."""
        after_import("peft", self._patch)
        atexit.register(self._report, at_end=True)

    def silence(self) -> None:
        """Print no report."""
        self._waits = False

    def _patch(self, peft: ModuleType) -> None:
        try:
            from peft.tuners.tuners_utils import BaseTuner
            from torch.optim.optimizer import register_optimizer_step_post_hook

            from lorafast.integrations import peft_linear  # noqa: F401  (refuses here, if it must)
        except Exception as error:  # the program runs without lorafast then
            self._failure = f"PEFT's layers stay as they are: {type(error).__name__}: {error}"
            return
        inject = BaseTuner.inject_adapter

        @functools.wraps(inject)
        def inject_adapter(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = inject(tuner, model, *args, **kwargs)
            self._accelerate(model)
            return result

        BaseTuner.inject_adapter = inject_adapter
        # Never removed: torch is iterating over its hooks when it could be.
        self._hook = register_optimizer_step_post_hook(lambda *_: self._report())

    def _accelerate(self, model: Any) -> None:
        """Change a model's layers, as lorafast.accelerate does."""
        from lorafast.integrations import accelerate, peft_linear

        peft_linear.convert(model, *self._options)
        report = accelerate.inspect(model, *self._options)
        others = [(ref, old) for ref, old in self._built if ref() is not model]
        self._built = [*others, (weakref.ref(model), report)]

    def _report(self, at_end: bool = False) -> None:
        if not self._waits:
            return
        self._waits = False
        if _rank():
            return
        # A report is not worth a failed step.
        with contextlib.suppress(BrokenPipeError):
            try:
                text = self._text()
            except Exception as error:
                text = f"no report: {type(error).__name__}: {error}"
            if at_end and self._built:
                text += "\nno optimizer of torch has made a step"
            for line in text.splitlines():
                print(f"lorafast run: {line}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        if self._failure or not self._built:
            imported = "PEFT built no adapter" if "peft" in sys.modules else "PEFT is not imported"
            return self._failure or f"{imported}, and there is nothing to accelerate"
        from lorafast.integrations.accelerate import Report, inspect

        taken: list[str] = []
        left: dict[str, str] = {}
        for number, (ref, report) in enumerate(self._built):
            model = ref()
            found = report if model is None else inspect(model, *self._options)
            taken += found.taken
            left |= {f"{number}.{name}": why for name, why in found.left.items()}
        return str(Report(tuple(taken), left))


def _rank() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return env.rank()
