# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a model of timm does with its layers itself: recompute them, and make maps of what inner ones put out."""

import functools
from typing import Any, cast

import torch

from tocom_hf.merging.layers import Merging
from tocom_hf.merging.state import TokenState, running_call
from tocom_hf.merging.tokens import follow_tokens, restore_tokens


class MergingVisionTransformer(Merging):
    """Mixin for timm's `VisionTransformer`."""

    def forward_features(self, x, **kwargs):
        return self.stock_class.forward_features(self._recomputing(), x, **kwargs)  # type: ignore[attr-defined]

    def forward_intermediates(
        self,
        x,
        indices=None,
        return_prefix_tokens=False,
        norm=False,
        stop_early=False,
        output_fmt="NCHW",
        intermediates_only=False,
        output_dict=False,
        **kwargs,
    ):
        """Maps of inner layers: what merged is copied back to its places, which a map of the grid cannot do without."""
        stock_forward = functools.partial(
            self.stock_class.forward_intermediates,  # type: ignore[attr-defined]
            self._recomputing(),
            x,
            indices,
            norm=norm,
            stop_early=stop_early,
            **kwargs,
        )
        tome = running_call()
        if tome is None or not any(tome.settings.schedule):
            return stock_forward(
                return_prefix_tokens=return_prefix_tokens,
                output_fmt=output_fmt,
                intermediates_only=intermediates_only,
                output_dict=output_dict,
            )
        # rows of tokens, of which each has as many as merged up to its layer
        found = stock_forward(
            return_prefix_tokens=return_prefix_tokens,
            output_fmt="NLC",
            intermediates_only=intermediates_only,
            output_dict=True,
        )
        layers = _taken_layers(indices, len(cast(Any, self.blocks)))
        patches = [
            _restored(part, tome, layer) for part, layer in zip(found["image_intermediates"], layers, strict=True)
        ]  # every (batch, patches, hidden)
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])  # type: ignore[union-attr, operator]
            patches = [part.transpose(1, 2).unflatten(2, (height, width)).contiguous() for part in patches]
        found["image_intermediates"] = patches
        if output_dict:
            return found
        maps: list[Any] = patches
        if "image_intermediates_prefix" in found:
            maps = list(zip(patches, found["image_intermediates_prefix"], strict=True))
        return maps if intermediates_only else (found["image_features"], maps)

    def _recomputing(self) -> Any:
        """This model; one with layers that keep the call in hand where timm recomputes them.

        timm's checkpoints call a layer a second time when the call of the backbone has ended.
        """
        tome = running_call()
        if not self.grad_checkpointing or tome is None:
            return self
        layers = cast(Any, self.blocks).children()
        view = self.__new__(type(self))
        bound = [functools.partial(layer, tome=tome) for layer in layers]
        view.__dict__.update(self.__dict__, _modules={**self._modules, "blocks": bound})
        return view


def _taken_layers(indices: Any, count: int) -> list[int]:
    """The numbers of the layers that timm's `forward_intermediates` records, in the order of the model."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        return list(range(count - indices, count))
    return sorted({index % count for index in indices})


def _restored(patches: torch.Tensor, tome: TokenState, layer: int) -> torch.Tensor:
    """Patch tokens behind a layer, copied back to the places that they came from."""
    positions = follow_tokens(tome.plans[index] for index in sorted(tome.plans) if index <= layer)
    protected = tome.settings.protected
    # the last layer has restored its own
    if positions is None or positions.shape[1] == patches.shape[1] + protected:
        return patches
    return restore_tokens(patches, positions[:, protected:] - protected)
