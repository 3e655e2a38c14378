"""Floor 7: optimizers that know an adapter's factors from other parameters. One paper, one file."""

from lorafast.optim.lora_fa import LoRAFA
from lorafast.optim.lora_plus import LoRAPlus
from lorafast.optim.lora_pro import LoRAPro

__all__ = ["LoRAFA", "LoRAPlus", "LoRAPro"]
