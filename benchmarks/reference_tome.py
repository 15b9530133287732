# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The reference algorithm of ToMe on a transformers ViT, step by step as the paper's release does it, for comparison.

Full sorts, one gather or scatter for each tensor, sizes merged in a pass of their own, state in a dictionary that all
layers share, and attention written out as in the release. With `fused_attention` that runs through torch's fused
kernels, as dense transformers models and tocom_hf do.
"""

import functools

import torch
import torch.nn.functional as F


def soft_matching(metric, r):
    """The merge function of one layer, for sequences that begin with a class token."""
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        a, b = metric[..., ::2, :], metric[..., 1::2, :]
        scores = a @ b.transpose(-1, -2)
        scores[..., 0, :] = float("-inf")
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        unmerged, source = order[..., r:, :], order[..., :r, :]
        target = partner[..., None].gather(dim=-2, index=source)
        unmerged = unmerged.sort(dim=1)[0]  # the class token comes first again

    def merge(x, mode):
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        batch, count, channels = even.shape
        kept = even.gather(dim=-2, index=unmerged.expand(batch, count - r, channels))
        moved = even.gather(dim=-2, index=source.expand(batch, r, channels))
        odd = odd.scatter_reduce(-2, target.expand(batch, r, channels), moved, reduce=mode)
        return torch.cat([kept, odd], dim=1)

    return merge


def layer_forward(layer, state, r, fused_attention, hidden_states, attention_mask=None, **kwargs):
    attention = layer.attention
    residual = hidden_states
    hidden_states = layer.layernorm_before(hidden_states)
    batch, tokens, _ = hidden_states.shape

    def heads(projection):
        return projection(hidden_states).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)

    query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    size = state.get("size")
    bias = None if size is None else size.log()[:, None, None, :, 0].to(query.dtype)
    if fused_attention:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    else:
        logits = (query @ key.transpose(-2, -1)) * attention.scaling
        mixed = (logits if bias is None else logits + bias).softmax(dim=-1) @ value
    hidden_states = residual + attention.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
    r = min(r, (tokens - 1) // 2)
    if r > 0:
        merge = soft_matching(key.mean(1), r)
        size = torch.ones_like(hidden_states[..., :1]) if size is None else size
        merged = merge(hidden_states * size, "sum")
        state["size"] = merge(size, "sum")
        hidden_states = merged / state["size"]
    return hidden_states + layer.mlp(layer.layernorm_after(hidden_states))


def apply_reference_tome(model, r, fused_attention=False):
    """Patch a `ViTForImageClassification` or `ViTModel` in place."""
    backbone = getattr(model, "vit", model)
    state = {}
    backbone.register_forward_pre_hook(lambda *_: state.clear())
    for layer in backbone.layers:
        layer.forward = functools.partial(layer_forward, layer, state, r, fused_attention)
    return model
