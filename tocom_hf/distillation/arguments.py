# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How a plugin set is distilled: the arguments of `distill`, of `tocom distill`, and their presets."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tocom_hf.distillation.augmentation import Augmentation
from tocom_hf.distillation.checks import (
    Amount,
    Count,
    InnerShare,
    LayerNames,
    Magnitude,
    Natural,
    Positive,
    PositiveShare,
    Seed,
    Share,
    ShareBelowOne,
    require_checks,
)
from tocom_hf.distillation.degrees import find_sampler
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.errors import ArgumentError, DegreeError
from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe, read_recipe
from tocom_hf.merging.schedule import require_degree
from tocom_hf.plugins.composition import require_scale


def _argument(default: Any, text: str) -> Any:
    """A field of the arguments, with the text that the command line shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class DistillationArguments:
    """How a plugin set is distilled. Numbers that the paper gives (section 4.1) are the defaults; its augmentation is
    what `PRESETS["paper"]` adds.

    Example:

    ```python
    >>> from tocom_hf import DistillationArguments
    >>> DistillationArguments(max_r=8, rank=4).scale
    0.1

    ```
    """

    output_dir: str | None = _argument(None, "Folder for checkpoints and the plugin set. Without it none are written.")

    max_r: int = _argument(16, "Largest degree; the set has this many plugins.")
    rank: int = _argument(2, "Rank h of one plugin.")
    scale: float = _argument(0.1, "Factor s in front of the plugins during training.")
    target_modules: LayerNames | None = _argument(
        None, "Linear layers that plugins apply to, e.g. q_proj v_proj fc1, or all-linear; default: query and value."
    )
    lora_dropout: ShareBelowOne = _argument(0.1, "Dropout probability between the two factors of a plugin.")
    objective: str = _argument("auto", f"What teacher and student are compared by: auto, {', '.join(OBJECTIVES)}.")
    proportional_attention: bool = _argument(True, "Add the log of token sizes to attention logits, as ToMe does.")
    merge_recipe: str | None = _argument(
        None, "JSON file of `tocom find-recipe`: what tokens are matched by, and schedules; default: ToMe's rule."
    )
    source_r: int | None = _argument(None, "Degree of every teacher, for weights trained at it; default: any.")
    degree_sampler: str = _argument("uniform", "How degrees are drawn: uniform, adjacent or antithetic.")
    train_degrees: list[int] | None = _argument(
        None, "The only degrees that are learnt, such as 0 8 12 16; default: all from 0 to max_r."
    )

    num_train_epochs: Count = _argument(10, "Passes over the data set. Ignored where max_steps is given.")
    max_steps: Count | None = _argument(None, "Steps of the training; needed for streams, which have no length.")
    per_device_train_batch_size: Count = _argument(128, "Images per process and forward pass.")
    gradient_accumulation_steps: Count = _argument(1, "Forward passes per step and process.")
    learning_rate: Positive = _argument(1e-3, "Peak learning rate for a global batch of 512; scales with the batch.")
    min_learning_rate: Amount = _argument(1e-5, "What the cosine schedule ends at.")
    weight_decay: Amount = _argument(0.05, "Of AdamW.")
    max_grad_norm: Positive | None = _argument(None, "Clip gradients to this norm.")
    ema_decay: InnerShare | None = _argument(
        None, "Keep an exponential moving average of the plugins, and return that."
    )
    gradient_checkpointing: bool = _argument(False, "Recompute activations: less memory, more time.")
    max_nonfinite_steps: Count = _argument(10, "Stop after so many steps in a row whose loss is not finite.")

    min_crop: PositiveShare = _argument(0.08, "Smallest share of an image that a random view shows; 1 shows all of it.")
    flip: Share = _argument(0.5, "Probability of mirroring an image.")
    randaugment_num_ops: Natural = _argument(0, "Operations of RandAugment for each image.")
    randaugment_magnitude: Magnitude = _argument(9.0, "Their strength, 0 to 10.")
    random_erasing: Share = _argument(0.0, "Probability of erasing a rectangle of an image.")
    mixup: Share = _argument(0.0, "Alpha of mixup; 0 is off.")
    cutmix: Share = _argument(0.0, "Alpha of cutmix; 0 is off.")

    seed: Seed = _argument(0, "Decides the plugins' initialisation, degrees, order of images, augmentation, dropout.")
    dataloader_num_workers: Natural = _argument(0, "Worker processes that load images, for each process.")
    skip_damaged: bool = _argument(False, "Take another image in the place of a damaged one, instead of stopping.")
    shuffle_buffer_size: Count = _argument(1000, "Samples of a stream that are shuffled among each other.")

    save_steps: Count = _argument(1000, "Write a checkpoint every so many steps, and when the run is told to stop.")
    save_total_limit: Count = _argument(2, "Keep so many of the newest checkpoints.")
    resume_from_checkpoint: str | None = _argument(None, "A checkpoint's folder, or `latest`.")
    logging_steps: Count = _argument(10, "Log figures every so many steps.")
    eval_steps: Count | None = _argument(None, "Measure the agreement grid every so many steps, not only at the end.")
    eval_degrees: list[int] | None = _argument(None, "Degrees of the agreement grid; default: five from 0 to max_r.")

    def __post_init__(self):
        if require_degree(self.max_r, "max_r") < 1:
            raise DegreeError("max_r must be at least 1: a plugin set needs two degrees.")
        if require_degree(self.rank, "rank") < 1:
            raise DegreeError("rank must be at least 1.")
        require_scale(self.scale)
        if self.source_r is not None and require_degree(self.source_r, "source_r") > self.max_r:
            raise DegreeError(f"source_r={self.source_r} is above max_r={self.max_r}.")
        require_checks(self)
        given = self.merge_recipe
        self._merge_recipe = TOME_RECIPE if given is None else read_recipe(given)
        find_sampler(self.degree_sampler, self.source_r)
        self._check_train_degrees()
        if self.objective not in ("auto", *OBJECTIVES):
            raise ArgumentError(f"objective must be one of auto, {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.augmentation.mixes and self.per_device_train_batch_size % 2:
            raise ArgumentError(
                "mixup and cutmix mix images in pairs, so per_device_train_batch_size must be even, "
                f"got {self.per_device_train_batch_size}."
            )
        if self.resume_from_checkpoint is not None and self.output_dir is None:
            raise ArgumentError("resume_from_checkpoint needs output_dir, where the checkpoints are.")
        for degree in self.eval_degrees or ():
            if require_degree(degree, "eval_degrees") > self.max_r:
                raise DegreeError(f"eval_degrees has {degree}, which is above max_r={self.max_r}.")

    def _check_train_degrees(self) -> None:
        """Plugins outside the degrees that are drawn would learn nothing."""
        if self.train_degrees is None:
            return
        drawn = {require_degree(degree, "train_degrees") for degree in self.train_degrees}
        if self.source_r is not None:
            drawn.add(self.source_r)
        if not drawn or (min(drawn), max(drawn)) != (0, self.max_r):
            raise DegreeError(
                f"train_degrees must reach from 0 to max_r={self.max_r}, or plugins outside of them learn nothing; "
                f"got {self.train_degrees}."
            )

    @property
    def merging_recipe(self) -> MergeRecipe:
        """How tokens merge, as in `apply_tome`."""
        return self._merge_recipe

    @property
    def merging(self) -> dict[str, Any]:
        """Settings of token merging, as a plugin set records them."""
        settings: dict[str, Any] = {"proportional_attention": self.proportional_attention}
        if self.merge_recipe is not None:
            settings["recipe"] = self._merge_recipe.to_dict()
        return settings

    @property
    def augmentation(self) -> Augmentation:
        """What is done to batches of images on the accelerator."""
        names = ("randaugment_num_ops", "randaugment_magnitude", "random_erasing", "mixup", "cutmix")
        return Augmentation(**{name: getattr(self, name) for name in names})

    def recipe(self) -> dict[str, Any]:
        """The arguments that decide the result: not those that only say where it is written or how often, nor how a
        global batch is spread over processes and forward passes."""
        recipe = {name: value for name, value in asdict(self).items() if name not in _NO_RECIPE}
        del recipe["merge_recipe"]
        if self.merge_recipe is not None:
            recipe["merge_recipe"] = self._merge_recipe.to_dict()  # of a file, what it holds
        return recipe

    def degrees(self) -> list[int]:
        """The student's degrees in the agreement grid."""
        degrees = self.eval_degrees or self.train_degrees
        if not degrees:
            steps = min(4, self.max_r)
            degrees = [round(self.max_r * step / steps) for step in range(steps + 1)]
        if self.source_r is not None:
            degrees = [*degrees, self.source_r]
        return sorted({*degrees})

    def sources(self) -> list[int]:
        """The teacher's degrees in the agreement grid."""
        return self.degrees() if self.source_r is None else [self.source_r]


_NO_RECIPE = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "max_nonfinite_steps", "dataloader_num_workers", "skip_damaged", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "logging_steps", "eval_steps", "eval_degrees",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # section 4.1 of the paper, with DeiT's augmentation
    "paper": {
        "max_r": 16, "rank": 2, "scale": 0.1, "lora_dropout": 0.1, "degree_sampler": "uniform", "num_train_epochs": 10,
        "per_device_train_batch_size": 128, "learning_rate": 1e-3, "min_learning_rate": 1e-5, "weight_decay": 0.05,
        "min_crop": 0.08, "flip": 0.5, "randaugment_num_ops": 2, "randaugment_magnitude": 9.0, "random_erasing": 0.25,
        "mixup": 0.8, "cutmix": 1.0,
    },
}  # fmt: skip
"""Values for `DistillationArguments` by the name of a preset."""
