# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Token merging as pure tensor functions (ToMe, arXiv 2210.09461, section 3). No model appears here.

Names and shapes used throughout:

* `protected`: how many tokens at the front (class, distillation, register) never take part in merging.
* `sizes`: float32 `(batch, tokens)`, how many input tokens each token stands for; `None` while nothing is merged.
* A and B: the tokens at even and at odd positions. A tokens are merged into B tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class MergePlan(NamedTuple):
    """Which token goes where in one layer.

    All are int64 row numbers: the tokens of a batch, written one image below the other, are the rows of one matrix of
    `batch * tokens` rows. Rows of a matrix are copied and added several times as fast as positions in every image.

    Attributes:
        kept (`torch.Tensor` of shape `(batch, tokens - r)`): Input row of each output token, in output order.
        merged (`torch.Tensor` of shape `(batch, r)`): Input rows of the tokens that are merged away.
        into (`torch.Tensor` of shape `(batch, r)`): Output row that each of them is merged into.
    """

    kept: torch.Tensor
    merged: torch.Tensor
    into: torch.Tensor


@torch.no_grad()
def match_tokens(
    metric: torch.Tensor,
    r: int,
    protected: int,
    rows: torch.Tensor | None = None,
    *,
    sizes: torch.Tensor | None = None,
    size_penalty: float = 0.0,
    penalties: torch.Tensor | None = None,
) -> MergePlan:
    """Bipartite soft matching (ToMe, section 3, steps 1 to 4).

    Every A token finds its most similar B token by cosine similarity; the `r` A tokens with the most similar partners
    are merged into them. Of equals the first one comes first, so that every device and runtime merges the same tokens.

    Args:
        metric: Floating `(batch, tokens, channels)`; in ToMe the keys averaged over heads. Half precision is compared
            in float32, because rounding makes ties.
        r: Number of tokens to merge, in `1..(tokens - protected) // 2`.
        protected: Number of tokens at the front that stay out of it.
        rows: The numbers from 0 up to at least `batch * tokens`, where the caller has them at hand.
        sizes: Float32 `(batch, tokens)`, or `None` where every token still has size 1.
        size_penalty: What the logarithm of the size of two tokens together takes off their similarity.
        penalties: Float32 `(batch, tokens)`, what each token takes off the similarity of every pair that it is in.

    Returns:
        The plan. Output order: protected tokens, the A tokens that stay in their old order, all B tokens.
    """
    batch, tokens, _ = metric.shape
    if metric.dtype in (torch.float16, torch.bfloat16):
        metric = metric.float()
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)  # (batch, tokens, 1)
    # a key of zeros is similar to no other
    metric = metric / norm.clamp_(min=1e-12)
    # the first even and the first odd position that are not protected
    first_a = protected + protected % 2
    first_b = protected + 1 - protected % 2
    a_metric = metric[:, first_a::2]  # (batch, A, channels)
    b_metric = metric[:, first_b::2]  # (batch, B, channels)
    with torch.autocast(metric.device.type, enabled=False):
        cosines = torch.bmm(a_metric, b_metric.transpose(1, 2))  # (batch, A, B)
    if size_penalty != 0 and sizes is not None:
        together = sizes[:, first_a::2].unsqueeze(2) + sizes[:, first_b::2].unsqueeze(1)  # (batch, A, B)
        cosines = cosines - size_penalty * together.log()
    if penalties is not None:
        cosines = cosines - penalties[:, first_a::2].unsqueeze(2) - penalties[:, first_b::2].unsqueeze(1)
    similarity, partner = cosines.max(dim=-1)  # (batch, A)
    order = _descending(similarity)  # (batch, A)

    if rows is None:
        rows = token_rows(batch, tokens, metric.device)
    rows_in = rows[: batch * tokens].view(batch, tokens)
    rows_out = rows[: batch * (tokens - r)].view(batch, tokens - r)
    a_rows = rows_in[:, first_a::2].gather(1, order)  # (batch, A), the most similar ones first
    stays = a_rows[:, r:].sort(dim=1).values  # (batch, A - r)
    kept = torch.cat([rows_in[:, :protected], stays, rows_in[:, first_b::2]], dim=1)  # (batch, tokens - r)
    b_rows_out = rows_out[:, protected + stays.shape[1] :]  # (batch, B)
    into = b_rows_out.gather(1, partner.gather(1, order[:, :r]))  # (batch, r)
    return MergePlan(kept, a_rows[:, :r], into)


