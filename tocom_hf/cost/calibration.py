# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""From a wanted cost to a degree: what every degree costs on this machine, and the smallest one within a budget."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tocom_hf.cost.budget import Budget
from tocom_hf.cost.flops import Example, height_and_width
from tocom_hf.cost.timing import DegreeCost, measure_costs
from tocom_hf.devices import describe_device, evaluation_mode
from tocom_hf.errors import ArgumentError, BudgetError, CalibrationError, DegreeError
from tocom_hf.extras import require_extras
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.schedule import require_degree


# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")

_DEFAULT_MAX_R = 16  # the paper's, for models without a plugin set


@dataclass(frozen=True)
class Calibration:
    """The measured cost of every degree of a model on one device. Made by `calibrate`; prints as a table.

    Attributes:
        model: The backbone's shape. Weights do not matter to cost, so any model of this shape is covered.
        input_size: Shape of one input: `(channels, height, width)`, or `(frames, mel bins)` for audio.
        batch_size: Inputs per forward pass.
        device: Name of the device, and threads on a CPU.
        dtype, attn_implementation: Of the model.
        torch_version: What it ran with.
        rounds: How often each degree was measured.
        costs: One entry per degree, ascending.

    Example:

    ```python
    >>> from tocom_hf import calibrate
    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> calibration = calibrate(model, degrees=[0, 2, 4], seconds=0, progress=False)
    >>> calibration[4].tokens
    (17, 13, 9)
    >>> calibration.degree_for(target_gflops=calibration[2].gflops)
    2

    ```
    """

    model: str
    input_size: tuple[int, ...]
    batch_size: int
    device: str
    dtype: str
    attn_implementation: str
    torch_version: str
    rounds: int
    costs: tuple[DegreeCost, ...]

    def __getitem__(self, target_r: int) -> DegreeCost:
        for cost in self.costs:
            if cost.target_r == target_r:
                return cost
        raise DegreeError(f"Degree {target_r!r} was not measured; {', '.join(map(str, self.degrees))} were.")

    def __iter__(self) -> Iterator[DegreeCost]:
        return iter(self.costs)

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def degrees(self) -> list[int]:
        """The measured degrees, ascending."""
        return [cost.target_r for cost in self.costs]

    def degree_for(
        self,
        *,
        target_speedup: float | None = None,
        target_latency_ms: float | None = None,
        target_gflops: float | None = None,
        degrees: Iterable[int] | None = None,
    ) -> int:
        """The smallest measured degree within a budget: the one that merges least.

        Args:
            target_speedup: At least so many times the throughput of degree 0.
            target_latency_ms: At most so many milliseconds for one batch.
            target_gflops: At most so many GFLOPs per image.
            degrees: Consider only these, for instance those that a plugin set covers.

        Raises:
            BudgetError: unless exactly one budget is given, it is a positive number, and a degree meets it. The message
                names the best figure that can be had.
        """
        budget = Budget.of(target_speedup, target_latency_ms, target_gflops)
        if budget is None:
            raise BudgetError("Give one of target_speedup, target_latency_ms and target_gflops.")
        allowed = {*self.degrees} if degrees is None else {*degrees}
        figures = {cost.target_r: getattr(cost, budget.field) for cost in self.costs if cost.target_r in allowed}
        return budget.choose(figures, f"batch size {self.batch_size}, input {_times(self.input_size)}, {self.device}")

    def __str__(self) -> str:
        lines = [
            f"{self.model}; input {_times(self.input_size)}, batch {self.batch_size}, {self.dtype}, "
            f"{self.attn_implementation}; {self.device}, torch {self.torch_version}, {self.rounds} round(s)",
            "   r  tokens left    GFLOPs   latency ms   images/s  speed-up",
        ]
        lines += [
            f"{cost.target_r:4d}  {cost.tokens[-1]:11d}  {cost.gflops:8.4g}  {cost.latency_ms:11.2f}"
            f"  {cost.images_per_second:9.1f}  {cost.speedup:7.2f}x"
            for cost in self.costs
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Plot measured speed-up and FLOP ratio against the degree. Needs matplotlib (`pip install 'tocom-hf[vis]'`).

        Args:
            path: Where to save the picture; not saved by default.

        Returns:
            The `matplotlib.figure.Figure`.
        """
        with require_extras("Calibration.plot"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        degrees = self.degrees
        dense = self.costs[0]
        flop_ratios = [dense.gflops / cost.gflops for cost in self]
        speedups = [cost.speedup for cost in self]
        axes.plot(degrees, flop_ratios, "k:", label="FLOP ratio")
        axes.plot(degrees, speedups, "o-", color="tab:blue", label="measured")
        axes.set(xlabel="tokens merged per layer, r", ylabel="speed-up over r = 0")
        axes.set_title(f"{self.device}, batch {self.batch_size}, {self.dtype}", fontsize=9)
        axes.set_xticks(degrees)
        axes.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_json_file(self, path: str | Path) -> None:
        """Write the calibration to a file, all or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise

    @classmethod
    def from_json_file(cls, path: str | Path) -> "Calibration":
        """Read what `to_json_file` wrote.

        Raises:
            CalibrationError: if the file is missing or is not a calibration.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            costs = tuple(DegreeCost(**{**cost, "tokens": tuple(cost["tokens"])}) for cost in content.pop("costs"))
            settings = {**content, "input_size": tuple(content["input_size"])}
            calibration = cls(**settings, costs=costs)
            str(calibration)  # formats every figure, so that one of a wrong type is found here
            if 0 not in calibration.degrees:
                raise ValueError("no degree 0")
            if not all(cost.timed for cost in costs):
                raise ValueError("a degree without times")
        except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CalibrationError(
                f"{path} does not hold a calibration ({type(error).__name__}: {error}). Delete it and calibrate again."
            ) from error
        return calibration


def calibrate(
    model: PreTrainedModel,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    *,
    degrees: Iterable[int] | None = None,
    seconds: float = 10.0,
    progress: bool = True,
    cache_file: str | Path | None = None,
) -> Calibration:
    """Measure what every degree costs on this machine: latency, throughput, FLOPs and tokens.

    The degrees take turns, so that a change of the machine's speed hits all alike. Compensation costs nothing at run
    time, so weights are left as they are. The model is given back as it came; no other thread may run it meanwhile.

    Args:
        model: A supported model, with or without `apply_tome` or plugins.
        image_size: Height and width of the images in pixels; by default those of the model's configuration.
        batch_size: Images per forward pass. Small batches on fast devices gain less than the FLOPs promise.
        device: Where to measure; by default where the model is.
        degrees: What to measure. By default those of the model's plugin set, or 0 to 16. Degree 0, the baseline, is
            always added.
        seconds: How long to measure after one warm-up of each degree; at least every degree once.
        progress: Whether to show a progress bar.
        cache_file: Reuse the calibration in this file if it was made with the same settings and versions on the same
            device, else write it there. Where that fails, for instance on a full disk, a warning says so.

    Returns:
        The calibration.

    Raises:
        UnsupportedModelError: if the architecture is not supported.
        DegreeError: if a degree is not a non-negative integer.
        ArgumentError: if the image or batch size is out of range.
        CalibrationError: if `cache_file` holds something else than a calibration.

    Example:

    ```python
    >>> from tocom_hf import TocomModel, calibrate
    >>> model = TocomModel.from_pretrained(
    ...     "examples/fashion_mnist/checkpoint", plugins="hub_cards/tocom-vit-fashion-mnist"
    ... )
    >>> calibration = calibrate(model, batch_size=4, degrees=[0, 8], seconds=0, progress=False)
    >>> [round(cost.gflops, 3) for cost in calibration]
    [0.067, 0.019]

    ```
    """
    backbone = find_backbone(model)
    if degrees is None:
        degrees = _degrees_of(model)
    degrees = sorted({0, *(require_degree(degree, "degrees") for degree in degrees)})
    if require_degree(batch_size, "batch_size") < 1:
        raise ArgumentError("batch_size must be at least 1.")
    before = next(model.parameters()).device
    target = before if device is None else torch.device(device)
    example = Example.of(backbone, image_size, batch_size)
    settings: dict[str, Any] = {
        "model": _shape_of(backbone),
        "input_size": tuple(example.batch.shape[1:]),
        "batch_size": batch_size,
        "device": describe_device(target),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "torch_version": torch.__version__,
    }
    if cache_file is not None and Path(cache_file).exists():
        known = Calibration.from_json_file(cache_file)
        same_settings = all(getattr(known, key) == value for key, value in settings.items())
        if same_settings and {*degrees} <= {*known.degrees}:
            return known
        logger.warning(f"{cache_file} was made under other settings, so it is measured anew and replaced.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if target != before:
            stack.callback(model.to, before)  # type: ignore[arg-type]
            model.to(target)  # type: ignore[arg-type]
        example = example._replace(batch=example.batch.to(target))
        costs = measure_costs(example, degrees, seconds=seconds, progress=progress)
    calibration = Calibration(**settings, rounds=costs[0].rounds, costs=tuple(costs))
    if cache_file is not None:
        try:
            calibration.to_json_file(cache_file)
        except OSError as error:  # what was measured holds, whether or not the next call finds it
            logger.warning(f"The calibration cannot be kept in {cache_file}: {error.strerror or error}.")
    return calibration


def choose_degree(
    backbone: Backbone,
    budget: Budget,
    degrees: Sequence[int],
    calibration: Calibration | str | Path | None,
    image_size: int | tuple[int, int] | None = None,
) -> int:
    """The smallest of `degrees` at which a model is within a budget, measured now unless a calibration is given.

    Args:
        backbone: Of a loaded model.
        budget: The wanted cost.
        degrees: What the model can run at.
        calibration: Measured before; or a file to read it from, or to write it to if there is none.
        image_size: Height and width in pixels; by default those of the model's configuration, or of the calibration.

    Raises:
        BudgetError: if no degree meets the budget.
        CalibrationError: if the calibration belongs to a model of another shape, or to images of another size.
    """
    if calibration is not None and not isinstance(calibration, Calibration) and Path(calibration).exists():
        calibration = Calibration.from_json_file(calibration)
    if isinstance(calibration, Calibration):
        if calibration.model != _shape_of(backbone):
            raise CalibrationError(
                f"The calibration was measured for another model ({calibration.model}) than this one "
                f"({_shape_of(backbone)}). Call calibrate(model) for this one."
            )
        if image_size is not None and calibration.input_size[-2:] != height_and_width(image_size):
            raise CalibrationError(
                f"The calibration was measured for inputs of {_times(calibration.input_size)}, not for images of "
                f"{_times(height_and_width(image_size))}. Call calibrate(model, image_size={image_size})."
            )
    elif calibration is None and budget.name == "target_gflops":
        # no need to measure time
        example = Example.of(backbone, image_size, batch_size=1)
        figures = {degree: example.count_at(degree).flops / 1e9 for degree in degrees}
        return budget.choose(figures, "one image")
    else:
        calibration = calibrate(backbone.model, image_size, degrees=degrees, cache_file=calibration)
    return calibration.degree_for(**{budget.name: budget.value}, degrees=degrees)


def _degrees_of(model: PreTrainedModel) -> range:
    """The degrees that a model's plugin set covers; those of the paper for a model without one."""
    plugins = getattr(model, "plugins", None)
    if plugins is None:
        return range(_DEFAULT_MAX_R + 1)
    return range(plugins.config.min_r, plugins.config.max_r + 1)


def _shape_of(backbone: Backbone) -> str:
    config, measures = backbone.module.config, backbone.dimensions
    parameters = sum(parameter.numel() for parameter in backbone.layers[0].parameters())  # tells the width of MLPs too
    patch = measures.patch_size or config.tubelet_size
    return (
        f"{config.model_type} with {len(backbone.layers)} layers of {parameters:,} parameters, hidden size "
        f"{measures.hidden_size}, {measures.num_attention_heads} heads, patch {patch}"
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
