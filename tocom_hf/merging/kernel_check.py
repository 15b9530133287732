# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The self-check of the merging kernels: a few small merges on the device, against PyTorch in float64 on the CPU.

A driver, a compiler or a chip that the kernels were never run on could make them wrong in silence. So they are used
only where they have just given the right result.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from tocom_hf.merging.tokens import MergePlan, match_tokens, merge_tokens


class Case(NamedTuple):
    """One merge to check, on the CPU.

    Attributes:
        name: What it is, for the message.
        keys (`torch.Tensor` of shape `(batch, tokens, heads, head_dim)`): Keys in the dtype to check.
        r: How many tokens merge.
        protected: How many tokens at the front do not.
    """

    name: str
    keys: torch.Tensor
    r: int
    protected: int


def find_mismatch(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run both kernels on a device, and compare: indices exactly, means to the rounding of the dtype.

    Args:
        kernels: Has `plan_merge` and `carry_out` as `triton_kernels.py` has them.
        device: Where to run them.
        dtype: Of keys and hidden states.

    Returns:
        What is wrong, or `None`.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
        for case in check_cases(dtype):
            plan = match_tokens(case.keys.double().mean(2).to(dtype).double(), case.r, case.protected)
            found = kernels.plan_merge(case.keys.to(device), case.r, case.protected)
            for name, one, other in zip(plan._fields, found, plan, strict=True):
                if not torch.equal(one.cpu(), other):
                    return f"their plan differs from PyTorch's ({case.name}: {name})"
            for merged_before in (False, True):
                wrong = _compare_merges(kernels, device, case, plan, merged_before)
                if wrong is not None:
                    return f"{wrong} differ from PyTorch's ({case.name})"
    return None


def check_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The merges that are checked: odd and even counts, tokens of a ViT, and ties.

    No two similarities of the random keys are so near to each other that rounding could order them differently.
    """
    for tokens, r, protected, seed in ((197, 16, 1, 46), (98, 40, 2, 24), (33, 16, 0, 48)):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        keys = torch.randn(2, tokens, 4, 64, generator=generator, device="cpu", dtype=torch.float32)
        yield Case(f"{tokens} tokens", keys.to(dtype), r, protected)
    # vectors of equal length with entries that every dtype holds: whatever order they are added in, ties are ties
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs = torch.randint(0, 2, (2, 75, 1, 64), generator=generator, device="cpu") * 2 - 1
    signs[:, 40:60] = signs[:, 10:30]
    yield Case("ties", signs.expand(-1, -1, 4, -1).to(dtype), 30, 5)


def _compare_merges(
    kernels: ModuleType, device: torch.device, case: Case, plan: MergePlan, merged_before: bool
) -> str | None:
    """What of a merge is wrong, or `None`."""
    dtype = case.keys.dtype
    generator = torch.Generator(device="cpu").manual_seed(1)
    shape = (*case.keys.shape[:2], 96)
    residual = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    branch = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    sizes = None
    if merged_before:
        sizes = torch.randint(1, 9, shape[:2], generator=generator, device="cpu").float()
    expected, expected_sizes = merge_tokens((residual + branch).double(), sizes, plan)
    there = MergePlan(*(index.to(device) for index in plan))
    on_device = None if sizes is None else sizes.to(device)
    hidden_states, sizes_out, bias = kernels.carry_out(residual.to(device), branch.to(device), there, on_device)
    if not torch.equal(sizes_out.cpu(), expected_sizes):
        return "sizes"
    # a value is rounded once, so it is half a unit in its last place away at most
    tolerance = 2 * torch.finfo(dtype).eps
    if not torch.allclose(hidden_states.cpu().double(), expected, rtol=tolerance, atol=max(tolerance / 8, 2e-6)):
        return "means"
    logs = bias[:, 0, 0, : sizes_out.shape[1]].cpu().double()
    if not torch.allclose(logs, expected_sizes.double().log(), rtol=tolerance, atol=2e-6):
        return "logarithms of sizes"
    return None
