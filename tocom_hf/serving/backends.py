# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a replica runs images through: a `TocomModel`, or an exported folder on onnxruntime or OpenVINO."""

import statistics
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tocom_hf.data.colour import find_num_channels, model_channels
from tocom_hf.deployed.exported import ExportedTocom, Prediction
from tocom_hf.deployed.manifest import MANIFEST
from tocom_hf.deployed.scores import best_classes, kind_of_scores
from tocom_hf.errors import ArgumentError, DegreeError, UnsupportedInputError
from tocom_hf.serving.settings import ModelSettings


class Backend(ABC):
    """A classifier that runs at several degrees. One thread may run it while others prepare images.

    Attributes:
        degrees: What it may run at, ascending.
        num_channels: Of the images that it takes.
    """

    degrees: list[int]
    num_channels: int

    @abstractmethod
    def prepare(self, images: list[Image.Image]) -> np.ndarray:
        """The input for images, float32 `(images, channels, height, width)`.

        Raises:
            ValueError: if the images cannot be prepared.
        """

    @abstractmethod
    def classify(self, pixel_values: np.ndarray, degree: int, top_k: int) -> list[list[Prediction]]:
        """For each input its best labels, at a degree.

        Raises:
            UnsupportedInputError: if the model does not take inputs of this size.
        """

    @abstractmethod
    def measure(self, batch_size: int, seconds: float, cache_file: Path) -> dict[int, float]:
        """Seconds for a full batch by degree, measured now or, if that is known to be the same, before."""


def load_backend(settings: ModelSettings) -> Backend:
    """Load a model, or an export where the name is that of a folder with one.

    Raises:
        TocomError: if it cannot be loaded, or cannot run at the wanted degrees.
    """
    if Path(settings.model_name_or_path, MANIFEST).is_file():
        return ExportedBackend(settings)
    return TorchBackend(settings)


class TorchBackend(Backend):
    """A `TocomModel`. A change of degree composes the plugins into its weights anew, in place."""

    def __init__(self, settings: ModelSettings):
        import torch

        from tocom_hf.model.tocom_model import TocomModel

        self._torch = torch
        if settings.threads:
            torch.set_num_threads(settings.threads)
        name = settings.model_name_or_path
        self.model: Any = TocomModel.from_pretrained(name, plugins=settings.plugins, source_r=settings.source_r)
        if self.model.plugins is None:
            raise ArgumentError("The model has no plugins, so it runs at one degree only. Pass plugins=...")
        covered = self.model.plugins.config
        self.degrees = sorted({*(settings.degrees or range(covered.min_r, covered.max_r + 1))})
        for degree in self.degrees:  # before a request asks for one that there is not
            self.model.plugins.require(self.model.source_r, degree)
        self._processor = _load_processor(name)
        self.num_channels = find_num_channels(self._processor, model_channels(self.model.config))
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model.to(torch.device(device))  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(f"The device {device!r} cannot be used: {error}") from error

    def prepare(self, images: list[Image.Image]) -> np.ndarray:
        return self._processor(images, return_tensors="np")["pixel_values"]

    def classify(self, pixel_values: np.ndarray, degree: int, top_k: int) -> list[list[Prediction]]:
        if degree != self.model.target_r:
            self.model.set_target_r(degree)
        inputs = self._torch.from_numpy(pixel_values).to(self.model.device, self.model.dtype)
        try:
            with self._torch.inference_mode():
                logits = self.model(pixel_values=inputs).logits.float().cpu().numpy()
        except ValueError as error:
            raise UnsupportedInputError(str(error)) from error
        config = self.model.config
        kind = kind_of_scores(config.problem_type, logits.shape[1])
        return [
            [Prediction(config.id2label[label], score) for label, score in best]
            for best in best_classes(logits, kind, top_k)
        ]

    def measure(self, batch_size: int, seconds: float, cache_file: Path) -> dict[int, float]:
        from tocom_hf.cost.calibration import calibrate

        calibration = calibrate(
            self.model,
            batch_size=batch_size,
            degrees=self.degrees,
            seconds=seconds,
            progress=False,
            cache_file=cache_file,
        )
        return {degree: calibration[degree].latency_ms / 1e3 for degree in self.degrees}


class ExportedBackend(Backend):
    """An `ExportedTocom`. All degrees are open, so that a change of degree costs nothing."""

    def __init__(self, settings: ModelSettings):
        if settings.plugins is not None or settings.source_r is not None:
            raise ArgumentError("An export has its plugins in its files. Pass neither plugins nor source_r.")
        self.exported = ExportedTocom(settings.model_name_or_path, device=settings.device, threads=settings.threads)
        unknown = {*(settings.degrees or ())} - {*self.exported.degrees}
        if unknown:
            raise DegreeError(
                f"The degrees {sorted(unknown)} were not exported, only {self.exported.degrees}. Export the model "
                "again with degrees=[...]."
            )
        self.degrees = sorted({*(settings.degrees or self.exported.degrees)})
        shape = self.exported.manifest["input"]["shape"]
        if len(shape) != 4:
            raise ArgumentError(f"The export takes inputs of the shape {shape}, and the service reads images only.")
        self.num_channels = shape[1]
        for degree in self.degrees:
            self.exported.set_target_r(degree)
        # whatever the folder lacks for images is found here, and not by the first request
        blank = Image.new("RGB", (shape[3], shape[2]))
        self.classify(self.prepare([blank]), self.degrees[0], 1)

    def prepare(self, images: list[Image.Image]) -> np.ndarray:
        return self.exported.preprocess(images)

    def classify(self, pixel_values: np.ndarray, degree: int, top_k: int) -> list[list[Prediction]]:
        if degree != self.exported.target_r:
            self.exported.set_target_r(degree)
        return self.exported.rank(self._run(pixel_values), top_k)

    def measure(self, batch_size: int, seconds: float, cache_file: Path) -> dict[int, float]:
        shape = self.exported.manifest["input"]["shape"]
        batch = np.zeros((batch_size, *shape[1:]), np.float32)
        for degree in self.degrees:
            self._time(batch, degree)  # warm-up
        end = time.perf_counter() + seconds
        times: dict[int, list[float]] = {degree: [] for degree in self.degrees}
        # the degrees take turns, so that a change of the machine's speed hits all alike
        while not times[self.degrees[-1]] or time.perf_counter() < end:
            for degree in self.degrees:
                times[degree].append(self._time(batch, degree))
        return {degree: statistics.median(measured) for degree, measured in times.items()}

    def _time(self, batch: np.ndarray, degree: int) -> float:
        self.exported.set_target_r(degree)
        start = time.perf_counter()
        self._run(batch)
        return time.perf_counter() - start

    def _run(self, pixel_values: np.ndarray) -> np.ndarray:
        """Logits `(batch, classes)`, by one call unless the graph takes single images only."""
        if self.exported.manifest["input"]["shape"][0] == 1:
            return np.concatenate([self.exported(image[None]) for image in pixel_values])
        return self.exported(pixel_values)


def _load_processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    from tocom_hf.data.timm_processor import as_image_processor

    try:
        return as_image_processor(AutoImageProcessor.from_pretrained(name))
    except Exception as error:  # transformers raises many types for wrong input
        reason = str(error) or type(error).__name__
        raise ArgumentError(f"The image processor of {name!r} cannot be loaded: {reason}") from error
