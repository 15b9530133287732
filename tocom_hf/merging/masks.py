# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Padding masks: one that hides nothing is accepted, one that hides a token is refused before any layer runs.

A merged token of an image and of its padding would be neither. Masks have many names, and some models make their own
from those; so both what a backbone is called with and what reaches its first layer are looked at. Masks of the image
itself, as masked image modelling has them (`bool_masked_pos`), hide no token from attention.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tocom_hf.errors import UnsupportedInputError


# the ends of the names of arguments that hide tokens from attention (`pixel_attention_mask`)
_MASKS = ("attention_mask", "padding_mask", "pixel_mask", "attn_mask")
# the beginnings of the names of arguments that tell several images in one sequence apart
_PACKED = ("cu_seqlens", "cu_seq_lens")


def refuse_hidden_tokens(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse masks that hide tokens, and several images in one sequence, among the arguments of a call.

    Where the values of tensors are not known while the code runs (`torch.compile`, `torch.export`), the graph gets an
    assertion instead, which raises a `RuntimeError` when it runs.

    Args:
        names: Names of the positional arguments, as `argument_names` gives them.
        args, kwargs: The arguments.

    Raises:
        UnsupportedInputError: if one of them hides tokens, packs images, or makes attention causal.
    """
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if value is None:
            continue
        if name.startswith(_PACKED):
            raise UnsupportedInputError(
                f"{name} packs several images into one sequence, where token merging would merge tokens of different "
                "images. Call the model with one image a row, or undo apply_tome first with remove_tome(model)."
            )
        if name == "is_causal" and value:
            raise UnsupportedInputError(
                "is_causal hides from every token those behind it, and a merged token has no single place in that "
                "order. Call the model without is_causal, or undo apply_tome first with remove_tome(model)."
            )
        if name.endswith(_MASKS):
            _require_ones(name, value)


def refuse_hidden_keys(stock_class: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> None:
    """What `refuse_hidden_tokens` does, for the first layer of a model, which may have made its mask itself.

    Args:
        stock_class: The class of transformers whose forward runs.
        args, kwargs: What it is called with behind the hidden states.

    Raises:
        UnsupportedInputError: if a mask among them hides tokens, or images are packed.
    """
    if torch.compiler.is_compiling():
        # transformers makes a mask even where nothing is hidden, and what it is made of has been asserted
        return
    # the mask of flex_attention is no tensor, and made even where nothing is hidden
    tensors = tuple(value if isinstance(value, torch.Tensor) else None for value in args)
    named = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    names = argument_names(stock_class.forward) if args else ()
    refuse_hidden_tokens(names[1:], tensors, named)


@functools.cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a method behind `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _require_ones(name: str, mask: Any) -> None:
    message = (
        f"{name} hides tokens, and token merging takes no mask that does: a token merged of an image and its padding "
        f"would be neither. Bring the images to one size without padding and leave {name} out (one of ones is "
        "accepted), or undo apply_tome first with remove_tome(model)."
    )
    if not isinstance(mask, torch.Tensor):
        raise UnsupportedInputError(f"{name} must be a torch.Tensor, got {type(mask).__name__}.")
    if mask.device.type == "meta":
        return
    hidden = mask != 0 if _is_additive(mask) else mask == 0
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        torch._assert_async(~hidden.any(), message)
    elif bool(hidden.any()):
        raise UnsupportedInputError(message)


def _is_additive(mask: torch.Tensor) -> bool:
    """Whether a mask is added to the logits of attention, where 0 hides nothing; others are 1 where they hide nothing.

    Models prepare additive masks with dimensions for heads and queries: `(batch, heads, queries, keys)`.
    """
    return mask.is_floating_point() and mask.ndim == 4
