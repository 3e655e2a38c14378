"""Floor 7: schedules that change what trains while it trains. One paper, one file."""

from lorafast.schedule.adalora import AdaLoRA
from lorafast.schedule.lamda import LaMDAFreeze

__all__ = ["AdaLoRA", "LaMDAFreeze"]
