# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Proportional attention, `softmax(q k / sqrt(d) + log(size)) v` (ToMe, eq. 1), in the form that suits each kernel.

`attend` chooses. The forms below it are pure functions of tensors, and give the same to the rounding of the dtype.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tocom_hf.errors import UnsupportedModelError


ALIGNMENT = 8  # kernels read a mask without copying it where its rows start at multiples of this
# up to here the memory-efficient kernel is faster with a bias than cuDNN's, which torch prefers on Hopper
MAX_EFFICIENT_TOKENS = 512
# a power of two, which costs no accuracy, and keeps values times sizes within the range of float16
WEIGHT_UNIT = 64


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    eager_adds_mask: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in whichever implementation the model is set to, with keys that weigh by their sizes.

    Args:
        module: The attention block, a runtime subclass of a transformers class.
        query: `(batch, heads, queries, head_dim)`.
        key, value: `(batch, heads, tokens, head_dim)`.
        sizes: Float32 `(batch, tokens)`, or `None` where all tokens weigh the same.
        scaling: The factor of the attention logits.
        dropout: Of the attention weights.
        bias: What `proportional_bias` would return, where the caller has it already; not used in another dtype than
            that of the keys, as autocast makes them.
        eager_adds_mask: Whether the family's own eager attention adds a mask to its logits.
        **kwargs: What the layer was called with besides, handed on to the implementation.

    Returns:
        `(batch, queries, heads, head_dim)`, and the attention weights where the implementation tells them.

    Raises:
        UnsupportedModelError: if `flex_attention` is to drop attention weights out, which it cannot.
    """
    if bias is not None and bias.dtype != key.dtype:
        bias = None
    stock_module = sys.modules[module.stock_class.__module__]  # type: ignore[union-attr]
    if not hasattr(stock_module, "eager_attention_forward"):
        # what the block does itself, whatever implementation the configuration names
        if getattr(module, "fused_attn", False):
            return _attend_fused(query, key, value, sizes, scaling, dropout, bias), None
        return attend_eagerly(query, key, value, sizes, scaling, dropout, bias)
    implementation = cast(str, module.config._attn_implementation)  # type: ignore[union-attr]
    if implementation == "sdpa" and not kwargs and _is_stock(implementation):
        # what transformers' function does for these models, without its questions about others
        return _attend_fused(query, key, value, sizes, scaling, dropout, bias), None
    if sizes is not None and implementation == "flex_attention" and _is_stock(implementation):
        if key.device.type == "cpu":
            # there flex_attention is not fused, and has no backward pass
            return _attend_fused(query, key, value, sizes, scaling, dropout, bias), None
        if dropout > 0:
            raise UnsupportedModelError(
                "flex_attention has no dropout of attention weights. Set attention_probs_dropout_prob (or "
                'attention_dropout) of the configuration to 0, or call model.set_attn_implementation("sdpa").'
            )
        return attend_with_score_mod(query, key, value, sizes, scaling, _compiled_flex(module)), None
    mask = None
    head_dim = value.shape[-1]
    if sizes is not None:
        # these kernels take no bias, and the eager attention of some families leaves out its mask
        if "flash" in implementation or (implementation == "eager" and not eager_adds_mask):
            query, key, value = extend_heads(query, key, value, sizes, scaling)
        else:
            mask = proportional_bias(sizes, key.dtype) if bias is None else bias
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, stock_module.eager_attention_forward)
    output, weights = attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    # cuts off the channels that extend_heads added
    return output[..., :head_dim], weights


def attend_eagerly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step, for blocks that know no other implementation. Takes what `attend` takes.

    Returns:
        `(batch, queries, heads, head_dim)`, and the attention weights, `(batch, heads, queries, tokens)`.
    """
    logits = query @ key.transpose(-1, -2) * scaling  # (batch, heads, queries, tokens)
    if sizes is not None:
        logits = logits + (proportional_bias(sizes, key.dtype) if bias is None else bias)
    weights = F.dropout(logits.softmax(dim=-1), dropout, training=dropout > 0)
    return (weights @ value).transpose(1, 2), weights


