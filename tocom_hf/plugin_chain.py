# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugins in training: all of them beside the frozen projections of a model, of which a step uses a signed slice."""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from .architectures import Backbone
from .composition import Adapter, Factors, chain
from .keyed_random import fold, keep_mask


class ActiveChain(NamedTuple):
    """What the branches do in a forward call.

    Attributes:
        rows: The rows of the factors that are in use.
        factor: Sign times scale.
        keys: int64 `(batch,)`, keys of the images, which dropout is drawn from; `None` for no dropout.
    """

    rows: slice
    factor: float
    keys: torch.Tensor | None


class PluginChain(nn.Module):
    """The plugins of all degrees as one low-rank branch for each layer.

    The factors of plugin `P_i_i+1` are rows `i * rank .. (i + 1) * rank`, so the chain between two degrees is a
    contiguous slice, whatever its length. Query and value read the same input, so they share one matrix product with
    `lora_A`; in all, a layer costs three small ones.

    The branches are not part of the model: only the projections that call them are. What wraps or shards the model's
    weights leaves them alone.

    Args:
        backbone: Where the branches are installed.
        max_r: Number of plugins.
        rank: Rank h of one plugin.
        scale: Factor s.
        dropout: Dropout probability between the two factors.
    """

    def __init__(self, backbone: Backbone, max_r: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.max_r, self.rank, self.scale = max_r, rank, scale
        projections = list(backbone.projections().items())
        self.layers = nn.ModuleList()
        self.paths: list[tuple[str, str]] = []
        for index in range(len(backbone.layers)):
            pair = projections[2 * index : 2 * index + 2]
            layer = LayerBranch(index, cast(nn.Linear, pair[0][1]), max_r * rank, dropout)
            self.layers.append(layer)
            self.paths.append((pair[0][0], pair[1][0]))
            for part, (path, base) in enumerate(pair):
                backbone.module.set_submodule(path, ProjectionWithPlugins(base, layer, part))

    def activate(self, source_r: int, target_r: int, keys: torch.Tensor | None = None) -> None:
        """Use the signed chain between two degrees from now on; none where they are equal.

        Args:
            source_r, target_r: The degrees m and n.
            keys: int64 `(batch,)`, keys of the images; with them and in training mode the branches drop out.
        """
        indices, sign = chain(source_r, target_r)
        rows = slice(indices.start * self.rank, indices.stop * self.rank)
        for layer in self._layers():
            layer.active = ActiveChain(rows, sign * self.scale, keys) if sign else None
            layer.shared = None

    @torch.no_grad()
    def start_from(self, adapters: Mapping[int, Adapter]) -> None:
        """Take over plugins: one for each of the chain, by index, of its rank and for its scale."""
        for i in range(self.max_r):
            rows = slice(i * self.rank, (i + 1) * self.rank)
            for layer, paths in zip(self._layers(), self.paths, strict=True):
                for part, path in enumerate(paths):
                    layer.lora_A[part, rows] = adapters[i][path].lora_A.to(layer.lora_A)
                    layer.lora_B[part, rows] = adapters[i][path].lora_B.t().to(layer.lora_B)

    def adapters(self) -> dict[int, dict[str, Factors]]:
        """The plugins by index, as float32 copies on the CPU."""
        return {
            i: {
                path: layer.factors(part, slice(i * self.rank, (i + 1) * self.rank))
                for layer, paths in zip(self._layers(), self.paths, strict=True)
                for part, path in enumerate(paths)
            }
            for i in range(self.max_r)
        }

    def remove(self, backbone: Backbone) -> None:
        """Put the original projections back."""
        for pair in self.paths:
            for path in pair:
                backbone.module.set_submodule(path, cast(nn.Module, backbone.module.get_submodule(path).base))

    def _layers(self) -> list["LayerBranch"]:
        return cast(list[LayerBranch], list(self.layers))


class LayerBranch(nn.Module):
    """The low-rank branches beside query and value of one layer.

    `lora_A` is `(2, rows, in)` and starts as in PEFT; `lora_B`, stored transposed, is `(2, rows, out)` and starts at
    zero.
    """

    def __init__(self, index: int, base: nn.Linear, rows: int, dropout: float):
        super().__init__()
        device = base.weight.device
        self.index, self.dropout = index, dropout
        self.lora_A = nn.Parameter(torch.empty(2, rows, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(2, rows, base.out_features, device=device))
        # the bound of kaiming_uniform_ with a = sqrt(5), which is what PEFT starts with
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(base.in_features), 1 / math.sqrt(base.in_features))
        self.active: ActiveChain | None = None
        # the input that query has read and what value needs of it
        self.shared: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor, part: int) -> torch.Tensor:
        """The output of a projection plus its branch.

        Args:
            hidden_states: `(batch, tokens, in)`, the input of the projection.
            output: `(batch, tokens, out)`, its output.
            part: 0 for query, 1 for value.
        """
        if self.active is None:
            return output
        if part == 1 and self.shared is not None and self.shared[0] is hidden_states:
            inner, self.shared = self.shared[1], None
        else:
            down = self._down(hidden_states)
            inner, other = (down[..., half] for half in self._halves(part))
            self.shared = (hidden_states, other) if part == 0 else None
        lora_B = self.lora_B[part, self.active.rows].to(inner.dtype)
        if output.dtype != inner.dtype:
            return output + inner @ lora_B
        flat = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), lora_B)
        return flat.view(output.shape)

    def factors(self, part: int, rows: slice) -> Factors:
        lora_A, lora_B = self.lora_A.detach()[part, rows], self.lora_B.detach()[part, rows].t()
        return Factors(lora_A.float().cpu().clone(), lora_B.float().cpu().contiguous().clone())

    def _down(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, 2 * active rows)`: the input times `lora_A` of query and value, times sign and scale.

        Dropout is applied to this product, as in the authors' release, not to the much wider input, as in PEFT.
        """
        rows, factor, keys = cast(ActiveChain, self.active)
        lora_A = self.lora_A[:, rows].flatten(0, 1)
        if not (self.training and self.dropout and keys is not None):
            return F.linear(hidden_states, (lora_A * factor).to(hidden_states.dtype))
        down = F.linear(hidden_states, (lora_A * (factor / (1 - self.dropout))).to(hidden_states.dtype))
        return down * keep_mask(fold(keys, self.index), down.shape[1], down.shape[2], self.dropout)

    def _halves(self, part: int) -> tuple[slice, slice]:
        rows = cast(ActiveChain, self.active).rows
        half = rows.stop - rows.start
        halves = slice(0, half), slice(half, 2 * half)
        return halves[part], halves[1 - part]


class ProjectionWithPlugins(nn.Module):
    """A frozen projection and the branch beside it."""

    branch: LayerBranch

    def __init__(self, base: nn.Module, branch: LayerBranch, part: int):
        super().__init__()
        self.base, self.part = base, part
        # the branch belongs to the chain: registered once, so that its parameters have one name
        object.__setattr__(self, "branch", branch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.branch(hidden_states, self.base(hidden_states), self.part)
