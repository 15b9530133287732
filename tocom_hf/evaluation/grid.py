# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of checkpoints over a grid of source and target degrees: plain, with ToCom, trained at the target.

The tables of the paper (ToCom, section 4) are such grids. The scale s in front of the plugins is picked on validation
images, for every checkpoint and target degree, by their labels and, apart from that, without; test images are never
looked at for it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from tocom_hf.devices import evaluation_mode
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.errors import ArgumentError, DatasetError
from tocom_hf.evaluation.classifiers import require_classifier_model
from tocom_hf.merging.inputs import main_input_name
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.scales.choice import PAPER_SCALES, WIDE_SCALES


@dataclass(frozen=True)
class CellRun:
    """One checkpoint at one degree.

    Attributes:
        checkpoint: Its name.
        source_r: The degree that it was trained at.
        target_r: The degree that it ran at.
        plain: Which test images it got right without compensation, bool `(images,)`.
        at_scale: The same with the plugins at each scale that was picked or asked for; empty where the degrees are
            equal.
        picked: The scale that validation picked, by the name of the set of scales.
        fixed: The scales asked for whatever validation says.
        validation: Accuracy, mean cross-entropy and mean divergence from the checkpoint at its source degree, on the
            validation images, by scale; 0 is plain merging.
    """

    checkpoint: str
    source_r: int
    target_r: int
    plain: torch.Tensor
    at_scale: dict[float, torch.Tensor]
    picked: dict[str, float]
    fixed: tuple[float, ...]
    validation: dict[float, tuple[float, ...]]


