# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A scale for every layer and plugin instead of one for all, fitted to a checkpoint on a few images without labels."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tocom_hf.devices import describe_device, evaluation_mode
from tocom_hf.distillation.objectives import Objective, find_objective
from tocom_hf.errors import ArgumentError, DatasetError, DistillationError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import merging_at
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.plugins.composition import Adapter, Factors, chain, require_in_range
from tocom_hf.plugins.config import BackboneFacts
from tocom_hf.plugins.plugin_set import PluginSet
from tocom_hf.scales.composed_weights import ComposedWeight, FactorGradients


def fit_scales(
    model: TocomModel,
    images: Dataset,
    *,
    target_r: int | Sequence[int] | None = None,
    max_steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> PluginSet:
    """Fit a scale for every layer and plugin to one checkpoint, on a few hundred images without labels.

    One factor s stands in front of all plugins (ToCom, eq. 4 and 5). But fine-tuning moves some layers further from the
    backbone that the plugins were distilled on than others. Here each product `B_i A_i` of each linear layer gets a
    factor of its own: `W' = W + sign * s * sum_i g_i B_i A_i`, where all `g_i` start at one. They are trained as the
    plugins were, by self-distillation (eq. 6): the teacher is the checkpoint at `source_r`, the student the same one
    with the chain at another degree, the loss that of `pick_scale`. The plugins stay what they are; a few hundred
    numbers are learnt, for which a few hundred images are enough, where `distill` trains all of the set.

    Args:
        model: A model with plugins, in full precision for best results. It is left as it was, but must not run
            elsewhere meanwhile.
        images: Samples with finished `pixel_values`, float `(channels, height, width)`, of clips with the frames in
            front, of the task that the checkpoint serves; labels are not looked at. A sample must be the same whenever
            it is asked for: what the teacher makes of it is computed once.
        target_r: The degree or degrees that the checkpoint will run at; by default all that the set covers. Plugins
            that no chain to them has keep their scale.
        max_steps: How many steps to train, each on one batch and one degree; the degrees take turns.
        batch_size: Images of a step; of fewer images, all of them.
        learning_rate: Adam's for the factors `g`, falling to zero along a cosine.
        seed: Decides batches and the order of degrees.

    Returns:
        A plugin set for weights trained at `source_r`, with the factors in `lora_B`; it recommends the scale that the
        model had. To use it: `TocomModel.from_pretrained(model, plugins=fitted, target_r=...)`.

    Raises:
        DatasetError: if there are no images.
        DegreeError: if a degree is outside the plugin set.
        ArgumentError: if the model has no plugins, no degree differs from its `source_r`, or a number is out of range.
        PluginFileError: if a plugin cannot be read.
        DistillationError: if the loss becomes infinite or NaN.
        UnsupportedModelError: if the model uses a weight that plugins change in another way than a linear layer does.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import TocomModel, fit_scales
    >>> model = TocomModel.from_pretrained(
    ...     "examples/fashion_mnist/checkpoint", plugins="hub_cards/tocom-vit-fashion-mnist"
    ... )
    >>> images = [{"pixel_values": torch.rand(3, 28, 28)} for _ in range(4)]
    >>> fit_scales(model, images, max_steps=1)
    PluginSet(base_model='examples/fashion_mnist/checkpoint', source_r=0, r=0..8, rank=2, scale=0.08)

    ```
    """
    for name, value in (("max_steps", max_steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive integer, got {value!r}.")
    if not isinstance(learning_rate, int | float) or not 0 < learning_rate < math.inf:
        raise ArgumentError(f"learning_rate must be a positive number, got {learning_rate!r}.")
    plugins = getattr(model, "plugins", None)  # of a model that is no TocomModel there are none
    if plugins is None:
        raise ArgumentError("The model has no plugins, so there are no scales to fit.")
    source_r = model.source_r
    targets = _targets(plugins, source_r, target_r)
    if len(images) == 0:  # type: ignore[arg-type]
        raise DatasetError("There are no images to fit scales by.")
    scale = plugins.require(source_r, targets[0], model.scale)
    if not scale:
        raise ArgumentError("At scale 0 plugins have no effect, so there are no scales to fit. Set another one first.")

    backbone = find_backbone(model)
    objective = find_objective("auto", model)
    device = next(model.parameters()).device
    adapters = [plugins.adapter(i) for i in range(plugins.config.min_r, plugins.config.max_r)]
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(images))  # type: ignore[arg-type]
    sampler = RandomSampler(images, num_samples=max_steps * size, generator=generator)  # type: ignore[arg-type]
    # given a generator, it leaves torch's own alone
    loader = DataLoader(_Numbered(images), batch_size=size, sampler=sampler, generator=generator)
    with evaluation_mode(model), model.at(source_r), torch.enable_grad():
        facts = BackboneFacts.of(backbone)
        student = _Student(model, backbone, objective, adapters, plugins.config.min_r, scale)
        teacher = _Teacher(student)
        optimizer = torch.optim.Adam([student.factors], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
        order: list[int] = []
        for step, batch in enumerate(loader):
            if not order:
                drawn = torch.randperm(len(targets), generator=generator).tolist()
                order = [targets[position] for position in drawn]
            pixel_values = batch["pixel_values"].to(device)
            loss = student.loss(pixel_values, teacher.outputs(batch["index"], pixel_values), order.pop())
            if not math.isfinite(loss.item()):
                raise DistillationError(
                    f"The divergence of step {step} is {loss.item()}. Look for images that are not finite, or lower "
                    f"learning_rate={learning_rate:g}."
                )
            (student.factors.grad,) = torch.autograd.grad(loss, [student.factors])
            optimizer.step()
            schedule.step()
    config = dataclasses.replace(
        plugins.config,
        backbone=facts,
        base_model=model.name_or_path or plugins.config.base_model,
        base_model_revision=getattr(model.config, "_commit_hash", None),
        source_r=source_r,
        recommended_scale=scale,
        evaluation=[],
        training={
            "fitted": "one scale for every layer and plugin",
            "objective": objective.name,
            "target_r": targets,
            "num_images": len(images),  # type: ignore[arg-type]
            "max_steps": max_steps,
            "batch_size": size,
            "learning_rate": learning_rate,
            "seed": seed,
            "hardware": describe_device(device),
            "init_plugins": plugins.config.origin(),
        },
    )
    return PluginSet(config, dict(enumerate(student.adapters(adapters), plugins.config.min_r)))


def _targets(plugins: PluginSet, source_r: int, target_r: int | Sequence[int] | None) -> list[int]:
    config = plugins.config
    wanted: Any = range(config.min_r, config.max_r + 1) if target_r is None else target_r
    wanted = wanted if isinstance(wanted, Sequence) else [wanted]
    degrees = dict.fromkeys(require_in_range(degree, "target_r", config.min_r, config.max_r) for degree in wanted)
    targets = [degree for degree in degrees if degree != source_r]
    if not degrees:
        raise ArgumentError("There is no degree to fit scales for. Leave target_r away to fit them for all of the set.")
    if not targets:
        raise ArgumentError(f"The model was trained at target_r={source_r}, so there are no scales to fit.")
    return targets


class _Student(nn.Module):
    """A model whose weights are composed with a factor for every layer and plugin.

    Args:
        model: It runs at its source degree.
        backbone: Of the model.
        objective: What to compare.
        adapters: All plugins of the set.
        min_r: The index of the first of them.
        scale: The factor in front of all.
    """

    def __init__(
        self,
        model: TocomModel,
        backbone: Backbone,
        objective: Objective,
        adapters: list[Adapter],
        min_r: int,
        scale: float,
    ):
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.objective = objective
        self.min_r = min_r
        self.scale = scale
        prefix = f"model.{backbone.path}." if backbone.path else "model."
        self.rank = next(iter(adapters[0].values())).lora_A.shape[0]
        self.stacked: dict[str, tuple[torch.Tensor, Factors]] = {}
        for path in adapters[0]:
            weight = cast(nn.Linear, backbone.module.get_submodule(path)).weight.detach()
            lora_A = torch.cat([adapter[path].lora_A for adapter in adapters], dim=0).to(weight.device)
            lora_B = torch.cat([adapter[path].lora_B for adapter in adapters], dim=1).to(weight.device)
            self.stacked[f"{prefix}{path}.weight"] = (weight, Factors(lora_A, lora_B))
        # a row for each layer, a column for each plugin
        self.factors = torch.ones(len(self.stacked), len(adapters), device=weight.device, requires_grad=True)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.objective.outputs(self.backbone, pixel_values)

    def loss(self, pixel_values: torch.Tensor, teacher: torch.Tensor, target_r: int) -> torch.Tensor:
        """How far the student at `target_r` is from the model at its source degree (ToCom, eq. 6)."""
        composed = self._composed(target_r)
        weights = {name: layer.weight for name, layer in composed.items()}
        with merging_at(self.backbone, target_r), FactorGradients(composed) as gradients:
            student = functional_call(self, weights, (pixel_values,))
        if gradients.unused:
            raise UnsupportedModelError(
                f"Scales cannot be fitted to a model that does not use {min(gradients.unused)} as the weight of a "
                "linear layer. Pick one scale for all instead, with pick_scale."
            )
        return self.objective.loss(teacher, student)

    def adapters(self, originals: list[Adapter]) -> list[Adapter]:
        """The plugins with their factors in `lora_B`, on the CPU."""
        factors = self.factors.detach().cpu()
        adapters: list[Adapter] = []
        for column, original in enumerate(originals):
            adapter = {}
            for row, (path, (lora_A, lora_B)) in enumerate(original.items()):
                adapter[path] = Factors(lora_A.clone(), lora_B * factors[row, column])
            adapters.append(adapter)
        return adapters

    def _composed(self, target_r: int) -> dict[str, ComposedWeight]:
        """The weights that differ at a degree from those at the source degree, by name."""
        indices, sign = chain(self.model.source_r, target_r)
        plugins = slice(indices.start - self.min_r, indices.stop - self.min_r)
        columns = slice(plugins.start * self.rank, plugins.stop * self.rank)
        # sign and scale go with the factors, so that what is summed up is (lora_B * factors) @ lora_A
        signed = self.factors[:, plugins] * (sign * self.scale)  # (layers, plugins)
        by_column = signed.repeat_interleave(self.rank, dim=1)  # (layers, plugins * rank)
        return {
            name: ComposedWeight.of(weight, lora_A[columns], lora_B[:, columns], by_column[row])
            for row, (name, (weight, (lora_A, lora_B))) in enumerate(self.stacked.items())
        }


class _Numbered(Dataset):
    """The images of a data set with their numbers, and nothing else of its samples."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "pixel_values": self.images[index]["pixel_values"]}


class _Teacher:
    """What the model puts out at its source degree: computed when an image is first drawn, and kept.

    The weights at that degree do not change, and every image is drawn again and again.

    Args:
        student: The model without its factors.
    """

    def __init__(self, student: _Student):
        self.student = student
        self.known: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def outputs(self, indices: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The outputs for a batch.

        Args:
            indices: The numbers of the images, int64 `(batch,)`.
            pixel_values: The images, `(batch, channels, height, width)`.
        """
        numbers = indices.tolist()
        # one row for each: a batch that ends one pass and begins the next may hold an image twice
        new = {number: row for row, number in enumerate(numbers) if number not in self.known}
        if new:
            self.known.update(zip(new, self.student(pixel_values[[*new.values()]]), strict=True))
        return torch.stack([self.known[number] for number in numbers])
