"""Optimizers for adapters, and optimizers that project the gradients of whole weights."""

from lorafast.optim.galore import GaLore
from lorafast.optim.lora_as_optimizer import LoRAAsOptimizer
from lorafast.optim.lora_fa import LoRAFA
from lorafast.optim.lora_plus import LoRAPlus
from lorafast.optim.lora_pro import LoRAPro

__all__ = ["GaLore", "LoRAAsOptimizer", "LoRAFA", "LoRAPlus", "LoRAPro"]
