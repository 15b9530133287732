# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""When token merging runs in the Triton kernels of `triton_kernels.py`, and how a layer calls them.

Kernels turn on by themselves on a GPU whose results agree with PyTorch's (`kernel_check.py`). `TOCOM_KERNELS=0` in the
environment turns them off. Wherever they do not apply the functions here return `None`, and the caller runs
`tokens.py`, which computes the same. On a CPU that is decided by the first line of each.

The kernels are operators of torch, so that `torch.compile` keeps a model in one graph. An exported program is to run
without this package, and gets none.
"""

import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from transformers.utils import logging

from tocom_hf.devices import describe_device
from tocom_hf.errors import ArgumentError
from tocom_hf.merging.attention import padded
from tocom_hf.merging.kernel_check import find_mismatch
from tocom_hf.merging.tokens import MergePlan


logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# what was tested; beyond that one program for an image is slow, and a row of hidden states does not fit into it
MAX_TOKENS = 4096
MAX_HEAD_DIM = 256
MAX_HIDDEN = 8192


class FusedMerge(NamedTuple):
    """What is left of the tokens of one layer.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, tokens - r, hidden)`): Merged tokens.
        sizes (`torch.Tensor` of shape `(batch, tokens - r)`): Their sizes, float32.
        bias (`torch.Tensor` of shape `(batch, 1, 1, tokens - r)`): The logarithms of the sizes in the dtype of the
            tokens, an additive mask for the attention of the next layer, aligned as its kernels want it.
    """

    hidden_states: torch.Tensor
    sizes: torch.Tensor
    bias: torch.Tensor


def fused_plan(keys: torch.Tensor, r: int, protected: int) -> MergePlan | None:
    """`match_tokens` on the keys' mean over heads, in one kernel.

    Indices agree with those of `match_tokens` wherever similarities differ by more than the rounding of float32, and at
    ties of equal tokens: there the lower position comes first. Where two similarities differ by that rounding only, the
    two may order them differently, because they add up in a different order.

    Args:
        keys: Floating `(batch, tokens, heads, head_dim)`, with any strides.
        r: Number of tokens to merge, in `1..(tokens - protected) // 2`.
        protected: Number of tokens at the front that stay out of it.

    Returns:
        The plan, or `None` where the kernels do not apply.
    """
    if keys.device.type != "cuda":
        return None
    if keys.shape[1] > MAX_TOKENS or keys.shape[3] > MAX_HEAD_DIM or not _applies(keys):
        return None
    return MergePlan(*torch.ops.tocom_hf.plan_merge(keys.detach(), r, protected))


def fused_merge(
    residual: torch.Tensor, branch: torch.Tensor | None, plan: MergePlan, sizes: torch.Tensor | None
) -> FusedMerge | None:
    """Merge `residual + branch`, and the sizes, by a plan in one kernel. It has no backward pass.

    Tokens that take in no other are exact copies. The means are float32, rounded once to the dtype of the tokens.

    Args:
        residual: Floating `(batch, tokens, hidden)`, with any strides.
        branch: The same shape, or `None` to merge `residual` alone.
        plan: Which token goes where.
        sizes: Float32 `(batch, tokens)`, or `None` where every token still has size 1.

    Returns:
        The merged tokens and sizes, or `None` where the kernel does not apply, for example in training.
    """
    if residual.device.type != "cuda":
        return None
    if residual.shape[1] > MAX_TOKENS or residual.shape[2] > MAX_HIDDEN:
        return None
    if branch is not None and (branch.dtype not in DTYPES or (torch.is_grad_enabled() and branch.requires_grad)):
        return None
    if (torch.is_grad_enabled() and residual.requires_grad) or not _applies(residual):
        return None
    hidden_states, sizes_out, bias = torch.ops.tocom_hf.carry_out(residual, branch, *plan, sizes)
    return FusedMerge(hidden_states, sizes_out, bias[..., : sizes_out.shape[1]])


class KernelSwitch:
    """Whether kernels are on, decided once for each device and dtype of a process.

    Args:
        load: Returns the module of the kernels, or raises what importing it raises.
        check: Returns what is wrong with the kernels on a device in a dtype, or `None`.
    """

    def __init__(
        self,
        load: Callable[[], ModuleType],
        check: Callable[[ModuleType, torch.device, torch.dtype], str | None] = find_mismatch,
    ):
        self.load = load
        self.check = check
        self.decisions: dict[tuple[torch.device, torch.dtype], bool] = {}
        self.warned: set[torch.device] = set()
        self.lock = threading.Lock()

    def is_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether to use the kernels. The first call for a device and dtype compiles and checks them.

        Raises:
            ArgumentError: if `TOCOM_KERNELS` is neither 0 nor 1.
        """
        decision = self.decisions.get((device, dtype))
        if decision is not None:
            return decision
        with self.lock:
            # another thread may have decided while this one waited
            decision = self.decisions.get((device, dtype))
            if decision is None:
                decision = self._is_wanted() and self._passes(device, dtype)
                self.decisions[device, dtype] = decision
        return decision

    def _is_wanted(self) -> bool:
        setting = os.environ.get("TOCOM_KERNELS", "1")
        if setting not in ("0", "1"):
            raise ArgumentError(
                f"The environment variable TOCOM_KERNELS is {setting!r}. Set it to 0 to turn the GPU kernels of "
                "tocom_hf off, or leave it out."
            )
        return setting == "1"

    def _passes(self, device: torch.device, dtype: torch.dtype) -> bool:
        name = f"{describe_device(device)} ({device}, {dtype})"
        try:
            kernels = self.load()
        except ImportError as error:
            self._warn_once(device, f"the package triton cannot be imported ({error})")
            return False
        try:
            mismatch = self.check(kernels, device, dtype)
        except Exception as error:  # a compiler that is missing or fails has many exceptions
            mismatch = f"their self-check failed with {type(error).__name__}: {error}"
        if mismatch is not None:
            self._warn_once(device, mismatch)
            return False
        logger.info(f"tocom_hf merges tokens in its Triton kernels on {name}: their results agree with PyTorch's.")
        return True

    def _warn_once(self, device: torch.device, reason: str) -> None:
        if device in self.warned:
            return
        self.warned.add(device)
        logger.warning(
            f"tocom_hf merges tokens in PyTorch on {describe_device(device)} ({device}) instead of its Triton kernels, "
            f"because {reason}. Results are the same, only slower; TOCOM_KERNELS=0 keeps this message away."
        )


