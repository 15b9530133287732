# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A grid of degrees as a table in the manner of the paper, as CSV, as JSON, and as plots."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tocom_hf.cost.timing import DegreeCost
from tocom_hf.evaluation.grid import Cell, CellRun, summarize
from tocom_hf.extras import require_extras
from tocom_hf.storage.json_files import read_json
from tocom_hf.storage.transaction import write_folder


@dataclass(frozen=True)
class Report:
    """What `examples/evaluate.py` writes.

    Attributes:
        settings: Data set, checkpoints, precision, device, date: whatever tells where the figures come from. `samples`
            is images, which is the default, or clips.
        runs: One for each checkpoint and target degree, all of one task. Reports of several seeds are joined by joining
            their runs.
        costs: One for each target degree.
    """

    settings: dict[str, Any]
    runs: list[CellRun]
    costs: list[DegreeCost]

    @property
    def samples(self) -> str:
        """What the accuracy is measured on."""
        return self.settings.get("samples", "images")

    @property
    def cells(self) -> list[Cell]:
        """The averages over checkpoints, by source and target degree."""
        return summarize(self.runs)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a `grid.json` back, with what every checkpoint made of every image.

        Raises:
            PluginFileError: if it is not valid JSON.
        """
        content = read_json(Path(path))
        costs = [_cost_of(facts) for facts in content["costs"]]
        return cls(content["settings"], [_run_of(facts) for facts in content["runs"]], costs)

    def save(self, folder: str | Path) -> None:
        """Write `grid.md`, `grid.csv`, `grid.json`, `heat_map.png` and `tradeoff.png`, all or nothing."""
        with write_folder(folder) as part:
            (part / "grid.md").write_text(self.markdown() + "\n", encoding="utf-8")
            content = {
                "settings": self.settings,
                "cells": [asdict(cell) for cell in self.cells],
                "costs": [_cost_facts(cost) for cost in self.costs],
                "runs": [_run_facts(run) for run in self.runs],
            }
            (part / "grid.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            with (part / "grid.csv").open("w", newline="", encoding="utf-8") as file:
                rows = self.rows()
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            plot_heat_map(self, part / "heat_map.png")
            plot_tradeoff(self, part / "tradeoff.png")

    def methods(self) -> list[str]:
        """The names of the compensations, in the order of the cells."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.compensated))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each cell and method, in per cent; the same keys in all."""
        costs = {cost.target_r: cost for cost in self.costs}
        rows = []
        for cell in self.cells:
            cost = costs.get(cell.target_r)
            common = {"source_r": cell.source_r, "target_r": cell.target_r, "checkpoints": cell.checkpoints}
            tail = {
                "trained_at_target": _percent_or_none(cell.trained),
                "gap": _percent_or_none(cell.gap),
                "gap_se": _percent_or_none(cell.gap_se),
                "lost": _percent_or_none(cell.lost),
                "lost_se": _percent_or_none(cell.lost_se),
                "gflops": round(cost.gflops, 3) if cost else None,
                "images_per_second": round(cost.images_per_second, 1) if cost and cost.timed else None,
            }
            accuracy = {"accuracy": _percent_or_none(cell.plain), "se": _percent_or_none(cell.plain_se)}
            blank = {"scales": "", "gain": None, "gain_se": None, "gap_closed": None}
            rows.append({**common, "method": "plain", **accuracy, **blank, **tail})
            for name, tocom in cell.compensated.items():
                figures = {
                    "accuracy": _percent_or_none(tocom.accuracy),
                    "se": _percent_or_none(tocom.se),
                    "scales": " ".join(f"{scale:g}" for scale in tocom.scales),
                    "gain": _percent_or_none(tocom.gain),
                    "gain_se": _percent_or_none(tocom.gain_se),
                    "gap_closed": _percent_or_none(tocom.gap_closed, 0),
                }
                rows.append({**common, "method": name, **figures, **tail})
        return rows

    def markdown(self) -> str:
        """A table with one column for each target degree and a block of rows for each source degree, in per cent.

        The gap closed stands only where the gap is more than twice its standard error: the ratio means nothing below.
        """
        sources = sorted({cell.source_r for cell in self.cells})
        targets = sorted({cell.target_r for cell in self.cells})
        cells = {(cell.source_r, cell.target_r): cell for cell in self.cells}
        lines = [
            "| source r | method | " + " | ".join(f"target r = {target}" for target in targets) + " |",
            "|---|---|" + "---|" * len(targets),
        ]

        def line(source: str, method: str, texts: Iterable[str]) -> None:
            lines.append(f"| {source} | {method} | {' | '.join(texts)} |")

        for source in sources:
            row = [cells.get((source, target)) for target in targets]
            line(str(source), "plain", [_plus_minus(cell.plain, cell.plain_se) if cell else "" for cell in row])
            for name in self.methods():
                found = [cell.compensated.get(name) if cell else None for cell in row]
                line("", _title(name), [_compensated_text(tocom) for tocom in found])
                if not name.startswith("scale"):
                    line("", "gap closed", [_gap_text(cell, name) for cell in row])
        own = [cells.get((target, target)) for target in targets]
        line("", "trained at target", [_plus_minus(cell.plain, cell.plain_se) if cell else "" for cell in own])
        costs = {cost.target_r: cost for cost in self.costs}
        found_costs = [costs.get(target) for target in targets]
        line("", "GFLOPs", [f"{cost.gflops:.2f}" if cost else "" for cost in found_costs])
        if any(cost.timed for cost in self.costs):
            line("", f"{self.samples}/s (speed-up)", [_speed_text(cost) for cost in found_costs])
        return "\n".join(lines)


