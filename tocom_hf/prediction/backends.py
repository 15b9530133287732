# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What gives the outputs for a batch: a transformers model, or an export in its runtime."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from tocom_hf.cost.flops import Example
from tocom_hf.data.images import open_image
from tocom_hf.deployed.exported import ExportedTocom
from tocom_hf.deployed.manifest import LABELS, PROCESSOR, ExportedFolder
from tocom_hf.deployed.preprocessing import Preprocessing
from tocom_hf.deployed.scores import kind_of_scores
from tocom_hf.errors import ArgumentError, TocomError, UnsupportedModelError
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.inputs import model_inputs
from tocom_hf.model.folding import checksum
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.plugins.composition import chain


class Backend(ABC):
    """Gives the outputs for a batch.

    Attributes:
        labels: The names of the classes in the order of the outputs; `None` where the outputs are features.
        scores: How outputs become scores: `softmax`, `sigmoid`, or `None` where they are the scores.
        fingerprint: Differs for models that give other outputs.
    """

    labels: list[str] | None
    scores: str | None
    fingerprint: str

    @abstractmethod
    def read(self, encoded: Any) -> np.ndarray:
        """The input for one undecoded sample, float32; threads may call at once.

        Raises:
            DatasetError: if the sample cannot be read.
        """

    @abstractmethod
    def run(self, batch: np.ndarray) -> np.ndarray:
        """The outputs for inputs, float32 `(batch, classes)` or `(batch, features)`.

        Raises:
            ArgumentError: if the model does not take inputs of this size, or memory does not suffice.
        """


class ModelBackend(Backend):
    """A transformers model, or its vision backbone where the model wants text too.

    Args:
        model: The model, on the CPU and at the degree to run at, in evaluation mode.
        read: Makes the input of one undecoded sample.
        processor: The model's processor, which `read` uses.
        device: Where to run it.

    Raises:
        UnsupportedModelError: if its outputs are neither the classes of an image nor features.
        ArgumentError: if the memory of the device does not suffice for it.
    """

    def __init__(
        self, model: PreTrainedModel, read: Callable[[Any], np.ndarray], processor: Any, device: torch.device | str
    ):
        backbone = find_backbone(model, getattr(model, "_tocom_path", None))
        self._read, self._backbone = read, backbone
        facts = [_contents(model), processor.to_dict()]
        try:
            model.to(device)  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            raise ArgumentError(
                f"The memory of {device} does not suffice for the model. Give another --device, or --dtype bfloat16."
            ) from error
        example = Example.of(backbone, None, batch_size=1)
        self._module = example.module
        config: Any = self._module.config
        with torch.inference_mode():
            outputs = self._module(**model_inputs(self._module, backbone, example.batch))
        self.labels = self.scores = None
        logits = outputs.get("logits")
        if logits is not None and tuple(logits.shape) != (1, config.num_labels):
            raise UnsupportedModelError(
                f"{type(self._module).__name__} gives logits of the shape {tuple(logits.shape)} for an image, which "
                "are not those of its classes. Expected a classifier, or a model without a head, which gives features."
            )
        if logits is not None:
            self.labels = [str((config.id2label or {}).get(label, label)) for label in range(config.num_labels)]
            self.scores = kind_of_scores(config.problem_type, config.num_labels)
        else:
            self._features(outputs)
        self.fingerprint = _digest([*facts, self.labels, self.scores])

    def read(self, encoded: Any) -> np.ndarray:
        return self._read(encoded)

    @torch.inference_mode()
    def run(self, batch: np.ndarray) -> np.ndarray:
        module = self._module
        pixel_values = torch.from_numpy(batch).to(module.device, module.dtype)
        try:
            outputs = module(**model_inputs(module, self._backbone, pixel_values))
        except TocomError:
            raise
        except torch.OutOfMemoryError as error:
            raise ArgumentError(
                f"The memory of {module.device} does not suffice for a batch of {len(batch)}. Give the same command "
                "again with a smaller --batch_size: it goes on."
            ) from error
        except ValueError as error:
            raise ArgumentError(f"The model refuses inputs of the shape {batch.shape[1:]}: {error}") from error
        found = self._features(outputs) if self.labels is None else outputs["logits"]
        return found.float().cpu().numpy()

    def _features(self, outputs: Any) -> torch.Tensor:
        """`(batch, features)`: what heads of the family read of an image as a whole.

        The pooling of families with a class token is random in most checkpoints, that of the others is trained.
        """
        embeds, pooled, hidden = (outputs.get(name) for name in ("image_embeds", "pooler_output", "last_hidden_state"))
        if embeds is not None:
            return embeds
        architecture = self._backbone.architecture
        if hidden is not None and not architecture.restore and architecture.protected:
            return hidden[:, 0]
        if pooled is not None:
            return pooled
        if hidden is not None:
            return hidden[:, self._backbone.protected :].mean(dim=1)
        raise UnsupportedModelError(
            f"{type(self._module).__name__} gives {', '.join(outputs)}: neither the classes of an image nor its "
            "features."
        )


class ExportBackend(Backend):
    """A classifier that `tocom_hf.export` wrote, in its runtime.

    Args:
        exported: The export, at the degree to run at.
        folder: Where it is.
        image_column: Column of the images, for messages.

    Raises:
        ArgumentError: if it has no classes or no image processor.
    """

    def __init__(self, exported: ExportedTocom, folder: str, image_column: str):
        files = ExportedFolder(folder)
        manifest = exported.manifest
        labels, processor = files.json(LABELS), files.json(PROCESSOR)
        if labels is None:
            raise ArgumentError(
                f"The export in {folder} gives {manifest['output']}, not classes. Give the checkpoint itself to have "
                "its features."
            )
        if processor is None:
            raise ArgumentError(
                f"The model in {folder} was exported without an image processor. Export it again with "
                "processor=AutoImageProcessor.from_pretrained(...), or give the checkpoint itself."
            )
        self._exported, self._column = exported, image_column
        self._one_at_a_time = manifest["input"]["shape"][0] == 1
        self._preprocessing = Preprocessing.from_config(processor, manifest["input"]["shape"][1])
        self.labels = [labels.get(str(label), str(label)) for label in range(len(labels))]
        self.scores = manifest.get("scores")
        self.fingerprint = _digest(manifest["files"])

    def read(self, encoded: Any) -> np.ndarray:
        image: Image.Image = open_image(encoded, self._column, self._preprocessing.num_channels)
        return self._preprocessing(image)

    def run(self, batch: np.ndarray) -> np.ndarray:
        if self._one_at_a_time:
            return np.concatenate([self._exported(image[None]) for image in batch])
        return self._exported(batch)


def _contents(model: PreTrainedModel) -> list[Any]:
    """Numbers for the weights of a model at its source degree and for the plugins that it composes.

    The composed weights would not do: two machines may round them differently.
    """
    if not isinstance(model, TocomModel):
        return [_checksums(model)]
    target_r = model.target_r
    with model.at(model.source_r):
        found: list[Any] = [_checksums(model), model.scale, model._tocom.recipe.to_dict()]
    if model.plugins is not None:
        steps, _ = chain(model.source_r, target_r)
        for step in steps:
            adapter = model.plugins.adapter(step)
            found += [[path, *map(checksum, factors)] for path, factors in sorted(adapter.items())]
    return found


def _checksums(model: PreTrainedModel) -> dict[str, int | None]:
    return {name: checksum(weight) for name, weight in model.state_dict().items() if weight.numel()}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
