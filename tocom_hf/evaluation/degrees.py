# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a degree costs and what it is worth: accuracy, tokens, images per second, side by side for several degrees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from tocom_hf.cost.flops import Example
from tocom_hf.cost.timing import DegreeCost, measure_costs
from tocom_hf.devices import evaluation_mode
from tocom_hf.errors import DatasetError
from tocom_hf.evaluation.classifiers import require_classifier_model
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.inputs import main_input_name
from tocom_hf.model.tocom_model import TocomModel


_ROUNDS = 15  # of timing


@dataclass(frozen=True)
class DegreeResult:
    """One row of `evaluate_degrees`.

    Attributes:
        cost: What the degree costs, per batch of `evaluate_degrees`.
        accuracy_plain: Share of images classified right with the weights at `source_r`, in [0, 1].
        accuracy_tocom: The same with the plugins composed in.

    Example:

    ```python
    >>> from tocom_hf import DegreeCost, DegreeResult
    >>> cost = DegreeCost(8, (50, 18, 2), gflops=0.02, latency_ms=32.2, images_per_second=3110.0, speedup=2.6)
    >>> result = DegreeResult(cost, accuracy_plain=0.88, accuracy_tocom=0.9)
    >>> result.target_r, result.tokens, f"{result.accuracy_tocom - result.accuracy_plain:.1%}"
    (8, 2, '2.0%')

    ```
    """

    cost: DegreeCost
    accuracy_plain: float
    accuracy_tocom: float

    @property
    def target_r(self) -> int:
        """The degree."""
        return self.cost.target_r

    @property
    def tokens(self) -> int:
        """Tokens left after the last layer."""
        return self.cost.tokens[-1]

    @property
    def images_per_second(self) -> float:
        """Forward passes only, the median over rounds in which the degrees took turns."""
        return self.cost.images_per_second

    @property
    def speedup(self) -> float:
        """Over degree 0, the median over rounds."""
        return self.cost.speedup


@torch.no_grad()
def accuracy(model: PreTrainedModel, loader: DataLoader) -> float:
    """Share of images whose largest logit is the label's.

    Args:
        model: A classifier, in evaluation mode.
        loader: Batches with `pixel_values` and `labels`.
    """
    hits = total = 0
    name = main_input_name(model)
    device = next(model.parameters()).device
    for batch in loader:
        logits = model(**{name: batch["pixel_values"].to(device)}).logits
        hits += (logits.argmax(-1).cpu() == batch["labels"]).sum().item()
        total += len(batch["labels"])
    return hits / total


def evaluate_degrees(
    model: TocomModel, dataset: Dataset, degrees: Sequence[int], *, batch_size: int = 100
) -> list[DegreeResult]:
    """Compare plain merging with ToCom at several degrees on labelled images.

    Args:
        model: A classifier with plugins.
        dataset: Samples with `pixel_values` and `labels`, the latter as the model counts its classes (`match_labels`).
        degrees: The degrees to compare.
        batch_size: Images per forward pass, for accuracy and throughput alike.

    Returns:
        One row per degree.

    Raises:
        DatasetError: if the data set is empty.
        DegreeError: if a degree is outside the plugin set.
        UnsupportedModelError: if the model has no head, or one for regression or for several labels an image.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import TocomModel, evaluate_degrees
    >>> model = TocomModel.from_pretrained(
    ...     "examples/fashion_mnist/checkpoint", plugins="hub_cards/tocom-vit-fashion-mnist"
    ... )
    >>> images = [{"pixel_values": torch.zeros(3, 28, 28), "labels": 8} for _ in range(4)]
    >>> [result.tokens for result in evaluate_degrees(model, images, [0, 4])]
    [50, 4]

    ```
    """
    require_classifier_model(model)
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DatasetError("There are no images to evaluate on.")
    if model.plugins is not None:
        for degree in degrees:
            model.plugins.require(model.source_r, degree)
    loader = DataLoader(dataset, batch_size=batch_size)
    device = next(model.parameters()).device
    pixel_values = next(iter(loader))["pixel_values"].to(device)
    results = []
    with evaluation_mode(model):
        example = Example(find_backbone(model), model, pixel_values)
        for cost in measure_costs(example, degrees, rounds=_ROUNDS):
            with model.plain_at(cost.target_r):
                plain = accuracy(model, loader)
            with model.at(cost.target_r):
                tocom = accuracy(model, loader)
            results.append(DegreeResult(cost, plain, tocom))
    return results
