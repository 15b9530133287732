# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""State dicts of a model whose weights are composed: marked when they are taken, refused where they would be wrong.

The mark is an entry of `_metadata`, which torch keeps beside the entries of a state dict, hands to every module that
loads it, and writes with `torch.save`. So no key is added, and stock classes load the dict. Whatever makes a plain
dictionary of it drops the mark: a comprehension, safetensors.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tocom_hf.errors import ComposedWeightsError
from tocom_hf.model.folding import TocomState, checksum


_MARK = "tocom"


def mark_composed(state: TocomState, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Record in a state dict that the weights of the module at a prefix are composed, if they are."""
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None and state.source_weights:
        entry = metadata.setdefault(prefix.removesuffix("."), {})
        entry[_MARK] = {"source_r": state.source_r, "target_r": state.target_r}


def mark_of(local_metadata: Mapping[str, Any]) -> dict[str, int] | None:
    """The mark in what a state dict records of one module, or `None`."""
    mark = local_metadata.get(_MARK)
    return mark if isinstance(mark, dict) and {"source_r", "target_r"} <= mark.keys() else None


def require_source_weights(state_dict: Mapping[str, torch.Tensor] | None) -> None:
    """Raise `ComposedWeightsError` if a model's own state dict is marked as composed."""
    _require_unmarked(mark_of(getattr(state_dict, "_metadata", {}).get("", {})))


def require_loadable(
    state: TocomState, path: str, weights: Mapping[str, torch.Tensor], local_metadata: Mapping[str, Any]
) -> None:
    """Refuse weights that do not belong to the degree that a model runs at.

    Args:
        state: What the model that shall load them knows.
        path: The path of its backbone.
        weights: The weights by their names in the model.
        local_metadata: What the state dict records of this model.

    Raises:
        ComposedWeightsError: if they are composed for another degree, or would replace composed ones.
    """
    mark = mark_of(local_metadata)
    if not state.source_weights:
        _require_unmarked(mark)
        return
    prefix = f"{path}." if path else ""
    for layer, expected in state.checksums.items():
        found = weights.get(f"{prefix}{layer}.weight")
        if found is None or expected is None or _checksum_as(found, state.source_weights[layer]) == expected:
            continue
        _require_unmarked(mark)
        raise ComposedWeightsError(
            f"The state dict has other weights for {layer} than those that this model composed for "
            f"target_r={state.target_r}. Weights can be loaded at the source degree: call "
            f"model.set_target_r({state.source_r}), load them, and set the degree again."
        )


def _require_unmarked(mark: dict[str, int] | None) -> None:
    if mark is not None:
        raise ComposedWeightsError(
            f"The state dict was taken from a model composed for target_r={mark['target_r']}, so its weights are no "
            f"checkpoint of source_r={mark['source_r']}. Call set_target_r({mark['source_r']}) on that model before "
            "its state_dict(), or save it with save_pretrained, which writes the weights of the source degree. "
            f"To go on from the composed weights, call rebase() on it: they become a checkpoint of "
            f"source_r={mark['target_r']}."
        )


def _checksum_as(weight: torch.Tensor, like: torch.Tensor) -> int | None:
    """The checksum that a weight would have once it is loaded."""
    return checksum(weight.detach().to(device=like.device, dtype=like.dtype))
