# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugins in training: all of them beside the frozen projections of a model, of which a step uses a signed slice."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from tocom_hf.distillation.keyed_random import fold, keep_mask
from tocom_hf.merging.backbones import Backbone
from tocom_hf.plugins.composition import Adapter, Factors, chain
from tocom_hf.plugins.fused import join_query_and_value, split_query_and_value


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
    """The plugins of all degrees as low-rank branches, one for each group of linear layers that read the same input.

    The factors of plugin `P_i_i+1` are rows `i * rank .. (i + 1) * rank`, so the chain between two degrees is a
    contiguous slice, whatever its length. Query and value (and key) read the same input, so they share one matrix
    product with `lora_A`: with query and value alone, a layer costs three small ones.

    Where query, key and value are one projection, the plugins of query and value are the same two parts, added to their
    thirds of its output: the key has none, so training cannot change it.

    The branches are not part of the model: only the projections that call them are. What wraps or shards the model's
    weights leaves them alone.

    Args:
        backbone: Where the branches are installed.
        max_r: Number of plugins.
        rank: Rank h of one plugin.
        scale: Factor s.
        dropout: Dropout probability between the two factors.
        target_modules: Names, in a transformer layer, of the linear layers; by default query and value.
    """

    def __init__(
        self,
        backbone: Backbone,
        max_r: int,
        rank: int,
        scale: float,
        dropout: float,
        target_modules: Iterable[str] | None = None,
    ):
        super().__init__()
        self.max_r = max_r
        self.rank = rank
        self.scale = scale
        self.fused = target_modules is None and backbone.architecture.qkv is not None
        self.layers = nn.ModuleList()
        self.paths: list[list[str]] = []
        for group in _groups(backbone, target_modules):
            projections = backbone.projections(group)
            paths = list(projections)
            for start in range(0, len(paths), len(group)):
                parts = paths[start : start + len(group)]
                # that of query and value is the number of the layer
                index = len(self.layers)
                base = cast(nn.Linear, projections[parts[0]])
                thirds = 3 if self.fused else 1
                count = 2 if self.fused else len(parts)
                layer = LayerBranch(index, base, count, max_r * rank, dropout, base.out_features // thirds)
                self.layers.append(layer)
                self.paths.append(parts)
                if self.fused:
                    backbone.module.set_submodule(parts[0], FusedProjectionWithPlugins(base, layer))
                    continue
                for part, path in enumerate(parts):
                    backbone.module.set_submodule(path, ProjectionWithPlugins(projections[path], layer, part))

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
        for index in range(self.max_r):
            rows = self._rows_of(index)
            for layer, paths in zip(self._layers(), self.paths, strict=True):
                found = [adapters[index][path] for path in paths]
                if self.fused:
                    found = [*split_query_and_value(found[0])]
                for part, factors in enumerate(found):
                    layer.lora_A[part, rows] = factors.lora_A.to(layer.lora_A)  # (rank, in)
                    layer.lora_B[part, rows] = factors.lora_B.t().to(layer.lora_B)  # (rank, out)

    def adapters(self) -> dict[int, dict[str, Factors]]:
        """The plugins by index, as float32 copies on the CPU."""
        adapters: dict[int, dict[str, Factors]] = {}
        for index in range(self.max_r):
            adapter: dict[str, Factors] = {}
            for layer, paths in zip(self._layers(), self.paths, strict=True):
                found = [layer.factors(part, self._rows_of(index)) for part in range(len(layer.lora_A))]
                if self.fused:
                    found = [join_query_and_value(*found)]
                adapter.update(zip(paths, found, strict=True))
            adapters[index] = adapter
        return adapters

    def remove(self, backbone: Backbone) -> None:
        """Put the original projections back."""
        for paths in self.paths:
            for path in paths:
                backbone.module.set_submodule(path, cast(nn.Module, backbone.module.get_submodule(path).base))

    def _rows_of(self, index: int) -> slice:
        """The rows of the factors that belong to plugin `P_index_index+1`."""
        return slice(index * self.rank, (index + 1) * self.rank)

    def _layers(self) -> list["LayerBranch"]:
        return cast(list[LayerBranch], list(self.layers))


class LayerBranch(nn.Module):
    """The low-rank branches beside linear layers of one shape that read the same input: query and value of a layer.

    `lora_A` is `(parts, rows, in)` and starts as in PEFT; `lora_B`, stored transposed, is `(parts, rows, out)` and
    starts at zero.

    Args:
        index: Tells the dropout of one branch from that of another.
        base: One of the linear layers.
        parts: How many there are.
        rows: Of one part: rank times number of plugins.
        dropout: Dropout probability between the two factors.
        out_features: Number of outputs of a part.
    """

    def __init__(self, index: int, base: nn.Linear, parts: int, rows: int, dropout: float, out_features: int):
        super().__init__()
        device = base.weight.device
        self.index = index
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(parts, rows, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(parts, rows, out_features, device=device))
        # the bound of kaiming_uniform_ with a = sqrt(5), which is what PEFT starts with
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(base.in_features), 1 / math.sqrt(base.in_features))
        self.active: ActiveChain | None = None
        # the input that an earlier part has read, and what later ones need of it
        self.shared: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor, part: int) -> torch.Tensor:
        """The output of a projection plus its branch.

        Args:
            hidden_states: `(batch, tokens, in)`, the input of the projection.
            output: `(batch, tokens, out)`, its output.
            part: Which projection.
        """
        if self.active is None:
            return output
        inner = self._down_of(hidden_states, part)  # (batch, tokens, active rows)
        lora_B = self.lora_B[part, self.active.rows].to(inner.dtype)  # (active rows, out)
        if output.dtype != inner.dtype:
            return output + inner @ lora_B  # (batch, tokens, out)
        flat = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), lora_B)  # (batch * tokens, out)
        return flat.view(output.shape)  # (batch, tokens, out)

    def factors(self, part: int, rows: slice) -> Factors:
        """Some rows of the factors of one part, as float32 copies on the CPU."""
        lora_A = self.lora_A.detach()[part, rows]  # (rank, in)
        lora_B = self.lora_B.detach()[part, rows].t()  # (out, rank)
        return Factors(lora_A.float().cpu().clone(), lora_B.float().cpu().contiguous().clone())

    def _down_of(self, hidden_states: torch.Tensor, part: int) -> torch.Tensor:
        """`(batch, tokens, active rows)`: the input times `lora_A` of one part, computed for all parts by the first."""
        if self.shared is not None and self.shared[0] is hidden_states and part in self.shared[1]:
            downs = self.shared[1]
        else:
            chunks = self._down(hidden_states).chunk(len(self.lora_A), dim=-1)
            downs = dict(enumerate(chunks))
        later = {other: down for other, down in downs.items() if other > part}
        # what no later part reads is not kept alive
        self.shared = (hidden_states, later) if later else None
        return downs[part]

    def _down(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, parts * active rows)`: the input times `lora_A` of all parts, times sign and scale.

        Dropout is applied to this product, as in the authors' release, not to the much wider input, as in PEFT.
        """
        rows, factor, keys = cast(ActiveChain, self.active)
        lora_A = self.lora_A[:, rows].flatten(0, 1)  # (parts * active rows, in)
        if not (self.training and self.dropout and keys is not None):
            return F.linear(hidden_states, (lora_A * factor).to(hidden_states.dtype))
        lora_A = lora_A * (factor / (1 - self.dropout))
        down = F.linear(hidden_states, lora_A.to(hidden_states.dtype))  # (batch, tokens, parts * active rows)
        branch_keys = fold(keys, self.index)  # (batch,)
        return down * keep_mask(branch_keys, down.shape[1], down.shape[2], self.dropout)


class ProjectionWithPlugins(nn.Module):
    """A frozen projection and the branch beside it."""

    branch: LayerBranch

    def __init__(self, base: nn.Module, branch: LayerBranch, part: int):
        super().__init__()
        self.base = base
        self.part = part
        # the branch belongs to the chain: registered once, so that its parameters have one name
        object.__setattr__(self, "branch", branch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.branch(hidden_states, self.base(hidden_states), self.part)


class FusedProjectionWithPlugins(nn.Module):
    """A frozen projection to query, key and value, and the branches beside its query and its value."""

    branch: LayerBranch

    def __init__(self, base: nn.Module, branch: LayerBranch):
        super().__init__()
        self.base = base
        # the branch belongs to the chain, as above
        object.__setattr__(self, "branch", branch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.base(hidden_states).chunk(3, dim=-1)  # (batch, tokens, out) each
        query = self.branch(hidden_states, query, 0)
        value = self.branch(hidden_states, value, 1)
        return torch.cat([query, key, value], dim=-1)  # (batch, tokens, 3 out)


def _groups(backbone: Backbone, target_modules: Iterable[str] | None) -> list[list[str]]:
    """Names of linear layers, those together that read the same input: query, key and value."""
    architecture = backbone.architecture
    inputs = architecture.attention_inputs
    names = list(architecture.query_and_value) if target_modules is None else list(target_modules)
    together = [name for name in inputs if name in names]
    alone = [[name] for name in names if name not in inputs]
    return [together, *alone] if together else alone
