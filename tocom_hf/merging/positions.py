# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Where merged tokens are, for models that rotate queries and keys by the position of each token.

A merged token has the size-weighted mean of what tells its members' places, as its features are their size-weighted
mean: of cosine and sine where layers are handed these, of coordinates where attention computes angles from them. The
first is what keeps features nearest to those without merging, and so does matching by keys that are rotated already
(benchmarks/rotary.md).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tocom_hf.errors import UnsupportedModelError


class Positions(Protocol):
    """How the attention of a family knows where its tokens are."""

    def coordinates(self, attention: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """What tells where tokens are before any of them merges, float32 `(batch, tokens, values)`.

        Args:
            attention: The attention block.
            hidden_states: What it is called with, `(batch, tokens, hidden)`.
            kwargs: What it is called with besides.
        """

    def rotate(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys.

        Args:
            attention: The attention block.
            query: `(batch, queries, heads, head_dim)`, the first ones of the tokens.
            key: `(batch, tokens, heads, head_dim)`.
            coordinates: Of the tokens, float32 `(batch, tokens, values)`; `None` where none has merged yet.
            kwargs: What the attention was called with besides. What belongs to positions is taken out.

        Returns:
            The two in the shapes and dtypes that they came in.
        """


@dataclass(frozen=True)
class AxialRotary:
    """Rows and columns, each with half of the angles; layers are handed cosine and sine (DINOv3, MLCD).

    A head's channels are the angles of the rows, those of the columns, and both once more. What tells the place of a
    token is the cosine of its angles and their sine, once.
    """

    def coordinates(self, attention: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        batch, tokens, _ = hidden_states.shape
        cos, sin = _cosine_and_sine(kwargs)  # (patches, head_dim), of some models (tokens, head_dim)
        half = cos.shape[-1] // 2
        known = torch.cat([cos[:, :half], sin[:, :half]], dim=-1).float()  # (patches, head_dim)
        # tokens in front of those that turn turn by nothing
        prefix = tokens - cos.shape[0]
        still = torch.cat([known.new_ones(prefix, half), known.new_zeros(prefix, half)], dim=-1)
        return torch.cat([still, known]).expand(batch, -1, -1)

    def rotate(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = _cosine_and_sine(kwargs)
        del kwargs["position_embeddings"]
        if coordinates is None:
            prefix = key.shape[1] - cos.shape[0]
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        else:
            prefix = 0
            cos, sin = (
                part.to(cos.dtype).tile(2) for part in coordinates.chunk(2, dim=-1)
            )  # (batch, tokens, head_dim)
        return _rotate_behind(query, cos, sin, prefix), _rotate_behind(key, cos, sin, prefix)


@dataclass(frozen=True)
class ClipRotary:
    """Frame, row and column, computed by every attention block from the numbers of its tokens (V-JEPA 2)."""

    def coordinates(self, attention: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        axes = torch.stack(attention.get_position_ids(hidden_states), dim=-1)  # type: ignore[operator]
        return axes.float().expand(hidden_states.shape[0], -1, -1)  # (batch, tokens, 3)

    def rotate(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        coordinates: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kwargs.pop("position_mask", None)
        if coordinates is None:
            coordinates = self.coordinates(attention, key, kwargs)  # (batch, tokens, 3)
        axes = coordinates.unsqueeze(1).unbind(-1)  # 3 times (batch, 1, tokens)
        rotated = [attention.apply_rotary_embeddings(part.transpose(1, 2), axes) for part in (query, key)]  # type: ignore[operator]
        query_rotated, key_rotated = (part.transpose(1, 2).to(query.dtype) for part in rotated)
        return query_rotated, key_rotated


def _cosine_and_sine(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if kwargs.get("position_embeddings") is None:
        raise UnsupportedModelError(
            "The layers of this model were called without its rotary positions (position_embeddings), so token merging "
            "cannot tell where its tokens are. Call the model as a whole."
        )
    return kwargs["position_embeddings"]


def _rotate_behind(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int) -> torch.Tensor:
    """Rotate all but the first `prefix` of `(batch, tokens, heads, head_dim)` by `(batch or 1, tokens, head_dim)`."""
    first, behind = heads[:, :prefix], heads[:, prefix:]
    cos = cos[:, : behind.shape[1]].unsqueeze(2)  # (batch or 1, tokens, 1, head_dim)
    sin = sin[:, : behind.shape[1]].unsqueeze(2)
    half = behind.shape[-1] // 2
    turned = torch.cat([-behind[..., half:], behind[..., :half]], dim=-1)
    rotated = (behind * cos + turned * sin).to(heads.dtype)
    return torch.cat([first, rotated], dim=1) if prefix else rotated
