# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a model at degree n agrees with itself at degree m, with and without the chain of plugins between."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tocom_hf.extras import require_extras


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AgreementGrid:
    """Agreement of teacher and student on held-out images, for pairs of degrees. Prints as a table.

    Attributes:
        sources: The degrees m of the teacher, one for each row.
        degrees: The degrees n of the student, one for each column.
        plain: Agreement in [0, 1] without the chain of plugins: `plain[i][j]` is that of `sources[i]` and `degrees[j]`.
        tocom: The same with the chain from m to n.
        images: How many images these are means over; `None` where that is not recorded.
    """

    sources: list[int]
    degrees: list[int]
    plain: list[list[float]]
    tocom: list[list[float]]
    images: int | None = None

    @classmethod
    def from_sums(cls, sums: torch.Tensor, sources: Sequence[int], degrees: Sequence[int]) -> "AgreementGrid":
        """The means of what was summed up over all images.

        Args:
            sums: float64 `(2, sources + 1, degrees)`: without the chain and with it. The last row counts the images.
            sources, degrees: The degrees of rows and columns.
        """
        counts = sums[:, -1:]  # (2, 1, degrees)
        means = (sums[:, :-1] / counts).tolist()  # (2, sources, degrees)
        plain, tocom = ([[round(value, 6) for value in row] for row in rows] for rows in means)
        return cls(list(sources), list(degrees), plain, tocom, images=int(counts[0, 0, 0].item()))

    @classmethod
    def from_dict(cls, content: Any) -> "AgreementGrid":
        """Read what `to_dict` made, as the configuration of a plugin set records it. It may come from a stranger.

        Raises:
            ValueError: if it is not a grid of numbers in [0, 1].
        """
        if not isinstance(content, dict):
            raise ValueError("An agreement grid must be a JSON object.")
        degrees: Any = content.get("degrees")
        # grids of earlier versions are square and name the columns only
        sources: Any = content.get("sources", degrees)
        for name, axis in (("sources", sources), ("degrees", degrees)):
            if not isinstance(axis, list) or not all(type(degree) is int for degree in axis):
                raise ValueError(f"The {name} of an agreement grid must be a list of integers.")
        for name in ("plain", "tocom"):
            if not _is_matrix_of_shares(content.get(name), len(sources), len(degrees)):
                raise ValueError(
                    f"{name!r} of an agreement grid must have a number in [0, 1] for each pair of degrees."
                )
        images = content.get("images")
        return cls(sources, degrees, content["plain"], content["tocom"], images if type(images) is int else None)

    def to_dict(self) -> dict[str, Any]:
        """As the configuration of a plugin set records it."""
        return asdict(self)

    def means(self) -> tuple[float, float] | None:
        """The means over the pairs m != n, without and with the chain; `None` where there is no such pair."""
        pairs = []
        for i, source_r in enumerate(self.sources):
            for j, target_r in enumerate(self.degrees):
                if source_r != target_r:
                    pairs.append((self.plain[i][j], self.tocom[i][j]))
        if not pairs:
            return None
        plain = math.fsum(before for before, _ in pairs) / len(pairs)
        tocom = math.fsum(after for _, after in pairs) / len(pairs)
        return plain, tocom

    def __str__(self) -> str:
        """A table: in each cell without and with the chain, in percent."""
        lines = ["teacher m \\ student n " + " ".join(f"{degree:>13}" for degree in self.degrees)]
        for source_r, plain_row, tocom_row in zip(self.sources, self.plain, self.tocom, strict=True):
            cells = []
            for plain, tocom in zip(plain_row, tocom_row, strict=True):
                cells.append(f"{100 * plain:6.2f}>{100 * tocom:6.2f}")
            lines.append(f"{source_r:>21} " + " ".join(f"{cell:>13}" for cell in cells))
        return "\n".join(lines)

    def plot(self) -> "Figure":
        """Heat maps: without the chain, with it, and what the chain changes. Needs matplotlib.

        Returns:
            A matplotlib figure.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        with require_extras("AgreementGrid.plot"):
            from matplotlib.figure import Figure

        plain = 100 * torch.tensor(self.plain)
        tocom = 100 * torch.tensor(self.tocom)
        change = tocom - plain
        lowest = min(plain.min().item(), tocom.min().item())
        largest_change = max(change.abs().max().item(), 1e-6)
        shares: dict[str, Any] = {"cmap": "viridis", "vmin": lowest, "vmax": 100}
        differences: dict[str, Any] = {"cmap": "RdBu", "vmin": -largest_change, "vmax": largest_change}
        panels = [
            ("token merging alone", plain, shares, plain < (lowest + 100) / 2),
            ("with ToCom", tocom, shares, tocom < (lowest + 100) / 2),
            ("difference", change, differences, change.abs() > 0.7 * largest_change),
        ]
        figure = Figure(figsize=(4 * len(panels), 3.9), layout="constrained")
        for axis, (title, values, colours, dark) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            figure.colorbar(axis.imshow(values.numpy(), **colours), ax=axis, shrink=0.8)
            axis.set(title=title, xlabel="student's degree n", ylabel="teacher's degree m")
            axis.set_xticks(range(len(self.degrees)), self.degrees)
            axis.set_yticks(range(len(self.sources)), self.sources)
            for i in range(len(self.sources)):
                for j in range(len(self.degrees)):
                    colour = "white" if dark[i, j] else "black"
                    text = f"{values[i, j].item():.1f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        images = "?" if self.images is None else self.images
        figure.suptitle(f"Agreement of student and teacher in %, {images} images held out", fontsize=10)
        return figure


def _is_matrix_of_shares(rows: Any, height: int, width: int) -> bool:
    if not isinstance(rows, list) or len(rows) != height:
        return False
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        return False
    return all(type(value) in (int, float) and 0 <= value <= 1 for row in rows for value in row)