@dataclass(frozen=True)
class Compensated:
    """What plugins make of one cell. All figures but the scales are fractions of one.

    Attributes:
        accuracy: Mean over checkpoints.
        se: Standard error of it.
        gain: Accuracy over plain merging.
        gain_se: Standard error of it, from the differences on each image.
        gap_closed: `gain / (trained - plain)`; `None` where no checkpoint of the target degree was given, or where it
            is no better than plain merging.
        scales: The scale of every checkpoint, in their order.
    """

    accuracy: float
    se: float
    gain: float
    gain_se: float
    gap_closed: float | None
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One source degree at one target degree, over all checkpoints (seeds) of the source degree.

    Standard errors are those of the sample of test images, given the checkpoints: each image counts with the share of
    checkpoints that got it right.

    Attributes:
        source_r, target_r: The degrees.
        checkpoints: How many there are of the source degree.
        plain, plain_se: Accuracy without compensation, in [0, 1], and its standard error.
        trained, trained_se: The same of the checkpoints trained at the target degree; `None` where there are none.
        gap, gap_se: `trained - plain`, and its standard error from the differences on each image.
        lost, lost_se: The accuracy of the same checkpoints at their source degree minus `plain`, and its standard
            error likewise; `None` where they did not run there. Plugins imitate the model at its source degree, so
            this is what they can win back. Training at the target degree may bring less, or more.
        compensated: By the name of what picked the scale (see `pick_scales`), or by the fixed scale (`scale -0.1`).
            Empty where the degrees are equal.
    """

    source_r: int
    target_r: int
    checkpoints: int
    plain: float
    plain_se: float
    trained: float | None
    trained_se: float | None
    gap: float | None
    gap_se: float | None
    lost: float | None
    lost_se: float | None
    compensated: dict[str, Compensated]


def evaluate_checkpoint(
    model: TocomModel,
    name: str,
    degrees: Sequence[int],
    test: Dataset,
    validation: Dataset | None,
    *,
    scales: Sequence[float] = WIDE_SCALES,
    fixed_scales: Sequence[float] = (),
    batch_size: int = 100,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
) -> list[CellRun]:
    """Run one checkpoint at several degrees, plain and with the plugins, on every process of an `accelerate launch`.

    Args:
        model: A classifier; without plugins it only runs plain. It is moved to the accelerator's device, and otherwise
            left as it was.
        name: What to call it.
        degrees: The target degrees. At its own degree there is nothing to compensate.
        test: Samples with `pixel_values` and `labels`, the latter as the model counts its classes (`match_labels`).
        validation: The same, of which no image is in `test`, to pick the scale on. `None` to run at `fixed_scales`
            only.
        scales: The scales to pick from.
        fixed_scales: Scales to run at whatever validation says, for ablations; a negative one flips the sign.
        batch_size: Images per process and forward pass.
        num_workers: Worker processes that load images, for each process and data set. Images are read anew for every
            degree and scale, so a GPU waits for them without.
        accelerator: Where to run; by default a new one.

    Returns:
        One item for each degree, the same on every process.

    Raises:
        DatasetError: if a data set is empty.
        DegreeError: if a degree is outside the plugin set.
        ArgumentError: if there are validation images but no scales to pick from.
        UnsupportedModelError: if the model has no head, or one for regression or for several labels an image.
    """
    require_classifier_model(model)
    accelerator = accelerator or Accelerator()
    if validation is not None and not scales:
        raise ArgumentError("There are validation images but no scales to pick from. Give scales, e.g. PAPER_SCALES.")
    sets = [("test", test)] + ([("validation", validation)] if validation is not None else [])
    for kind, dataset in sets:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise DatasetError(f"There are no {kind} images to evaluate on.")
    if model.plugins is not None:
        for degree in degrees:
            model.plugins.require(model.source_r, degree)
    reading: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loaders = {
        kind: accelerator.prepare_data_loader(DataLoader(data, batch_size=batch_size, **reading)) for kind, data in sets
    }
    runs = []
    with evaluation_mode(model):
        model.to(accelerator.device)  # type: ignore[arg-type]
        if validation is not None and model.plugins is not None:
            with model.at(model.source_r):
                teacher, _ = _predict(model, loaders["validation"], accelerator)
        for degree in degrees:
            with model.plain_at(degree):
                plain = _right(*_predict(model, loaders["test"], accelerator))
            if degree == model.source_r or model.plugins is None:
                runs.append(CellRun(name, model.source_r, degree, plain, {}, {}, (), {}))
                continue
            sweep: dict[float, tuple[float, ...]] = {}
            picked: dict[str, float] = {}
            if validation is not None:
                for scale in dict.fromkeys((0.0, *scales)):
                    with model.at(degree, scale):
                        sweep[scale] = _figures(teacher, *_predict(model, loaders["validation"], accelerator))
                picked = pick_scales(sweep, scales)
            at_scale = {}
            for scale in dict.fromkeys((*picked.values(), *fixed_scales)):
                with model.at(degree, scale):
                    at_scale[scale] = _right(*_predict(model, loaders["test"], accelerator)) if scale else plain
            runs.append(CellRun(name, model.source_r, degree, plain, at_scale, picked, tuple(fixed_scales), sweep))
    return runs


def pick_scales(sweep: dict[float, tuple[float, ...]], scales: Sequence[float]) -> dict[str, float]:
    """The best scales by what validation images say.

    Args:
        sweep: Accuracy, mean cross-entropy and mean divergence by scale; 0 is plain merging.
        scales: The scales to pick from.

    Returns:
        `wide`, the most accurate of all scales, and `paper`, of those of the paper; among equals that of lowest
        cross-entropy. `unlabelled`, the one of lowest divergence, which may be 0 (as `tocom_hf.pick_scale`).
    """
    sets = {"paper": [scale for scale in scales if scale in PAPER_SCALES], "wide": list(scales)}
    picked = {
        name: max(choice, key=lambda scale: (sweep[scale][0], -sweep[scale][1]))
        for name, choice in sets.items()
        if choice
    }
    return picked | {"unlabelled": min(sweep, key=lambda scale: sweep[scale][2])}


def summarize(runs: Sequence[CellRun]) -> list[Cell]:
    """Average the checkpoints of each source degree, and compare with those trained at the target degree.

    Args:
        runs: Of one task, so that all hold the same test images in the same order.

    Returns:
        The cells, by source and target degree.
    """
    cells: dict[tuple[int, int], list[CellRun]] = defaultdict(list)
    for run in runs:
        cells[run.source_r, run.target_r].append(run)
    own = {
        source_r: _mean_over_checkpoints(run.plain for run in group)
        for (source_r, r), group in cells.items()
        if source_r == r
    }
    return [_cell(group, own.get(target_r), own.get(source_r)) for (source_r, target_r), group in sorted(cells.items())]


def _cell(group: list[CellRun], trained: torch.Tensor | None, own: torch.Tensor | None) -> Cell:
    first, plain = group[0], _mean_over_checkpoints(run.plain for run in group)
    moved = first.source_r != first.target_r
    gap = estimate(trained - plain) if trained is not None and moved else None
    lost = estimate(own - plain) if own is not None and moved else None
    columns = {name: [run.picked[name] for run in group] for name in first.picked}
    columns |= {f"scale {scale:g}": [scale] * len(group) for scale in first.fixed}
    compensated = {}
    for name, scales in columns.items():
        tocom = _mean_over_checkpoints(run.at_scale[scale] for run, scale in zip(group, scales, strict=True))
        gain, gain_se = estimate(tocom - plain)
        closed = gain / gap[0] if gap is not None and gap[0] > 0 else None
        compensated[name] = Compensated(*estimate(tocom), gain, gain_se, closed, tuple(scales))
    known = {
        "plain": estimate(plain),
        "trained": trained if trained is None else estimate(trained),
        "gap": gap,
        "lost": lost,
    }
    estimates: dict[str, Any] = {}
    for name, figures in known.items():
        estimates[name], estimates[f"{name}_se"] = figures or (None, None)
    return Cell(first.source_r, first.target_r, len(group), compensated=compensated, **estimates)


def _mean_over_checkpoints(rights: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([right.double() for right in rights]).mean(dim=0)


def estimate(values: torch.Tensor) -> tuple[float, float]:
    """Mean over images and its standard error, from one number for each image, `(images,)`."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


@torch.no_grad()
def _predict(model: TocomModel, loader: DataLoader, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, float32 `(images, classes)`, and labels, `(images,)`, in the order of the images."""
    outcomes = []
    name = main_input_name(model)
    for batch in loader:
        with accelerator.autocast():
            logits = model(**{name: batch["pixel_values"]}).logits
        outcome = accelerator.gather_for_metrics((F.log_softmax(logits.float(), dim=-1), batch["labels"]))
        outcomes.append([part.cpu() for part in outcome])
    predictions, labels = (torch.cat(parts) for parts in zip(*outcomes, strict=True))
    return predictions, labels


def _right(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which images are classified right, bool `(images,)`."""
    return predictions.argmax(-1) == labels


def _figures(teacher: torch.Tensor, predictions: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    """Accuracy, mean cross-entropy, and mean divergence from what the teacher says of the same images."""
    divergence = OBJECTIVES["logits"].loss(teacher.double(), predictions.double())
    loss = F.nll_loss(predictions.double(), labels)
    return _right(predictions, labels).double().mean().item(), loss.item(), divergence.item()
