# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Token merging in two Triton kernels: one makes a plan, one carries it out. Only `kernels.py` imports this module.

Both are deterministic: no program adds to what another one writes, and every sum has a fixed order.
"""

import torch
import triton
import triton.language as tl

from tocom_hf.merging.attention import padded
from tocom_hf.merging.tokens import MergePlan


def plan_merge(keys: torch.Tensor, r: int, protected: int) -> MergePlan:
    """`match_tokens` of the keys' mean over heads, in one kernel with one program for each image.

    Means, norms and cosines are float32, as there. The mean is rounded to the dtype of the keys, as torch rounds it. Of
    equally similar tokens those at lower positions merge, and into the lowest position.

    Args:
        keys: `(batch, tokens, heads, head_dim)` of float32, float16 or bfloat16, with any strides.
        r: Number of tokens to merge, in `1..(tokens - protected) // 2`.
        protected: Number of tokens at the front that stay out of it.

    Returns:
        The plan, int64 row numbers. Its merged tokens are in the order of their similarity, as those of `match_tokens`.
    """
    batch, tokens, heads, head_dim = keys.shape
    device = keys.device
    first_a = protected + protected % 2
    first_b = protected + 1 - protected % 2
    b_count = (tokens - first_b + 1) // 2
    a_count = (tokens - first_a + 1) // 2
    kept = torch.empty((batch, tokens - r), dtype=torch.int64, device=device)
    merged = torch.empty((batch, r), dtype=torch.int64, device=device)
    into = torch.empty((batch, r), dtype=torch.int64, device=device)
    # what the program of an image writes in one phase and reads in the next
    metric = torch.empty((batch, tokens, head_dim), dtype=torch.float32, device=device)
    similarity = torch.empty((batch, a_count), dtype=torch.float32, device=device)
    partner = torch.empty((batch, a_count), dtype=torch.int32, device=device)
    width = max(16, triton.next_power_of_2(head_dim))
    _plan_kernel[(batch,)](
        keys, metric, similarity, partner, kept, merged, into,
        *keys.stride(), tokens, heads, head_dim, a_count, b_count, first_a, first_b, protected, r,
        # how many tokens are compared at a time: wide heads would not fit into the memory that a program has
        BLOCK=64 if width <= 64 else 32, WIDTH=width, num_warps=8,
    )  # fmt: skip
    return MergePlan(kept, merged, into)


def carry_out(
    residual: torch.Tensor, branch: torch.Tensor | None, plan: MergePlan, sizes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge `residual + branch` and the sizes by a plan, in one kernel with one program for each output token.

    Args:
        residual: `(batch, tokens, hidden)` of float32, float16 or bfloat16.
        branch: The same shape, or `None` to merge `residual` alone.
        plan: Which token goes where.
        sizes: Float32 `(batch, tokens)`, or `None` where every token still has size 1.

    Returns:
        Merged tokens `(batch, tokens - r, hidden)`; their sizes, float32 `(batch, tokens - r)`; the logarithms of these
        in the dtype of the tokens, `(batch, 1, 1, padded(tokens - r))`, of which nobody reads the last few.
    """
    batch, _, hidden = residual.shape
    tokens_out, r = plan.kept.shape[1], plan.merged.shape[1]
    dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    output = torch.empty((batch, tokens_out, hidden), dtype=dtype, device=residual.device)
    sizes_out = torch.empty((batch, tokens_out), dtype=torch.float32, device=residual.device)
    row = padded(tokens_out)
    bias = torch.empty((batch, 1, 1, row), dtype=dtype, device=residual.device)
    other = residual if branch is None else branch
    own_sizes = residual if sizes is None else sizes
    size_strides = (0, 0) if sizes is None else sizes.stride()
    _merge_kernel[(batch * tokens_out,)](
        residual, other, own_sizes, *(index.contiguous() for index in plan), output, sizes_out, bias,
        *residual.stride(), *other.stride(), *size_strides, tokens_out, r, row, hidden,
        HAS_BRANCH=branch is not None, HAS_SIZES=sizes is not None,
        BLOCK_R=triton.next_power_of_2(r), BLOCK_HIDDEN=triton.next_power_of_2(hidden),
        num_warps=4 if hidden <= 2048 else 8,
    )  # fmt: skip
    return output, sizes_out, bias


