# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Where merged tokens are, for models that rotate queries and keys by the position of each token.

Rotary angles are coordinates times frequencies, so every token of fractional coordinates has angles too: a merged token
stands at the size-weighted mean of its members' coordinates, as its features are their size-weighted mean.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.state import Rotation, TokenState


class Positions(Protocol):
    """How the attention of a family knows where its tokens are."""

    @property
    def module(self) -> str | None:
        """Path, in the backbone, of the module that computes positions once for all layers, if there is one."""

    def coordinates(self, tome: TokenState, attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Coordinates of the tokens that enter the first layer, float32 `(batch, tokens, axes)`."""

    def rotate(
        self,
        tome: TokenState,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys.

        Args:
            tome: State of the forward call.
            attention: The attention block.
            query: `(batch, queries, heads, head_dim)`, the first ones of the tokens.
            key: `(batch, tokens, heads, head_dim)`.
            coordinates: Of the tokens, float32 `(batch, tokens, axes)`; `None` where none has merged yet.
            kwargs: What the attention was called with besides. What belongs to positions is taken out.

        Returns:
            The two in the shapes and dtypes that they came in.
        """


@dataclass(frozen=True)
class AxialRotary:
    """Rows and columns, each with half of the angles; layers are handed cosine and sine (DINOv3, MLCD).

    A head's channels are the angles of the rows, those of the columns, and both once more.

    Attributes:
        module: Path of the module that makes cosine and sine, with its frequencies as `inv_freq`.
        unit: The angle, in radians, of coordinate 1 at frequency 1.
        extent: More than any coordinate.
        follows_inputs: Whether cosine and sine have the dtype of the module's input; otherwise they are float32.
    """

    module: str
    unit: float
    extent: float
    follows_inputs: bool

    def read(self, cos: torch.Tensor, sin: torch.Tensor, inv_freq: torch.Tensor) -> Rotation:
        """Where the patches are, from cosine and sine of their angles, float32 `(patches, head_dim)`.

        In training mode models jitter coordinates at random, so they are read off what was made of them.
        """
        frequencies = self.unit * inv_freq.float()  # (head_dim / 4,)
        count = len(frequencies)
        # the lowest frequency goes round less than once over all coordinates, so its angle tells them
        lowest = [count - 1, 2 * count - 1]
        coordinates = torch.atan2(sin[:, lowest], cos[:, lowest]) / frequencies[-1]  # (patches, 2)
        return Rotation(coordinates, frequencies)

    def coordinates(self, tome: TokenState, attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        known = _rotation(tome).coordinates  # (patches, 2)
        prefix = known.new_zeros(tokens - known.shape[0], known.shape[1])
        return torch.cat([prefix, known]).expand(batch, -1, -1)

    def rotate(
        self,
        tome: TokenState,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = kwargs.pop("position_embeddings")  # (patches, head_dim), of some models (tokens, head_dim)
        if coordinates is None:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
            prefix = key.shape[1] - cos.shape[1]
        else:
            patches, frequencies = _rotation(tome)
            protected = tome.settings.protected
            angles = coordinates[:, protected:, :, None] * frequencies  # (batch, patches, 2, head_dim / 4)
            angles = angles.flatten(2).tile(2)  # (batch, patches, head_dim)
            # rows of class tokens, in models that rotate them by angles of their own
            own = cos.shape[0] - patches.shape[0]
            cos = torch.cat([cos[:own].expand(angles.shape[0], -1, -1), angles.cos().to(cos.dtype)], dim=1)
            sin = torch.cat([sin[:own].expand(angles.shape[0], -1, -1), angles.sin().to(sin.dtype)], dim=1)
            prefix = protected - own
        return _rotate_behind(query, cos, sin, prefix), _rotate_behind(key, cos, sin, prefix)


@dataclass(frozen=True)
class ClipRotary:
    """Frame, row and column, computed by every attention block from the numbers of its tokens (V-JEPA 2)."""

    module: str | None = None

    def coordinates(self, tome: TokenState, attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        axes = torch.stack(attention.get_position_ids(hidden_states), dim=-1)  # type: ignore[operator]
        return axes.float().expand(hidden_states.shape[0], -1, -1)  # (batch, tokens, 3)

    def rotate(
        self,
        tome: TokenState,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs.pop("position_mask", None)
        if coordinates is None:
            coordinates = self.coordinates(tome, attention, key)  # (batch, tokens, 3)
        axes = coordinates.unsqueeze(1).unbind(-1)  # 3 times (batch, 1, tokens)
        rotated = [attention.apply_rotary_embeddings(part.transpose(1, 2), axes) for part in (query, key)]  # type: ignore[operator]
        query_rotated, key_rotated = (part.transpose(1, 2).to(query.dtype) for part in rotated)
        return query_rotated, key_rotated


def require_low_frequency(module: nn.Module, positions: AxialRotary) -> None:
    """Refuse rotary positions whose lowest frequency is too high to tell coordinates by.

    Raises:
        UnsupportedModelError: if heads have so few channels.
    """
    frequencies = cast(torch.Tensor, module.inv_freq)
    if positions.unit * positions.extent * float(frequencies[-1]) >= math.pi:
        raise UnsupportedModelError(
            f"{type(module).__name__} has too few frequencies ({len(frequencies)}) to tell where a token is: token "
            "merging needs heads of at least 8 channels in a model with rotary positions."
        )


def _rotation(tome: TokenState) -> Rotation:
    if tome.rotation is None:
        raise UnsupportedModelError(
            "The layers of this model were called without its rotary positions, so token merging cannot tell where "
            "its tokens are. Call the model as a whole."
        )
    return tome.rotation


def _rotate_behind(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int) -> torch.Tensor:
    """Rotate all but the first `prefix` of `(batch, tokens, heads, head_dim)` by `(batch or 1, tokens, head_dim)`."""
    first, behind = heads[:, :prefix], heads[:, prefix:]
    cos = cos[:, : behind.shape[1]].unsqueeze(2)  # (batch or 1, tokens, 1, head_dim)
    sin = sin[:, : behind.shape[1]].unsqueeze(2)
    half = behind.shape[-1] // 2
    turned = torch.cat([-behind[..., half:], behind[..., :half]], dim=-1)
    rotated = (behind * cos + turned * sin).to(heads.dtype)
    return torch.cat([first, rotated], dim=1) if prefix else rotated