def _load_kernels() -> ModuleType:
    # triton is optional, takes a while to import, and is of no use without a GPU
    from tocom_hf.merging import triton_kernels

    return triton_kernels


SWITCH = KernelSwitch(_load_kernels)


def _applies(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a tensor that is on a GPU."""
    if tensor.dtype not in DTYPES:
        return False
    # an exported or traced program runs where this package is not
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return _is_on(tensor.device, tensor.dtype)


@torch.compiler.assume_constant_result
def _is_on(device: torch.device, dtype: torch.dtype) -> bool:
    """What the switch says: while a model is compiled too, where it is a constant of the graph."""
    if (device, dtype) not in SWITCH.decisions and torch.cuda.is_current_stream_capturing():
        # the check waits for the device, which would end the capture; whoever warms up first is asked before
        return False
    return SWITCH.is_on(device, dtype)


# -- operators of torch -------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("tocom_hf", "FRAGMENT")
_LIBRARY.define("plan_merge(Tensor keys, SymInt r, SymInt protected) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "carry_out(Tensor residual, Tensor? branch, Tensor kept, Tensor merged, Tensor into, Tensor? sizes)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "plan_merge", "CompositeExplicitAutograd")
def _plan_merge(keys: torch.Tensor, r: int, protected: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(keys):
        return tuple(_load_kernels().plan_merge(keys, r, protected))


@torch.library.register_fake("tocom_hf::plan_merge", lib=_LIBRARY)
def _(keys, r, protected):
    batch, tokens = keys.shape[:2]
    kept = keys.new_empty((batch, tokens - r), dtype=torch.int64)
    merged = keys.new_empty((batch, r), dtype=torch.int64)
    return kept, merged, torch.empty_like(merged)


@torch.library.impl(_LIBRARY, "carry_out", "CompositeExplicitAutograd")
def _carry_out(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    kept: torch.Tensor,
    merged: torch.Tensor,
    into: torch.Tensor,
    sizes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(residual):
        return _load_kernels().carry_out(residual, branch, MergePlan(kept, merged, into), sizes)


@torch.library.register_fake("tocom_hf::carry_out", lib=_LIBRARY)
def _(residual, branch, kept, merged, into, sizes):
    batch, tokens_out = kept.shape
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    hidden_states = residual.new_empty((batch, tokens_out, residual.shape[2]), dtype=dtype)
    sizes_out = residual.new_empty((batch, tokens_out), dtype=torch.float32)
    bias = residual.new_empty((batch, 1, 1, padded(tokens_out)), dtype=dtype)
    return hidden_states, sizes_out, bias