def token_rows(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The row number of every token of a batch, int64 `(batch * tokens,)`."""
    return torch.arange(batch * tokens, device=device)


def merge_tokens(
    hidden_states: torch.Tensor, sizes: torch.Tensor | None, plan: MergePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge tokens into their partners by the size-weighted mean (ToMe, section 3, step 5).

    A token B that takes in tokens k of shares w_k becomes `B + sum_k w_k (x_k - B)`, which is the size-weighted mean of
    all of them. So only the tokens that merge are computed with; all others are copied once, bit for bit.

    Args:
        hidden_states: Floating `(batch, tokens, hidden)`.
        sizes: Float32 `(batch, tokens)`, or `None` where every token still has size 1.
        plan: Which token goes where.

    Returns:
        `(batch, tokens - r, hidden)` in the dtype of `hidden_states`, and its sizes, float32 `(batch, tokens - r)`.
    """
    batch, tokens, hidden = hidden_states.shape
    kept, merged, into = (rows.flatten() for rows in plan)
    if sizes is None:
        sizes = torch.ones(batch, tokens, device=hidden_states.device)
    old_sizes = sizes.flatten()  # (batch * tokens)
    new_sizes = old_sizes.index_select(0, kept)  # (batch * (tokens - r))
    own = old_sizes.index_select(0, merged)  # (batch * r)
    new_sizes.index_add_(0, into, own)
    share = own / new_sizes.index_select(0, into)  # (batch * r)

    flat = hidden_states.reshape(-1, hidden)  # (batch * tokens, hidden)
    output = flat.index_select(0, kept)  # (batch * (tokens - r), hidden)
    change = flat.index_select(0, merged) - output.index_select(0, into)  # (batch * r, hidden)
    change = change * share.to(flat.dtype).unsqueeze(1)
    # in place: the output is fresh, and no backward pass needs its values
    output = output.index_add_(0, into, change)
    return output.view(batch, -1, hidden), new_sizes.view(batch, -1)


def output_positions(plan: MergePlan) -> torch.Tensor:
    """Where every input token of one layer went: positions in its own image, int64 `(batch, tokens)`."""
    batch, tokens_out = plan.kept.shape
    tokens = tokens_out + plan.merged.shape[1]
    rows_out = token_rows(batch, tokens_out, plan.kept.device)
    went = torch.cat([rows_out, plan.into.flatten()])  # (batch * tokens)
    came = torch.cat([plan.kept.flatten(), plan.merged.flatten()])  # (batch * tokens)
    positions = torch.empty_like(went).scatter(0, came, went)
    return positions.view(batch, tokens) - rows_out[::tokens_out].unsqueeze(1)


def follow_tokens(plans: Iterable[MergePlan]) -> torch.Tensor | None:
    """Where the tokens that entered the first layer are after several layers.

    Args:
        plans: The plans of the layers that merge, in order.

    Returns:
        Positions among the output tokens of the last plan, int64 `(batch, input tokens)`; `None` without plans.
    """
    positions = None
    for plan in plans:
        moved = output_positions(plan)
        positions = moved if positions is None else moved.gather(1, positions)
    return positions


def restore_tokens(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Copy every merged token back to the positions that it came from, so that means over tokens weigh by size.

    Args:
        hidden_states: `(batch, tokens, hidden)` after the last layer.
        positions: What `follow_tokens` returned, `(batch, input tokens)`.

    Returns:
        `(batch, input tokens, hidden)`.
    """
    batch, tokens, hidden = hidden_states.shape
    first_rows = torch.arange(batch, device=hidden_states.device).unsqueeze(1) * tokens  # (batch, 1)
    rows = (positions + first_rows).flatten()  # (batch * input tokens)
    flat = hidden_states.reshape(-1, hidden)  # (batch * tokens, hidden)
    return flat.index_select(0, rows).view(batch, -1, hidden)  # (batch, input tokens, hidden)


def mean_over_groups(
    hidden_states: torch.Tensor, positions: torch.Tensor, groups: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Means over groups of input tokens, where each stands for the token that it was merged into.

    Args:
        hidden_states: Floating `(batch, tokens, hidden)` behind a layer.
        positions: Which of these tokens each input token is in, int64 `(batch, input tokens)`.
        groups: Which group each input token is in, int64 `(batch, input tokens)`. Where these are the same tensor as
            `positions`, the tokens are their own means.
        num_groups: Number of groups, of which none is empty.

    Returns:
        `(batch, num_groups, hidden)`.
    """
    if groups is positions:
        return hidden_states
    spread = restore_tokens(hidden_states, positions)  # (batch, input tokens, hidden)
    index = groups.unsqueeze(-1).expand_as(spread)
    sums = spread.new_zeros(spread.shape[0], num_groups, spread.shape[-1])  # (batch, groups, hidden)
    sums = sums.scatter_add(1, index, spread)
    sizes = group_sizes(groups, num_groups).to(sums.dtype)  # (batch, groups)
    return sums / sizes.unsqueeze(-1)


def group_sizes(groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Number of input tokens in each group: float32 `(batch, num_groups)`."""
    ones = torch.ones(groups.shape, device=groups.device)  # (batch, input tokens)
    sizes = torch.zeros(groups.shape[0], num_groups, device=groups.device)
    return sizes.scatter_add(1, groups, ones)


def _descending(similarity: torch.Tensor) -> torch.Tensor:
    """The order that sorts each row, the largest first and the first of equals first: int64, in the given shape."""
    if torch.compiler.is_exporting():
        # torch.onnx does not know the stable sort, but makes a TopK of the other, which ONNX defines to be stable
        return similarity.argsort(dim=1, descending=True)
    return similarity.argsort(dim=1, descending=True, stable=True)
