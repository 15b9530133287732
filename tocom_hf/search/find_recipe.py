# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`find_recipe`: which tokens to merge, and in which layers, so that features stay what they are without merging."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel

from tocom_hf.devices import evaluation_mode
from tocom_hf.distillation.objectives import WhitenedFeatures
from tocom_hf.errors import ArgumentError, DatasetError
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.recipes import MATCH_BY, TOME_RECIPE, MergeRecipe
from tocom_hf.merging.schedule import require_degree
from tocom_hf.plugins.config import BackboneFacts
from tocom_hf.search.judge import Judge
from tocom_hf.search.progress import Progress
from tocom_hf.search.results import FoundRecipe, RecipeResult


TOME = "ToMe"
_SLOPES = (0.25, 0.5, 0.75, 1.0)  # of decreasing schedules
_STEPS = (1, 2, 4, 8)  # merges that a step of the search moves from one layer to another


def find_recipe(
    model: PreTrainedModel,
    images: Dataset,
    degrees: Sequence[int],
    *,
    spread_images: Dataset | None = None,
    match_by: Sequence[str] = MATCH_BY,
    size_penalties: Sequence[float] = (0.0, 0.02, 0.05, 0.1),
    attention_penalties: Sequence[float] = (0.0, 0.02, 0.05),
    first_layers: int = 4,
    max_evaluations: int = 60,
    batch_size: int = 32,
    seed: int = 0,
    progress: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> FoundRecipe:
    """Choose what tokens are matched by, penalties, and a schedule of merges for each degree, without labels.

    One half of the images decides: the recipe whose features are the nearest to those without merging, in units of
    their own spread. First what to match by and the penalties, over all degrees together, where the first layers may
    have a matching of their own and no attention penalty; then for each degree a schedule, from schedules that merge
    less and less from layer to layer and by moving merges between layers as long as that helps. The other half of the
    images is looked at last: a part of the recipe that does not help there is left out. No recipe costs more FLOPs than
    ToMe's rule at that degree.

    Args:
        model: A supported model that does not merge. It is left as it was.
        images: Samples with finished `pixel_values`, float `(channels, height, width)`, of clips with the frames in
            front. One or two hundred suffice.
        degrees: The degrees to search for; 0 is left out.
        spread_images: More images, from which only the spread of the features is taken, besides that of `images`. Heads
            read features in directions of little spread, too, and these show with about twice as many images as the
            features have channels. They go through the model once.
        match_by: What to try, of `MergeRecipe.match_by`.
        size_penalties: What to try, of `MergeRecipe.size_penalty`.
        attention_penalties: What to try, of `MergeRecipe.attention_penalty`; of a model without a class token nothing.
        first_layers: How many layers may have a rule of their own, from the first; 0 gives all the same one.
        max_evaluations: How many schedules to try at each degree; 0 leaves schedules alone.
        batch_size: Images of a forward pass.
        seed: Decides the halves and the order in which schedules are tried.
        progress: A file to keep what was measured in; a search with the same arguments goes on from there.
        report: Called with a line of text for every choice.

    Raises:
        UnsupportedModelError: if the architecture is not supported.
        DegreeError: if a degree is not one.
        ArgumentError: if there is no degree above 0, or an argument is out of range.
        DatasetError: if there are fewer than four images.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import find_recipe
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> images = [{"pixel_values": torch.rand(3, 64, 64)} for _ in range(4)]
    >>> found = find_recipe(model, images, degrees=[3], match_by=["key_mean", "input"], max_evaluations=2)
    >>> found.recipe.match_by in ("key_mean", "input")
    True

    ```
    """
    wanted = sorted({require_degree(degree, "degrees") for degree in degrees} - {0})
    if not wanted:
        raise ArgumentError("degrees must have at least one degree above 0: at 0 nothing merges.")
    names = _tried("match_by", match_by)
    penalties = _tried("size_penalty", size_penalties)
    if require_degree(batch_size, "batch_size") < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}.")
    looks = _tried("attention_penalty", attention_penalties)
    require_degree(max_evaluations, "max_evaluations")
    require_degree(first_layers, "first_layers")
    count = len(images)  # type: ignore[arg-type]
    if count < 4:
        raise DatasetError(f"At least four images are needed to choose a recipe and to check it, got {count}.")

    backbone = find_backbone(model)
    if not backbone.has_class_token:
        looks = []
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    halves = [Subset(images, order[::2]), Subset(images, order[1::2])]
    more = 0 if spread_images is None else len(spread_images)  # type: ignore[arg-type]
    facts = {"model": BackboneFacts.of(backbone).sketch, "images": count, "spread_images": more, "seed": seed}
    with evaluation_mode(model), torch.no_grad():
        searching, held_out = (
            Judge(backbone, half, batch_size, Progress(_of_half(progress, index), facts))
            for index, half in enumerate(halves)
        )
        features = [*searching.references, *held_out.references]
        if spread_images is not None:
            features += searching.features(spread_images)
        searching.objective = held_out.objective = WhitenedFeatures().fitted(torch.cat(features))
        search = _Search(searching, held_out, wanted, report or (lambda line: None))
        search.start()
        search.choose("matching", "match_by", names)
        search.choose("attention penalty", "attention_penalty", looks)
        search.find_first_layers(names, looks, first_layers)
        search.choose("size penalty", "size_penalty", penalties)
        for degree in wanted:
            search.find_schedule(degree, max_evaluations, torch.Generator().manual_seed(seed))
        search.fit_other_degrees()
    return FoundRecipe(search.recipe, sorted(search.results, key=lambda row: row.degree))


