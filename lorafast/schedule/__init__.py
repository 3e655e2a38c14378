"""Schedules, which change what trains during training."""

from lorafast.schedule.adalora import AdaLoRA
from lorafast.schedule.aflora import AFLoRA
from lorafast.schedule.lamda import LaMDAFreeze
from lorafast.schedule.lisa import LISA

__all__ = ["LISA", "AFLoRA", "AdaLoRA", "LaMDAFreeze"]
