# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How far from r = 0 a model is that merges by a recipe, and what that costs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tocom_hf.cost.flops import Example
from tocom_hf.distillation.objectives import WhitenedFeatures
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.patching import merging_at
from tocom_hf.merging.recipes import MATCH_BY, MergeRecipe
from tocom_hf.search.flop_model import FlopModel
from tocom_hf.search.progress import Progress


class Judge:
    """The distance to r = 0 on some images, measured once for each recipe."""

    def __init__(self, backbone: Backbone, images: Dataset, batch_size: int, progress: Progress):
        self.backbone = backbone
        self.progress = progress
        self.objective = WhitenedFeatures()
        self.flop_model: FlopModel | None = None
        self.batch_size = batch_size
        self.batches = list(self._load(images))
        # others than images are only taken at the size that the configuration names
        takes_any_size = backbone.architecture.inputs == "images"
        height, width = self.batches[0].shape[-2:]
        self.example = Example.of(backbone, (height, width) if takes_any_size else None, 1)
        with merging_at(backbone, 0):
            self.references = [self.objective.outputs(backbone, batch) for batch in self.batches]

    def features(self, images: Dataset) -> list[torch.Tensor]:
        """Those without merging, of other images."""
        with merging_at(self.backbone, 0):
            return [self.objective.outputs(self.backbone, batch) for batch in self._load(images)]

    def distances(self, recipe: MergeRecipe, degree: int) -> torch.Tensor:
        """That of each image: float64 `(images,)`."""
        schedule = recipe.schedule(degree, len(self.backbone.layers))
        values = [_as_text(value) for value in (recipe.match_by, recipe.size_penalty, schedule)]
        if recipe.reads_attention:
            values.append(_as_text(recipe.attention_penalty))
        measured = self.progress.measured(" ".join(values), lambda: self._measure(recipe, degree))
        return torch.tensor(measured, dtype=torch.float64)

    def flops(self, recipe: MergeRecipe, degree: int) -> int:
        """The floating-point operations for one image, counted."""
        return self._count(recipe, recipe.schedule(degree, len(self.backbone.layers)))

    def predicted_flops(self, recipe: MergeRecipe, degree: int) -> float:
        """The same from a few counts, for those who ask often."""
        layers = len(self.backbone.layers)
        if self.flop_model is None:
            tokens = self.example.count_at(0).tokens[0]
            reads_attention = self.backbone.has_class_token
            self.flop_model = FlopModel(self._count, MATCH_BY, reads_attention, tokens, self.backbone.protected, layers)
        return self.flop_model(recipe, recipe.schedule(degree, layers))

    def _count(self, recipe: MergeRecipe, schedule: Sequence[int]) -> int:
        def count() -> int:
            with merging_at(self.backbone, 0, recipe=recipe):
                return self.example.count_at(list(schedule)).flops

        name = f"FLOPs {_as_text(recipe.match_by)} {_as_text(schedule)}"
        if recipe.reads_attention:
            name += f" {_as_text(recipe.attention_penalty)}"
        return self.progress.measured(name, count)

    def _load(self, images: Dataset) -> Iterator[torch.Tensor]:
        parameter = next(self.backbone.module.parameters())
        for batch in DataLoader(images, batch_size=self.batch_size):
            yield batch["pixel_values"].to(parameter.device, parameter.dtype)

    def _measure(self, recipe: MergeRecipe, degree: int) -> list[float]:
        found: list[Any] = []
        with merging_at(self.backbone, degree, recipe=recipe):
            for batch, reference in zip(self.batches, self.references, strict=True):
                student = self.objective.outputs(self.backbone, batch)
                found.append(self.objective.distances(reference, student))
        return torch.cat(found).double().tolist()


def _as_text(value: Any) -> str:
    """A part of a recipe, in the name of a measurement."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
