# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`ExportedTocom`: runs an export at any of its degrees with a runtime alone, without torch and transformers."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tocom_hf.deployed.manifest import LABELS, PROCESSOR, ExportedFolder
from tocom_hf.deployed.runtimes import RUNTIMES, Run
from tocom_hf.deployed.scores import best_classes
from tocom_hf.errors import ArgumentError, DegreeError, UnsupportedInputError
from tocom_hf.extras import require_extras


if TYPE_CHECKING:
    from PIL import Image

    from tocom_hf.deployed.preprocessing import Preprocessing


class Prediction(NamedTuple):
    """A label and its score: a probability, for a head that regresses its output itself."""

    label: str
    score: float


class ExportedTocom:
    """A model that `tocom_hf.export` wrote, at any of its degrees.

    It needs numpy and the runtime of the export (onnxruntime, openvino or torch), and Pillow for `predict`. Every file
    is compared with its checksum in the manifest once, before it is used. Degrees that were opened stay open, and
    threads may call at once.

    Args:
        folder: What `tocom_hf.export` wrote.
        target_r: The degree to run at; by default the smallest that was exported.
        device: Where to run, in the words of the runtime: an execution provider of onnxruntime, a device of OpenVINO
            or of torch. The CPU by default.
        threads: Threads of one call; by default what the runtime thinks best.
        options: Settings in the words of the runtime: entries of an onnxruntime session, properties of an OpenVINO
            model.
        share_weights: Keep one copy of the shared weights for all open degrees, instead of one for each degree that
            onnxruntime has laid out for its kernels. It saves memory and costs speed. The other runtimes do not mind.

    Raises:
        PluginFileError: if the folder is not an export, or a file of it is missing or damaged.
        DegreeError: if `target_r` was not exported.
        ArgumentError: if the runtime refuses the device, an option or the graph.
        MissingExtraError: if the runtime is not installed.

    Example:

    ```python
    >>> import tempfile
    >>> import numpy as np
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import ExportedTocom, export
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     exported = ExportedTocom(export(model, folder, format="torch", degrees=[1]))
    ...     exported(np.zeros((2, 3, 32, 32), np.float32)).shape
    (2, 32)

    ```
    """

    def __init__(
        self,
        folder: str | Path,
        target_r: int | None = None,
        *,
        device: str | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
        share_weights: bool = False,
    ):
        self._exported = ExportedFolder(folder)
        manifest = self._exported.manifest
        with require_extras("ExportedTocom"):
            self._runtime = RUNTIMES[manifest["format"]](
                self._exported, device, threads, dict(options or {}), share_weights
            )
        self._labels = self._exported.json(LABELS)
        self._preprocessing: Preprocessing | None = None
        self._opened: dict[int, Run] = {}
        self._opening = threading.Lock()
        self._dtype = np.dtype(manifest["dtype"])
        self.set_target_r(self.degrees[0] if target_r is None else target_r)

    def __repr__(self) -> str:
        manifest = self._exported.manifest
        return (
            f"ExportedTocom({str(self._exported.folder)!r}, format={manifest['format']!r}, degrees={self.degrees}, "
            f"target_r={self.target_r})"
        )

    @property
    def degrees(self) -> list[int]:
        """The degrees that were exported, in ascending order."""
        return self._exported.degrees

    @property
    def target_r(self) -> int:
        """The degree that calls run at."""
        return self._target_r

    @property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says: tokens and GFLOPs of each degree, versions, the plugin set, and more."""
        return self._exported.manifest

    def set_target_r(self, target_r: int) -> None:
        """Run at another degree from now on. The first time that takes as long as opening its graph.

        Raises:
            DegreeError: if the degree was not exported.
            PluginFileError: if its graph is missing or damaged.
        """
        if isinstance(target_r, bool) or target_r not in self.degrees:
            raise DegreeError(
                f"target_r={target_r!r} was not exported. Choose one of {', '.join(map(str, self.degrees))}, or "
                "export the model again with degrees=[...]."
            )
        with self._opening:
            if target_r not in self._opened:
                self._opened[target_r] = self._runtime.open(target_r)
            self._target_r = int(target_r)

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """Run a batch of finished inputs at the current degree.

        Args:
            pixel_values: Floating `(batch, channels, height, width)`, or what the model takes instead.

        Returns:
            The output that the manifest names, float32: `(batch, classes)` where that is `logits`.

        Raises:
            UnsupportedInputError: if the inputs have another shape than the graph was made for, or are not floating
                point numbers.
            ArgumentError: if the runtime fails, for instance for want of memory.
        """
        batch = self._checked(pixel_values)
        run = self._opened[self._target_r]
        try:
            output = run(batch)
        except Exception as error:  # the inputs fit the graph: what is left is the runtime's, such as too little memory
            reason = " ".join(str(error).split())
            raise ArgumentError(
                f"{self._runtime.name} failed on {batch.shape[0]} inputs at once: {reason:.400}"
            ) from error
        return np.asarray(output).astype(np.float32, copy=False)

    def predict(
        self, images: "Image.Image | str | Path | np.ndarray | Sequence[Any]", top_k: int = 5
    ) -> list[list[Prediction]]:
        """Classify images: preprocess as the model's image processor does, and run them as one batch.

        Args:
            images: One image or several: Pillow images, paths, or uint8 arrays `(height, width, channels)` or
                `(height, width)`.
            top_k: How many labels for each image.

        Returns:
            For each image its labels with the highest scores, best first.

        Raises:
            ArgumentError: if the model has no classes, or was exported without an image processor.
            DatasetError: if an image cannot be read.
        """
        self._require_labels(top_k)
        if isinstance(images, list | tuple) and not images:
            return []
        batch = self.preprocess(images)
        if self.manifest["input"]["shape"][0] == 1:
            logits = np.concatenate([self(image[None]) for image in batch])
        else:
            logits = self(batch)
        return self.rank(logits, top_k)

    def preprocess(self, images: "Image.Image | str | Path | np.ndarray | Sequence[Any]") -> np.ndarray:
        """What the model's image processor makes of images: the first half of `predict`, which threads may do apart.

        Args:
            images: As `predict` takes them, one at least.

        Returns:
            Finished inputs, float32 `(images, channels, height, width)`.

        Raises:
            ArgumentError: if the model was exported without an image processor, there are no images, or they come out
                at several sizes because it does not resize.
            DatasetError: if an image cannot be read.
        """
        listed = list(images) if isinstance(images, list | tuple) else [images]
        if not listed:
            raise ArgumentError("There are no images to prepare.")
        inputs = [self._preprocess(image, index) for index, image in enumerate(listed)]
        shapes = {values.shape for values in inputs}
        if len(shapes) > 1:
            raise ArgumentError(
                f"The image processor does not resize, and the images have several sizes: {sorted(shapes)}. Resize "
                "them to one."
            )
        return np.stack(inputs)

    def rank(self, logits: np.ndarray, top_k: int = 5) -> list[list[Prediction]]:
        """The labels of logits: the second half of `predict`.

        Args:
            logits: `(batch, classes)`, as calls return them.
            top_k: How many labels for each row.

        Returns:
            For each row its labels with the highest scores, best first.

        Raises:
            ArgumentError: if the model has no classes.
        """
        labels = self._require_labels(top_k)
        return [
            [Prediction(labels.get(str(label), str(label)), score) for label, score in best]
            for best in best_classes(logits, self.manifest.get("scores"), top_k)
        ]

    def _require_labels(self, top_k: int) -> dict[str, Any]:
        if self._labels is None:
            raise ArgumentError(
                f"The exported model gives {self.manifest['output']}, not classes, so it predicts no labels. Call it "
                "with pixel_values instead."
            )
        if type(top_k) is not int or top_k < 1:
            raise ArgumentError(f"top_k must be a positive integer, got {top_k!r}.")
        return self._labels

    def _preprocess(self, image: Any, index: int) -> np.ndarray:
        with require_extras("ExportedTocom.predict"):
            from PIL import Image

            from tocom_hf.data.decoding import decode_file
            from tocom_hf.deployed.preprocessing import Preprocessing
        channels = self.manifest["input"]["shape"][1]
        if self._preprocessing is None:
            config = self._exported.json(PROCESSOR)
            if config is None:
                raise ArgumentError(
                    "The model was exported without an image processor. Call it with finished pixel_values, or export "
                    "it again with processor=AutoImageProcessor.from_pretrained(...)."
                )
            self._preprocessing = Preprocessing.from_config(config, channels)
        if isinstance(image, str | Path):
            image = decode_file(Path(image), channels)
        elif isinstance(image, np.ndarray):
            image = _from_array(image, index)
        elif not isinstance(image, Image.Image):
            raise ArgumentError(
                f"Image {index} is a {type(image).__name__}; expected a Pillow image, a path or a uint8 array."
            )
        return self._preprocessing(image)

    def _checked(self, pixel_values: Any) -> np.ndarray:
        expected = self.manifest["input"]["shape"]
        name = self.manifest["input"]["name"]
        shown = ", ".join("batch" if side is None else str(side) for side in expected)
        if not isinstance(pixel_values, np.ndarray):
            raise UnsupportedInputError(
                f"{name} must be a numpy array of shape ({shown}), got {type(pixel_values).__name__}."
            )
        shape = pixel_values.shape
        batch_fits = bool(shape) and shape[0] > 0 and expected[0] in (None, shape[0])
        if not batch_fits or list(shape[1:]) != expected[1:]:
            raise UnsupportedInputError(
                f"{name} has the shape {shape}, but the graph was made for ({shown}). Resize the images first, or "
                "export the model for that size."
            )
        if not np.issubdtype(pixel_values.dtype, np.floating):
            raise UnsupportedInputError(
                f"{name} has the dtype {pixel_values.dtype}; expected finished, normalised floating-point numbers. "
                "For images as they are use predict(images)."
            )
        return np.ascontiguousarray(pixel_values, self._dtype)


def _from_array(array: np.ndarray, index: int) -> "Image.Image":
    from PIL import Image

    squeezed = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.dtype != np.uint8 or not (squeezed.ndim == 2 or (squeezed.ndim == 3 and squeezed.shape[-1] in (3, 4))):
        raise ArgumentError(
            f"Image {index} is an array of {array.dtype} and shape {array.shape}; expected uint8 of shape (height, "
            "width) or (height, width, channels) with 1, 3 or 4 channels."
        )
    return Image.fromarray(squeezed)