# these numbers differ from layer to layer: code of its own for each that is 1 or divides by 16 would take minutes
@triton.jit(do_not_specialize=["tokens", "a_count", "b_count", "first_a", "first_b", "protected", "r"])
def _plan_kernel(
    keys, metric, similarity, partner, kept, merged, into,
    stride_batch, stride_token, stride_head, stride_channel,
    tokens, heads, head_dim, a_count, b_count, first_a, first_b, protected, r,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first_row = image * tokens  # of the tokens that enter
    first_row_out = image * (tokens - r)
    keys += image * stride_batch
    metric += first_row * head_dim
    similarity += image * a_count
    partner += image * a_count
    kept += first_row_out
    merged += image * r
    into += image * r
    b_start = protected + a_count - r
    lanes = tl.arange(0, BLOCK)
    channels = tl.arange(0, WIDTH)
    is_channel = channels[None, :] < head_dim

    # 1. the mean over heads, and its direction
    for start in range(0, tokens, BLOCK):
        rows = start + lanes
        inside = (rows[:, None] < tokens) & is_channel
        places = rows[:, None].to(tl.int64) * stride_token + channels[None, :] * stride_channel
        total = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for head in range(heads):
            total += tl.load(keys + places + head * stride_head, mask=inside, other=0.0).to(tl.float32)
        mean = (
            tl.div_rn(total, tl.full((BLOCK, WIDTH), heads, dtype=tl.float32)).to(keys.dtype.element_ty).to(tl.float32)
        )
        norm = tl.sqrt_rn(tl.sum(mean * mean, axis=1))
        norm = tl.where(norm < 1e-12, 1e-12, norm)  # as in F.normalize; a norm that is not a number stays so
        direction = tl.div_rn(mean, tl.broadcast_to(norm[:, None], (BLOCK, WIDTH)))
        tl.store(metric + rows[:, None] * head_dim + channels[None, :], direction, mask=inside)
    tl.debug_barrier()

    # 2. the most similar B token of every A token, the first of several
    for start in range(0, a_count, BLOCK):
        a_rows = start + lanes
        a_places = (first_a + 2 * a_rows)[:, None] * head_dim + channels[None, :]
        a = tl.load(metric + a_places, mask=(a_rows[:, None] < a_count) & is_channel, other=0.0)
        best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        best_at = tl.zeros((BLOCK,), dtype=tl.int32)
        for b_start_row in range(0, b_count, BLOCK):
            b_rows = b_start_row + lanes
            b_places = (first_b + 2 * b_rows)[None, :] * head_dim + channels[:, None]
            inside = (b_rows[None, :] < b_count) & (channels[:, None] < head_dim)
            b = tl.load(metric + b_places, mask=inside, other=0.0)
            cosines = tl.dot(a, b, input_precision="ieee")
            # what is not a number is the largest, as in torch, and gets a rank of its own
            cosines = tl.where(cosines != cosines, float("inf"), cosines)
            cosines = tl.where(b_rows[None, :] < b_count, cosines, float("-inf"))
            highest, highest_at = tl.max(cosines, axis=1, return_indices=True, return_indices_tie_break_left=True)
            better = highest > best
            best = tl.where(better, highest, best)
            best_at = tl.where(better, highest_at.to(tl.int32) + b_start_row, best_at)
        tl.store(similarity + a_rows, best, mask=a_rows < a_count)
        tl.store(partner + a_rows, best_at, mask=a_rows < a_count)
    tl.debug_barrier()

    # 3. the rank of every A token is the number of those that merge before it; the first r ranks merge
    merged_before = 0
    for start in range(0, a_count, BLOCK):
        a_rows = start + lanes
        is_a = a_rows < a_count
        own = tl.load(similarity + a_rows, mask=is_a, other=float("-inf"))
        rank = tl.zeros((BLOCK,), dtype=tl.int32)
        for other_start in range(0, a_count, BLOCK):
            others = other_start + lanes
            theirs = tl.load(similarity + others, mask=others < a_count, other=float("-inf"))
            tied = (theirs[None, :] == own[:, None]) & (others[None, :] < a_rows[:, None])
            earlier = (theirs[None, :] > own[:, None]) | tied
            rank += tl.sum(earlier.to(tl.int32), axis=1)
        merges = (is_a & (rank < r)).to(tl.int32)
        at = tl.load(partner + a_rows, mask=is_a, other=0)
        tl.store(merged + rank, first_row + first_a + 2 * a_rows, mask=merges != 0)
        tl.store(into + rank, first_row_out + b_start + at, mask=merges != 0)
        lower = merged_before + tl.cumsum(merges, axis=0) - merges
        tl.store(kept + protected + a_rows - lower, first_row + first_a + 2 * a_rows, mask=is_a & (merges == 0))
        merged_before += tl.sum(merges, axis=0)

    # 4. the tokens that never move
    for start in range(0, protected, BLOCK):
        front = start + lanes
        tl.store(kept + front, first_row + front, mask=front < protected)
    for start in range(0, b_count, BLOCK):
        b_rows = start + lanes
        tl.store(kept + b_start + b_rows, first_row + first_b + 2 * b_rows, mask=b_rows < b_count)


@triton.jit(do_not_specialize=["sizes_batch", "sizes_token", "tokens_out", "r", "row"])
def _merge_kernel(
    residual, branch, sizes, kept, merged, into, output, sizes_out, bias,
    residual_batch, residual_token, residual_channel, branch_batch, branch_token, branch_channel,
    sizes_batch, sizes_token, tokens_out, r, row, hidden,
    HAS_BRANCH: tl.constexpr, HAS_SIZES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // tokens_out
    first_row = image * (tokens_out + r)  # of the tokens that enter
    residual += image * residual_batch
    branch += image * branch_batch
    sizes += image * sizes_batch
    merged += image * r
    into += image * r
    channels = tl.arange(0, BLOCK_HIDDEN)
    inside = channels < hidden
    kind = output.dtype.element_ty

    at = tl.load(kept + program) - first_row
    token = tl.load(residual + at * residual_token + channels * residual_channel, mask=inside, other=0.0)
    if HAS_BRANCH:
        token = token.to(tl.float32)
        token += tl.load(branch + at * branch_token + channels * branch_channel, mask=inside, other=0.0).to(tl.float32)
        token = token.to(kind)
    size = 1.0
    if HAS_SIZES:
        size = tl.load(sizes + at * sizes_token)

    # the tokens that merge into this one
    slots = tl.arange(0, BLOCK_R)
    here = tl.load(into + slots, mask=slots < r, other=-1) == program
    count = tl.sum(here.to(tl.int32), axis=0)
    sources = tl.load(merged + slots, mask=slots < r, other=first_row) - first_row
    weights = here.to(tl.float32)
    if HAS_SIZES:
        weights = tl.load(sizes + sources * sizes_token, mask=here, other=0.0)
    size += tl.sum(weights, axis=0)
    if count > 0:
        start = token.to(tl.float32)
        total = start
        last = -1
        for _ in range(count):
            # in the order of their similarity
            last = tl.min(tl.where(here & (slots > last), slots, BLOCK_R), axis=0)
            source = tl.sum(tl.where(slots == last, sources, 0), axis=0)
            weight = tl.sum(tl.where(slots == last, weights, 0.0), axis=0)
            places = source * residual_token + channels * residual_channel
            other = tl.load(residual + places, mask=inside, other=0.0)
            if HAS_BRANCH:
                places = source * branch_token + channels * branch_channel
                other = other.to(tl.float32)
                other += tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
                other = other.to(kind)
            total += (other.to(tl.float32) - start) * (weight / size)
        token = total.to(kind)

    tl.store(output + program * hidden + channels, token, mask=inside)
    tl.store(sizes_out + program, size)
    tl.store(bias + image * row + program % tokens_out, tl.log(size).to(kind))
