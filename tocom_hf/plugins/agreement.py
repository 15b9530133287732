# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a model at degree n agrees with itself at degree m, with and without the chain of plugins between."""

from collections.abc import Sequence

import torch


def agreement_grid(sums: torch.Tensor, sources: Sequence[int], degrees: Sequence[int]) -> dict:
    """What `agreement_sums` counted, over all processes: `plain` and `tocom` as means in [0, 1], with a row for each of
    `sources` and a column for each of `degrees`; and the number of `images`."""
    means = (sums[:, :-1] / sums[:, -1:]).tolist()
    rounded = [[[round(value, 6) for value in row] for row in grid] for grid in means]
    axes = {"sources": list(sources), "degrees": list(degrees)}
    return {**axes, "plain": rounded[0], "tocom": rounded[1], "images": int(sums[0, -1, 0].item())}


def grid_axes(grid: dict) -> tuple[list, list]:
    """The degrees of the rows and of the columns of a grid. Older ones are square and name the columns only."""
    return grid.get("sources", grid["degrees"]), grid["degrees"]


def mean_agreement(grid: dict) -> tuple[float, float] | None:
    """The mean of a grid over its pairs m != n, without and with the chain; `None` where it has no such pair."""
    sources, degrees = grid_axes(grid)
    pairs = [(i, j) for i, m in enumerate(sources) for j, n in enumerate(degrees) if m != n]
    if not pairs:
        return None
    plain, tocom = (sum(grid[name][i][j] for i, j in pairs) / len(pairs) for name in ("plain", "tocom"))
    return plain, tocom


def format_grid(grid: dict) -> str:
    """An agreement grid as a table: in each cell without and with the chain, in percent."""
    sources, degrees = grid_axes(grid)
    lines = ["teacher m \\ student n " + " ".join(f"{degree:>13}" for degree in degrees)]
    for i, source_r in enumerate(sources):
        cells = (f"{100 * grid['plain'][i][j]:6.2f}>{100 * grid['tocom'][i][j]:6.2f}" for j in range(len(degrees)))
        lines.append(f"{source_r:>21} " + " ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
