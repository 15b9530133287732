# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The weights that plugins fold into: what they were, what they are, and what they shall be at another degree."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tocom_hf.errors import ComposedWeightsError, DegreeError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe
from tocom_hf.merging.schedule import require_degree
from tocom_hf.plugins.composition import Composite
from tocom_hf.plugins.plugin_set import PluginSet


@dataclass
class TocomState:
    """What a `TocomModel` knows beyond its transformers class.

    Attributes:
        source_r: The degree that the weights were trained at.
        target_r: The degree that the model runs at.
        scale: The factor s asked for, or `None` for what the plugin set recommends.
        plugins: The plugin set, or `None` for a model that only ever runs at its source degree.
        source_weights: The weights at `source_r` that plugins fold into, query and value by default, by layer path in
            the backbone; empty while the model runs at that degree.
        recipe: How tokens merge.
        checksums: Of the composed weights as the last switch wrote them, by layer path; empty as `source_weights` is.
    """

    source_r: int
    target_r: int
    scale: float | None
    plugins: PluginSet | None
    recipe: MergeRecipe = TOME_RECIPE
    source_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    checksums: dict[str, int | None] = field(default_factory=dict)

    @property
    def target_modules(self) -> Iterable[str] | None:
        """The linear layers, by name in a transformer layer, whose weights plugins fold into."""
        return None if self.plugins is None else self.plugins.config.target_modules


def composite_for(state: TocomState, target_r: int, scale: float | None) -> Composite | None:
    """The composite for a degree; `None` for a model without plugins, which runs at its source degree only."""
    if state.plugins is not None:
        return state.plugins.compose(state.source_r, target_r, scale)
    if require_degree(target_r, "target_r") != state.source_r:
        raise DegreeError(
            f"target_r={target_r} differs from source_r={state.source_r}, and the model has no plugins to compensate. "
            "Load it with TocomModel.from_pretrained(..., plugins=...)."
        )
    return None


def composed_weights(state: TocomState) -> dict[str, torch.Tensor]:
    """The weights at the current degree, computed from the kept source weights; empty at the source degree."""
    if not state.source_weights:
        return {}
    composite = composite_for(state, state.target_r, state.scale)
    if composite is None:
        return {}
    return {path: composite.apply(path, weight) for path, weight in state.source_weights.items()}


def live_weights(backbone: Backbone, target_modules: Iterable[str] | None) -> dict[str, torch.Tensor]:
    """The live weights that plugins fold into, by layer path. Takes what `projection_paths` takes.

    Raises:
        UnsupportedModelError: if one of them is not an ordinary matrix in memory (quantised, offloaded, adapted).
    """
    weights = {}
    for path, module in backbone.projections(target_modules).items():
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) and type(weight) is nn.Parameter
        if weight is None or not plain or not weight.is_floating_point() or weight.is_meta:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) is not an ordinary linear layer in memory, so plugins cannot be "
                "folded into its weight. Compose before quantising, load without offloading to disk, and merge other "
                "adapters first (merge_and_unload)."
            )
        weights[path] = weight
    return weights


def verified_source_weights(state: TocomState, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The kept source weights, after a check that the live ones are still what the last switch composed from them.

    Their bits are compared by checksum: composing the weights a second time would prove no more and take longer.

    Raises:
        ComposedWeightsError: if they are not.
    """
    for path, expected in state.checksums.items():
        if checksum(weights[path]) != expected:
            raise ComposedWeightsError(
                f"{path}.weight was changed while composed for target_r={state.target_r} (by training, or by "
                "loading a state dict?). Call model.rebase() to make the weights as they are now a checkpoint of "
                f"source_r={state.target_r}. To train at the source degree, call "
                f"model.set_target_r({state.source_r}) first."
            )
    return state.source_weights


def checksum(weight: torch.Tensor) -> int | None:
    """A number for the bits of a weight, or `None` where it has none (on the meta device).

    Every eight bytes, read as an integer, count with an odd factor of their own, modulo 2^64. So a change within eight
    bytes always shows, and the sum depends neither on its order nor on the number of threads.
    """
    if weight.is_meta:
        return None
    size = weight.element_size()
    values = weight.detach().flatten()
    missing = -values.numel() * size % 8 // size
    misaligned = values.storage_offset() * size % 8
    if missing or misaligned:
        values = F.pad(values, (0, missing)).clone()
    words = values.view(torch.int64)
    odd = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return int((words * odd).sum().item())


@torch.no_grad()
def copy_weights(source: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the live ones of the same paths."""
    for path, weight in source.items():
        weights[path].copy_(weight)