def gap_closed(cells: Iterable[Cell], method: str) -> tuple[float, float] | None:
    """The share of the gap that a method closes over several cells, and the sum of their gaps.

    The gains are summed up and divided by the summed gaps, so that cells without a gap cannot dominate as they would
    in a mean of ratios.

    Returns:
        Share and summed gap, as fractions; `None` where there is no gap to close.
    """
    chosen = [cell for cell in cells if method in cell.compensated and cell.gap is not None]
    gap = sum(cell.gap for cell in chosen if cell.gap is not None)
    return (sum(cell.compensated[method].gain for cell in chosen) / gap, gap) if gap > 0 else None


def won_back(cells: Iterable[Cell], method: str) -> tuple[float, float] | None:
    """The share that a method wins back of what changing the degree costs, and that sum.

    Only over cells that lose more than twice the standard error of it: where a model runs as well or better at the
    target degree, plugins have nothing to bring back.

    Returns:
        Share and sum, as fractions; `None` where no cell loses that much.
    """
    chosen = [cell for cell in cells if method in cell.compensated and clearly_lost(cell)]
    lost = sum(cell.lost for cell in chosen if cell.lost is not None)
    return (sum(cell.compensated[method].gain for cell in chosen) / lost, lost) if chosen else None


def clearly_lost(cell: Cell) -> bool:
    """Whether changing the degree costs a cell more than twice the standard error of it."""
    return cell.lost is not None and cell.lost_se is not None and cell.lost > 2 * cell.lost_se


