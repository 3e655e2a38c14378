"""LorafastPlugin: axolotl runs the LoRA layers of a training run on lorafast's ops.

In axolotl's config: plugins: [lorafast.integrations.axolotl.LorafastPlugin]. Its own LoRA kernels
(lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel) replace the forward of whole blocks, and leave no
call to these layers: set them to false.
"""

from __future__ import annotations

import importlib
from typing import Any

from lorafast.integrations.accelerate import accelerate, carries_adapter


def _base() -> Any:
    try:
        return importlib.import_module("axolotl.integrations.base").BasePlugin
    except ImportError:
        return object


class LorafastPlugin(_base()):  # type: ignore[misc]  # another library's class, where there is one
    """A plugin of axolotl that does lorafast.accelerate(trainer.model) once the trainer is made.

    Every hook but post_trainer_create is the one of axolotl's BasePlugin, which does nothing. A run
    without adapters stays as it is.

    Example:
        from lorafast.integrations.axolotl import LorafastPlugin

        plugin = LorafastPlugin()  # axolotl makes it, from the name in its config
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Accelerate the trainer's model, if it has PEFT adapters."""
        if carries_adapter(trainer.model):
            accelerate(trainer.model)
