# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a degree costs and what it is worth: accuracy, tokens, images per second, side by side for several degrees."""

import statistics
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from tocom_hf.devices import evaluation_mode, synchronize
from tocom_hf.errors import DatasetError
from tocom_hf.merging.architectures import find_backbone
from tocom_hf.merging.patching import merging_at
from tocom_hf.merging.schedule import tokens_per_layer
from tocom_hf.model.tocom_model import TocomModel


@dataclass(frozen=True)
class DegreeResult:
    """One row of `evaluate_degrees`.

    Attributes:
        target_r: The degree.
        tokens: Tokens left after the last layer.
        accuracy_plain: Share of images classified right with the weights at `source_r`, in [0, 1].
        accuracy_tocom: The same with the plugins composed in.
        images_per_second: Forward passes only, the median over interleaved rounds.
        speedup: Over degree 0, the median over rounds.

    Example:

    ```python
    >>> from tocom_hf import DegreeResult
    >>> result = DegreeResult(8, 2, accuracy_plain=0.88, accuracy_tocom=0.9, images_per_second=3110.0, speedup=2.6)
    >>> f"{result.accuracy_tocom - result.accuracy_plain:.1%}"
    '2.0%'

    ```
    """

    target_r: int
    tokens: int
    accuracy_plain: float
    accuracy_tocom: float
    images_per_second: float
    speedup: float


@contextmanager
def plain_merging(model: TocomModel, r: int):
    """Run a `TocomModel` at another degree without compensation within a `with` block: the weights at `source_r`."""
    with model.at(model.source_r), merging_at(model, r):
        yield model


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """Share of images whose largest logit is the label's.

    Args:
        model: A classifier, in evaluation mode.
        loader: Batches with `pixel_values` and `labels`.
    """
    hits = total = 0
    device = next(model.parameters()).device
    for batch in loader:
        logits = model(pixel_values=batch["pixel_values"].to(device)).logits
        hits += (logits.argmax(-1).cpu() == batch["labels"]).sum().item()
        total += len(batch["labels"])
    return hits / total


@torch.no_grad()
def throughput(
    model: TocomModel, degrees: Sequence[int], pixel_values: torch.Tensor, rounds: int = 15
) -> dict[int, tuple[float, float]]:
    """Images per second at several degrees, measured in turn so that a change of the machine's speed hits all alike.

    Args:
        model: The model; it runs without compensation, which costs the same.
        degrees: The degrees to measure; speed-ups are relative to the first.
        pixel_values: The batch to run, `(batch, channels, height, width)`, on the model's device.
        rounds: Measurements of each degree, after one to warm up.

    Returns:
        For every degree the median images per second, and the median over rounds of the speed-up over the first degree.
    """
    seconds: dict[int, list[float]] = {degree: [] for degree in degrees}
    for _ in range(rounds + 1):
        for degree in degrees:
            with plain_merging(model, degree):
                synchronize(pixel_values.device)
                start = time.perf_counter()
                model(pixel_values=pixel_values)
                synchronize(pixel_values.device)
                seconds[degree].append(time.perf_counter() - start)
    baseline = seconds[degrees[0]][1:]
    return {
        degree: (
            len(pixel_values) / statistics.median(times[1:]),
            statistics.median(dense / merged for dense, merged in zip(baseline, times[1:], strict=True)),
        )
        for degree, times in seconds.items()
    }


def evaluate_degrees(
    model: TocomModel, dataset: Dataset, degrees: Sequence[int], *, batch_size: int = 100
) -> list[DegreeResult]:
    """Compare plain merging with ToCom at several degrees on labelled images.

    Args:
        model: A classifier with plugins.
        dataset: Samples with `pixel_values` and `labels`.
        degrees: The degrees to compare.
        batch_size: Images per forward pass, for accuracy and throughput alike.

    Returns:
        One row per degree.

    Raises:
        DatasetError: if the data set is empty.
        DegreeError: if a degree is outside the plugin set.

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
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DatasetError("There are no images to evaluate on.")
    loader = DataLoader(dataset, batch_size=batch_size)
    backbone = find_backbone(model)
    pixel_values = next(iter(loader))["pixel_values"].to(next(model.parameters()).device)
    with evaluation_mode(model):
        speed = throughput(model, sorted({0, *degrees}), pixel_values)  # 0 comes first
        results = []
        for degree in degrees:
            with plain_merging(model, degree):
                plain = accuracy(model, loader)
            with model.at(degree):
                tocom = accuracy(model, loader)
            entering = _input_tokens(model, pixel_values)
            tokens = tokens_per_layer(degree, len(backbone.layers), entering, backbone.protected)[-1]
            results.append(DegreeResult(degree, tokens, plain, tocom, *speed[degree]))
    return results


def _input_tokens(model: TocomModel, pixel_values: torch.Tensor) -> int:
    """Tokens that enter the first layer, measured on one image."""
    counts: list[int] = []
    layer = find_backbone(model).layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    try:
        with torch.no_grad():
            model(pixel_values=pixel_values[:1])
    finally:
        handle.remove()
    return counts[0]