def plot_heat_map(report: Report, path: str | Path) -> None:
    """Accuracy over source and target degree, plain and with each set of scales, and the gain of the latter."""
    with require_extras("A report"):
        from matplotlib.figure import Figure

    sources = sorted({cell.source_r for cell in report.cells})
    targets = sorted({cell.target_r for cell in report.cells})
    methods = [name for name in report.methods() if not name.startswith("scale")]
    panels = ["plain", *methods]
    figure = Figure(figsize=(1.2 + 3.0 * len(panels), 1.4 + 0.75 * len(sources)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    values = {}
    for panel in panels:
        grid = torch.full((len(sources), len(targets)), float("nan"))
        for cell in report.cells:
            tocom = cell.compensated.get(panel)
            accuracy = cell.plain if panel == "plain" or tocom is None else tocom.accuracy
            grid[sources.index(cell.source_r), targets.index(cell.target_r)] = 100 * accuracy
        values[panel] = grid
    known = torch.cat([grid[~grid.isnan()] for grid in values.values()])
    low, high = known.min().item(), known.max().item()
    image = None
    for axis, panel in zip(axes, panels, strict=True):
        image = axis.imshow(values[panel].numpy(), vmin=low, vmax=max(high, low + 1e-6), cmap="viridis", aspect="auto")
        for row in range(len(sources)):
            for column in range(len(targets)):
                value = values[panel][row, column].item()
                if value == value:
                    dark = value < (low + high) / 2
                    axis.text(column, row, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k")
        axis.set_xticks(range(len(targets)), targets)
        axis.set(title=_title(panel), xlabel="target r")
    axes[0].set_yticks(range(len(sources)), sources)
    axes[0].set_ylabel("source r")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="accuracy (%)")
    figure.savefig(path, dpi=130)


def plot_tradeoff(report: Report, path: str | Path) -> None:
    """Accuracy against throughput (floating-point operations where none was measured), a panel for each source."""
    with require_extras("A report"):
        from matplotlib.figure import Figure

    costs = {cost.target_r: cost for cost in report.costs}
    timed = bool(costs) and all(cost.timed for cost in costs.values())

    def price(target_r: int) -> float:
        cost = costs.get(target_r)
        if cost is None:
            return float(target_r)
        return cost.images_per_second if timed else cost.gflops

    sources = sorted({cell.source_r for cell in report.cells})
    figure = Figure(figsize=(1 + 3.6 * len(sources), 3.6), layout="constrained")
    axes = figure.subplots(1, len(sources), squeeze=False, sharey=True)[0]
    own = [cell for cell in report.cells if cell.source_r == cell.target_r]
    for axis, source in zip(axes, sources, strict=True):
        row = [cell for cell in report.cells if cell.source_r == source]
        prices = [price(cell.target_r) for cell in row]
        _errorbar(axis, prices, [(cell.plain, cell.plain_se) for cell in row], "o--", "0.5", "plain")
        picked = [name for name in report.methods() if not name.startswith("scale")]
        for name, style, colour in zip(
            picked, ("o-", "s:", "d-."), ("tab:blue", "tab:orange", "tab:green"), strict=False
        ):
            found = [cell.compensated.get(name) for cell in row]
            points = [(t.accuracy, t.se) if t else (c.plain, c.plain_se) for t, c in zip(found, row, strict=True)]
            _errorbar(axis, prices, points, style, colour, _title(name))
        if len(own) > 1:
            points = [(cell.plain, cell.plain_se) for cell in own]
            _errorbar(axis, [price(cell.target_r) for cell in own], points, "^:", "k", "trained at target")
        axis.set(title=f"source r = {source}", xlabel=f"{report.samples}/s" if timed else "GFLOPs")
        if not timed:
            axis.invert_xaxis()
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _errorbar(
    axis, prices: list[float], points: Sequence[tuple[float, float]], style: str, colour: str, label: str
) -> None:
    heights, errors = ([100 * value for value in column] for column in zip(*points, strict=True))
    axis.errorbar(prices, heights, yerr=errors, fmt=style, color=colour, label=label, capsize=2, linewidth=1.2)


def _cost_facts(cost: DegreeCost) -> dict[str, Any]:
    """What JSON, which has no NaN, can hold of a cost."""
    facts = asdict(cost)
    return {name: None if value != value else value for name, value in facts.items()}


def _cost_of(facts: dict[str, Any]) -> DegreeCost:
    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in facts.items()}
    known["tokens"] = tuple(facts["tokens"])
    return DegreeCost(**known)


def _run_facts(run: CellRun) -> dict[str, Any]:
    return {
        "checkpoint": run.checkpoint,
        "source_r": run.source_r,
        "target_r": run.target_r,
        "images": len(run.plain),
        "plain": _outcome(run.plain),
        "at_scale": {str(scale): _outcome(right) for scale, right in run.at_scale.items()},
        "picked": run.picked,
        "fixed": run.fixed,
        "validation": {str(scale): figures for scale, figures in run.validation.items()},
    }


def _outcome(right: torch.Tensor) -> dict[str, Any]:
    """Accuracy, and which images were right as the bits of a hexadecimal string."""
    return {"accuracy": right.double().mean().item(), "right": np.packbits(right.numpy()).tobytes().hex()}


def _run_of(facts: dict[str, Any]) -> CellRun:
    def right(outcome: dict[str, Any]) -> torch.Tensor:
        packed = np.frombuffer(bytes.fromhex(outcome["right"]), np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=facts["images"])).bool()

    return CellRun(
        facts["checkpoint"],
        facts["source_r"],
        facts["target_r"],
        right(facts["plain"]),
        {float(scale): right(outcome) for scale, outcome in facts["at_scale"].items()},
        facts["picked"],
        tuple(facts["fixed"]),
        {float(scale): tuple(figures) for scale, figures in facts["validation"].items()},
    )


def _title(method: str) -> str:
    names = {
        "paper": "ToCom, scale 0.05 to 0.15",
        "wide": "ToCom, scale up to 0.3",
        "unlabelled": "ToCom, scale picked without labels",
    }
    return names.get(method, method if method == "plain" else f"ToCom, {method}")


def _percent_or_none(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(100 * value, digits)


def _plus_minus(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _compensated_text(tocom) -> str:
    if tocom is None:
        return ""
    scales = "/".join(f"{scale:g}" for scale in dict.fromkeys(tocom.scales))
    return f"{100 * tocom.accuracy:.1f} ({100 * tocom.gain:+.1f} ± {100 * tocom.gain_se:.1f}, s = {scales})"


def _gap_text(cell: Cell | None, method: str) -> str:
    tocom = cell.compensated.get(method) if cell else None
    if cell is None or tocom is None or cell.gap is None or cell.gap_se is None:
        return ""
    gap = f"{100 * cell.gap:+.1f} ± {100 * cell.gap_se:.1f}"
    if tocom.gap_closed is None or cell.gap <= 2 * cell.gap_se:
        return f"no clear gap ({gap})"
    return f"{100 * tocom.gap_closed:.0f} % of {gap}"


def _speed_text(cost: DegreeCost | None) -> str:
    if cost is None or not cost.timed:
        return ""
    return f"{cost.images_per_second:.0f} ({cost.speedup:.2f}x)"
