# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What `find_recipe` found: a recipe, and what each of its parts gave."""

from dataclasses import dataclass

from tocom_hf.merging.recipes import MergeRecipe


@dataclass(frozen=True)
class RecipeResult:
    """How well a model that merges by a recipe agrees with itself without merging.

    Attributes:
        degree: The degree.
        what: Which part of the recipe was added last: `ToMe`, the matching, a penalty, the rule of the first layers, or
            the schedule.
        recipe: The recipe.
        distance: How far features are from those of r = 0, on the images that the search went by: the mean of
            `WhitenedFeatures`, which is 0 where nothing changed and 1 for an image whose features are the mean of all.
        held_out: The same on the other half of the images.
        held_out_error: Standard error of the difference to the row before, on the other half.
        gflops: Floating-point operations for one image, in units of 10^9.
    """

    degree: int
    what: str
    recipe: MergeRecipe
    distance: float
    held_out: float
    held_out_error: float
    gflops: float


@dataclass(frozen=True)
class FoundRecipe:
    """What `find_recipe` found.

    Example:

    ```python
    >>> from tocom_hf import FoundRecipe, MergeRecipe
    >>> FoundRecipe(MergeRecipe(match_by="input"), results=[]).recipe.match_by
    'input'

    ```

    Attributes:
        recipe: The recipe.
        results: What each of its parts gave, degree by degree.
    """

    recipe: MergeRecipe
    results: list[RecipeResult]

    def table(self) -> str:
        """The results as a table in Markdown."""
        lines = ["| r | recipe | GFLOPs | distance to r = 0 | on held-out images | of it closed |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        plain: dict[int, float] = {}
        for row in self.results:
            first = plain.setdefault(row.degree, row.held_out)
            closed = 1 - row.held_out / first if first > 0 else 0.0
            cells = [row.degree, row.what, f"{row.gflops:.2f}", f"{row.distance:.4f}", f"{row.held_out:.4f}"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{100 * closed:.0f} %"])) + " |")
        return "\n".join(lines)
