# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Teacher and student of self-distillation, on one copy of the frozen weights."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.objectives import Objective
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import set_merging
from tocom_hf.merging.recipes import MergeRecipe


class SelfDistiller:
    """Runs the frozen model as teacher, and with the signed chain of plugins as student.

    Args:
        backbone: Of the frozen model in evaluation mode, with the branches of `plugins` installed.
        plugins: The chain to train.
        objective: What to compare.
        accelerator: Shards the frozen weights, where it is set up to.
        proportional_attention, recipe: As in `apply_tome`.
    """

    def __init__(
        self,
        backbone: Backbone,
        plugins: PluginChain,
        objective: Objective,
        accelerator: Accelerator | None = None,
        proportional_attention: bool = True,
        recipe: MergeRecipe | None = None,
    ):
        self.plugins = plugins
        self.objective = objective
        self.proportional_attention = proportional_attention
        set_merging(backbone, 0, class_tokens_only=_reads_class_tokens_only(backbone), recipe=recipe)
        # what is sharded must be what is called
        model = objective.part(backbone)
        if accelerator is not None:
            # the plugins are no part of the model: they are small, and the same on every process
            plugins.to(accelerator.device)
            if accelerator.distributed_type == DistributedType.FSDP:
                model = accelerator.prepare(model)
            else:
                backbone.model.to(accelerator.device)  # type: ignore[arg-type]
        self.backbone = find_backbone(model)

    def judge(self, pixel_values: torch.Tensor, source_r: int, target_r: int) -> torch.Tensor:
        """What agreement is measured by, of the run that `run` makes with these arguments."""
        self._prepare(source_r, target_r, None)
        return self.objective.judge.outputs(self.backbone, pixel_values)

    def run(self, pixel_values: torch.Tensor, source_r: int, target_r: int, keys: torch.Tensor | None = None) -> Any:
        """What the objective compares, of the model at degree `target_r` with the chain from `source_r` to it.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            source_r, target_r: The degrees; where they are equal, no plugin is used.
            keys: int64 `(batch,)`, keys of the images for dropout; `None` for no dropout.
        """
        self._prepare(source_r, target_r, keys)
        return self.objective.outputs(self.backbone, pixel_values)

    def loss(
        self, pixel_values: torch.Tensor, source_r: int, target_r: int, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How far the student at `target_r` is from the teacher at `source_r`, the mean over images (ToCom, eq. 6).

        Takes what `run` takes.
        """
        with torch.no_grad():
            teacher = self.run(pixel_values, source_r, source_r)
        student = self.run(pixel_values, source_r, target_r, keys)
        return self.objective.loss(teacher, student)

    def _prepare(self, source_r: int, target_r: int, keys: torch.Tensor | None) -> None:
        self.plugins.activate(source_r, target_r, keys)
        set_merging(self.backbone, target_r, proportional_attention=self.proportional_attention)


def _reads_class_tokens_only(backbone: Backbone) -> bool:
    """Whether the last layer may leave all other tokens out.

    The heads that transformers itself has for these families read nothing else; those of others might.
    """
    model = backbone.model
    is_stock = type(model).__module__.startswith("transformers.") and not hasattr(model, "decoder")
    return is_stock and backbone.protected > 0 and not backbone.architecture.restore
