"""Problems, the eager chain, error ratios against float64, and saved bytes, for tests and bench."""

from lorafast.engine.error_rule import ratio
from lorafast.testing.errors import Yardstick, error_ratios
from lorafast.testing.experts import ExpertsCase, chain_experts, make_experts, ours_experts
from lorafast.testing.layers import chain, ours, run
from lorafast.testing.memory import Allocated, Saved, allocated, saved
from lorafast.testing.problems import FORMS, GRADIENTS, SHORT, Case, Form, leaf, make

__all__ = [
    "FORMS", "GRADIENTS", "SHORT", "Allocated", "Case", "ExpertsCase", "Form", "Saved", "Yardstick",
    "allocated", "chain", "chain_experts", "error_ratios", "leaf", "make", "make_experts", "ours",
    "ours_experts", "ratio", "run", "saved",
]  # fmt: skip
