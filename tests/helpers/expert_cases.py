"""Small problems of a layer of experts, and their errors beside the eager chain's."""

import torch

from lorafast import testing
from lorafast.testing import FORMS, Case, ExpertsCase

BY_NAME = {form.name: form for form in FORMS if form.axis == "out"}
COUNTS = (5, 0, 33, 1, 10)
N, K, R = 40, 72, 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(form="lora", dtype=torch.float32, dropout=0.0, counts=COUNTS, shared="", **changes):
    case = Case(BY_NAME[form], 0, N, K, R, dtype, dropout, **changes)
    return ExpertsCase(case, counts, shared)


def norm_of(case, t):
    """DoRA's norm of each expert's rows."""
    delta = case.case.scaling * t["lora_B"] @ t["lora_A"]
    return (t["weight"].detach() + delta).norm(dim=2)


def errors(case, seeds=range(4)):
    made = [testing.make_experts(case, seed) for seed in seeds]
    yardstick = testing.Yardstick(case, made, testing.chain_experts)
    return yardstick.ratios(lambda tensors: testing.run(testing.ours_experts, case, tensors))