def proportional_bias(sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bias of proportional attention, `log(size)` of every key token (ToMe, eq. 1).

    Args:
        sizes: Float32 `(batch, tokens)`.
        dtype: Dtype of the attention's queries and keys.

    Returns:
        `(batch, 1, 1, tokens)`, an additive attention mask. On a GPU its rows start at multiples of 8 elements.
    """
    batch, tokens = sizes.shape
    logs = sizes.double().log() if dtype == torch.float64 else sizes.log()
    if sizes.device.type == "cpu":
        logs = logs if dtype == logs.dtype else logs.to(dtype)
        return logs.view(batch, 1, 1, tokens)
    # otherwise torch would copy the mask for all heads and queries into rows that are aligned
    storage = sizes.new_empty((batch, 1, 1, padded(tokens)), dtype=dtype)
    bias = storage[..., :tokens]
    bias.copy_(logs.view(batch, 1, 1, tokens))
    return bias


def padded(tokens: int) -> int:
    """The length of a row of the bias in memory."""
    return (tokens + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def extend_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sizes: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bias as channels of the heads, for kernels that take no bias and want heads of one width (flash attention).

    Queries get channels of one and keys get `log(size) / scaling`, so that their scaled product adds `log(size)`. It is
    split over two channels, of which the second holds what rounding to half precision took from the first. Six more
    channels of zeros keep the head dimension a multiple of eight. In half precision this is as accurate as attention
    without sizes.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        sizes: Float32 `(batch, tokens)`.
        scaling: The factor of the attention logits.

    Returns:
        Query, key and value with eight channels more. The attention's output has them too, to be cut off.
    """
    bias = sizes.log()[:, None, :, None] / scaling  # (batch, 1, tokens, 1)
    high = bias.to(key.dtype)
    low = (bias - high.float()).to(key.dtype)
    extra = F.pad(torch.cat([high, low], dim=-1), (0, 6))  # (batch, 1, tokens, 8)
    extra = extra.expand(*key.shape[:-1], 8)  # (batch, heads, tokens, 8)
    query = F.pad(query, (0, 8), value=1.0)
    key = torch.cat([key, extra], dim=-1)
    value = F.pad(value, (0, 8))
    return query, key, value


def weigh_values(value: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Values for attention without any bias: `softmax(qk + log s) v = softmax(qk) (s v) / softmax(qk) s`.

    Values are multiplied by their sizes, and one more channel holds the sizes; `divide_weights` divides by what
    attention makes of it. Queries and keys stay as they are. In half precision the division rounds once more than
    `extend_heads` does.

    Args:
        value: `(batch, heads, tokens, head_dim)`.
        sizes: Float32 `(batch, tokens)`.

    Returns:
        `(batch, heads, tokens, width)`, where the width is the next multiple of eight above `head_dim`.
    """
    head_dim = value.shape[-1]
    weights = (sizes / WEIGHT_UNIT).to(value.dtype)[:, None, :, None]  # (batch, 1, tokens, 1)
    weighed = F.pad(value * weights, (0, padded(head_dim + 1) - head_dim))  # (batch, heads, tokens, width)
    weighed[..., head_dim : head_dim + 1] = weights
    return weighed


def divide_weights(output: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What attention made of `weigh_values`, divided by its channel of weights: `(..., width)` to `(..., head_dim)`."""
    return output[..., :head_dim] / output[..., head_dim : head_dim + 1]


def attend_with_score_mod(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor,
    scaling: float,
    flex: Callable[..., Any],
) -> torch.Tensor:
    """Proportional attention by `flex_attention`, which reads one number for each key instead of a mask.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        sizes: Float32 `(batch, tokens)`.
        scaling: The factor of the attention logits.
        flex: torch's `flex_attention`, compiled or not.

    Returns:
        `(batch, queries, heads, head_dim)`.
    """
    logs = sizes.log()  # (batch, tokens)

    def add_log_size(score, batch, head, query_position, key_position):
        return score + logs[batch, key_position]

    return flex(query, key, value, score_mod=add_log_size, scale=scaling).transpose(1, 2)


def attend_efficiently(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention with a bias in torch's memory-efficient kernel, without a backward pass, on NVIDIA GPUs.

    The operator is called by its name, because `torch.nn.attention.sdpa_kernel` sets flags of the whole process: two
    threads that use it at once can leave the other kernels switched off for good.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        bias: `(batch, 1, 1, tokens)`, aligned as `proportional_bias` makes it.
        scaling: The factor of the attention logits.

    Returns:
        `(batch, queries, heads, head_dim)`.
    """
    batch, heads, queries, _ = query.shape
    bias = bias.expand(batch, heads, queries, key.shape[2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    output, *_ = operator(query, key, value, bias, False, 0.0, False, scale=scaling)
    return output.transpose(1, 2)


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor | None,
    scaling: float,
    dropout: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`scaled_dot_product_attention`: `(batch, queries, heads, head_dim)`."""
    if sizes is not None and bias is None:
        bias = proportional_bias(sizes, key.dtype)
    if bias is not None and prefers_efficient(query, key, value, dropout):
        return attend_efficiently(query, key, value, bias, scaling)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2)


def prefers_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether attention with a bias is to run in the memory-efficient kernel, where torch would choose cuDNN's."""
    if query.device.type != "cuda":
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % ALIGNMENT or dropout > 0:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    # an exported program is to run on other devices too
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return key.shape[2] <= MAX_EFFICIENT_TOKENS and _chooses_cudnn(query.device)


@torch.compiler.assume_constant_result
def _chooses_cudnn(device: torch.device) -> bool:
    """Whether torch's own choice on a device would be cuDNN's kernel, and the other one is not switched off."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def _is_stock(implementation: str) -> bool:
    """Whether an implementation is transformers' own, and not one that somebody registered in its place."""
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation == "sdpa":
        return function is sdpa_attention_forward
    # its module needs parts of torch that take a while to import
    return function.__module__ == "transformers.integrations.flex_attention"


def _compiled_flex(module: nn.Module) -> Callable[..., Any]:
    """torch's `flex_attention` as transformers compiles it, once for a process; within a compiled model as it is."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        return compile_friendly_flex_attention(query, key, value, training=module.training, **kwargs)

    return flex