class _Search:
    """The recipe that is the best so far, and how it came to be."""

    def __init__(self, judge: Judge, held_out: Judge, degrees: list[int], report: Callable[[str], None]):
        self.judge = judge
        self.held_out = held_out
        self.degrees = degrees
        self.report = report
        self.recipe = TOME_RECIPE
        self.results: list[RecipeResult] = []
        self.budgets = {degree: judge.flops(TOME_RECIPE, degree) for degree in range(1, max(degrees) + 1)}

    def start(self) -> None:
        """Measure ToMe's rule."""
        for degree in self.degrees:
            self._record(degree, TOME, self.recipe, self.recipe)

    def choose(self, what: str, part: str, values: Sequence[str] | Sequence[float]) -> None:
        """Take the value of a part of the recipe that closes most of the distance; none if it does not help."""
        fitted = [self._fitted(_with(self.recipe, part, value)) for value in values]
        best = max(fitted, key=lambda recipe: self._closed(self.judge, recipe), default=self.recipe)
        name = f"{what} {getattr(best, part)}"
        self._take(name, best, otherwise=f"{what}: nothing that was tried is better than what there is")

    def find_first_layers(self, match_by: Sequence[str], attention_penalties: Sequence[float], most: int) -> None:
        """Give the first layers a matching of their own and no attention penalty, where that helps.

        The class token has read little there. Without it the penalty of the other layers is chosen anew.
        """
        layers = len(self.judge.backbone.layers)
        penalty = self.recipe.rule(layers - 1).attention_penalty
        counts = range(1, min(most, layers - 1) + 1)
        found = {(count, name): self._with_first(count, name, penalty) for count in counts for name in match_by}
        if not found:
            return
        count, name = max(found, key=lambda key: self._closed(self.judge, found[key]))
        others = [self._with_first(count, name, penalty) for penalty in attention_penalties]
        best = max([found[count, name], *others], key=lambda recipe: self._closed(self.judge, recipe))
        what = f"{name} in the first {count} layers"
        if best.reads_attention:
            what += f", attention penalty {best.rule(layers - 1).attention_penalty} in the others"
        self._take(what, best, otherwise="first layers: no rule of their own is better")

    def fit_other_degrees(self) -> None:
        """Keep the recipe within the FLOPs of all degrees up to the largest that was searched for."""
        others = [degree for degree in range(1, max(self.degrees)) if degree not in self.degrees]
        fitted = self._fitted(self.recipe, others)
        self.recipe = replace(self.recipe, schedules={**self.recipe.schedules, **fitted.schedules})

    def _take(self, what: str, best: MergeRecipe, otherwise: str) -> None:
        """Take a recipe where it helps on both halves of the images, and say so; else say `otherwise`.

        One that costs more than ToMe's rule is not taken: where all tokens merge, no schedule makes up for that.
        """
        closed, checked = self._closed(self.judge, best), self._closed(self.held_out, best)
        fits = all(self._fits(best, degree) for degree in self.degrees)
        if best == self.recipe or closed <= 0 or checked <= 0 or not fits:
            self.report(otherwise)
            return
        self.report(f"{what}: closes {100 * closed:.0f} % of the distance, {100 * checked:.0f} % on held-out images")
        for degree in self.degrees:
            self._record(degree, what, best, self.recipe)
        self.recipe = best

    def find_schedule(self, degree: int, max_evaluations: int, generator: torch.Generator) -> None:
        """Take the best of some decreasing schedules at one degree, and move merges between layers while that helps.

        All stay within the FLOPs of the constant degree.
        """
        layers = len(self.judge.backbone.layers)
        best, start = self.recipe, self.recipe
        best_value = float(self.judge.distances(best, degree).mean())
        for evaluation in range(max_evaluations):
            if evaluation < len(_SLOPES):
                candidate: MergeRecipe | None = self._decreasing(start, degree, _SLOPES[evaluation])
            else:
                source, target = torch.randperm(layers, generator=generator)[:2].tolist()
                step = _STEPS[int(torch.randint(len(_STEPS), (1,), generator=generator))]
                candidate = self._moved(best, degree, source, target, step)
            if candidate is None:
                continue
            value = float(self.judge.distances(candidate, degree).mean())
            if value < best_value:
                best, best_value = candidate, value
        difference = self.held_out.distances(start, degree) - self.held_out.distances(best, degree)
        if best == start or float(difference.mean()) <= _standard_error(difference):
            self.report(f"r = {degree}: no schedule is better than the same number of merges in every layer")
            return
        self.report(f"r = {degree}: {list(best.schedules[degree])}")
        self._record(degree, "schedule", best, start)
        self.recipe = best

    def _decreasing(self, recipe: MergeRecipe, degree: int, slope: float) -> MergeRecipe | None:
        """A recipe that merges less and less from layer to layer, at one degree, as much as its FLOPs ask for.

        Args:
            recipe: What else it does.
            degree: The degree.
            slope: By how much the first layer merges more than one in the middle, as a share of it.
        """
        layers = len(self.judge.backbone.layers)
        shape = [1 + slope * (1 - (2 * layer + 1) / layers) for layer in range(layers)]
        for scale in range(5 * degree, 30 * degree):
            merges = tuple(round(scale / 10 * share) for share in shape)
            candidate = replace(recipe, schedules={**recipe.schedules, degree: merges})
            if self._fits(candidate, degree):
                return candidate
        return None

    def _fitted(self, recipe: MergeRecipe, degrees: Sequence[int] | None = None) -> MergeRecipe:
        """A recipe that costs no more than ToMe's at any degree: comparing more channels costs some merges more.

        Args:
            recipe: What it does; its schedules are left out.
            degrees: Those that it gets schedules for where it needs them; by default those of the search.
        """
        layers = len(self.judge.backbone.layers)
        schedules: dict[int, tuple[int, ...]] = {}
        for degree in self.degrees if degrees is None else degrees:
            merges = [degree] * layers
            layer = 0
            # at a degree at which every layer merges all that it can, nothing is left to merge more
            while layer < 2 * degree * layers and not self._fits(
                replace(recipe, schedules={degree: tuple(merges)}), degree
            ):
                merges[layer % layers] += 1
                layer += 1
            if layer > 0:
                schedules[degree] = tuple(merges)
        return replace(recipe, schedules=schedules)

    def _with_first(self, count: int, match_by: str, attention_penalty: float) -> MergeRecipe:
        """The recipe with another matching in so many first layers, and an attention penalty in the others."""
        layers = len(self.judge.backbone.layers)
        rest = self.recipe.rule(layers - 1)
        names = [match_by] * count + [rest.match_by] * (layers - count)
        penalties = [0.0] * count + [attention_penalty] * (layers - count)
        return self._fitted(replace(self.recipe, match_by=names, attention_penalty=penalties))

    def _moved(self, recipe: MergeRecipe, degree: int, source: int, target: int, step: int) -> MergeRecipe | None:
        """A recipe with merges moved from one layer to another; `None` where that costs more than the degree.

        The layer that gains merges takes as many as the FLOPs of the degree ask for, and no more.
        """
        merges = list(recipe.schedule(degree, len(self.judge.backbone.layers)))
        if merges[source] < step:
            return None
        merges[source] -= step

        def with_target(count: int) -> MergeRecipe:
            changed = (*merges[:target], count, *merges[target + 1 :])
            return replace(recipe, schedules={**recipe.schedules, degree: changed})

        count = merges[target]
        while not self._fits(with_target(count), degree):
            count += 1
            if count > merges[target] + 4 * step + 4:  # a layer merges at most half of its tokens
                return None
        return with_target(count)

    def _fits(self, recipe: MergeRecipe, degree: int) -> bool:
        """Whether a recipe costs no more than ToMe's rule at a degree, to the rounding of the prediction."""
        return self.judge.predicted_flops(recipe, degree) <= self.budgets[degree] * (1 + 1e-9)

    def _closed(self, judge: Judge, recipe: MergeRecipe) -> float:
        """The share of the distance to r = 0 that a recipe closes of what is left so far, all degrees alike."""
        ratios = []
        for degree in self.degrees:
            before = float(judge.distances(self.recipe, degree).mean())
            if before > 0:
                ratios.append(float(judge.distances(recipe, degree).mean()) / before)
        # the geometric mean, because distances grow manyfold from degree to degree
        return 1 - math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios)) if ratios else 0.0

    def _record(self, degree: int, what: str, recipe: MergeRecipe, before: MergeRecipe) -> None:
        held_out = self.held_out.distances(recipe, degree)
        row = RecipeResult(
            degree,
            what,
            recipe,
            distance=float(self.judge.distances(recipe, degree).mean()),
            held_out=float(held_out.mean()),
            held_out_error=_standard_error(held_out - self.held_out.distances(before, degree)),
            gflops=self.judge.flops(recipe, degree) / 1e9,
        )
        self.results.append(row)


def _tried(part: str, values: Sequence[Any]) -> list[Any]:
    """Values of one part of a recipe, each for all layers.

    Raises:
        ArgumentError: if one of them is not.
    """
    tried = [getattr(_with(TOME_RECIPE, part, value), part) for value in values]
    if any(isinstance(value, tuple) for value in tried):
        raise ArgumentError(f"{part} to try must be single values, for all layers, got {list(values)!r:.200}.")
    return tried


def _with(recipe: MergeRecipe, part: str, value: Any) -> MergeRecipe:
    """A recipe with another value of one part."""
    changes: dict[str, Any] = {part: value}
    return replace(recipe, **changes)


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def _of_half(progress: str | Path | None, index: int) -> Path | None:
    """The file of one half of the images: measurements of the two go by the same names."""
    if progress is None:
        return None
    path = Path(progress)
    return path.with_name(f"{path.stem}-{index}{path.suffix or '.json'}")
