# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`export`: a model as graphs for other runtimes, one for each degree, around one copy of its weights."""

import importlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from tocom_hf.deployed.manifest import (
    EXPORTED_FILES,
    FORMAT_VERSION,
    GRAPH_SUFFIXES,
    LABELS,
    MANIFEST,
    PLUGINS,
    PROCESSOR,
    sha256,
)
from tocom_hf.deployed.scores import kind_of_scores
from tocom_hf.errors import ArgumentError
from tocom_hf.exporting.processors import processor_config
from tocom_hf.exporting.subject import Subject
from tocom_hf.exporting.verification import TOLERANCES, verify
from tocom_hf.exporting.writers import make_writer
from tocom_hf.extras import require_extras
from tocom_hf.plugins.composition import chain
from tocom_hf.plugins.plugin_set import plugin_name
from tocom_hf.storage.transaction import write_folder
from tocom_hf.version import __version__


# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    format: str = "onnx",
    degrees: Sequence[int] = (0, 4, 8, 12, 16),
    standalone: bool = False,
    dynamic_batch: bool = True,
    dtype: str | None = None,
    processor: Any = None,
) -> Path:
    """Write a model as graphs for another runtime, one for each degree, around one copy of its weights.

    `ExportedTocom` runs them without torch and transformers. Every graph is compared with PyTorch on random images
    before anything is put in place.

    Args:
        model: A transformers model of a supported architecture, whose weights are the same at every degree; or a
            `TocomModel`, whose plugins change them. It is left as it was. Of a model that wants text too, the vision
            backbone is exported.
        folder: Where to write. It must be missing, empty, or hold an earlier export, which is replaced as a whole.
        format: `"onnx"`, `"openvino"` or `"torch"` (programs of `torch.export`).
        degrees: The degrees to export.
        standalone: Make graphs that any program can run with the runtime alone. By default the weights that plugins
            change are composed when `ExportedTocom` opens a degree, as `TocomModel` composes them.
        dynamic_batch: Take any number of images at once. Otherwise a graph takes one.
        dtype: `"float32"` or `"float16"`, of weights and graphs; float32 by default.
        processor: The image processor to export for `ExportedTocom.predict`; by default the one in the folder that the
            model was loaded from, if there is one. `False` for none.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: if the architecture is not supported, the model cannot be traced, or a graph gives
            something else than PyTorch.
        DegreeError: if the model cannot run at one of the degrees.
        ArgumentError: if an argument is wrong, or the processor does what cannot be done without transformers.
        PluginFileError: if a file is in the way, or the disk is full.
        MissingExtraError: if the extra `onnx` or `openvino` is not installed.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from tocom_hf import TocomModel, export
    >>> model = TocomModel.from_pretrained(
    ...     "examples/digits/checkpoint", plugins="hub_cards/tocom-vit-mix", source_r=0
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in export(model, folder, format="torch", degrees=[0]).iterdir())
    ['degree_0.pt2', 'labels.json', 'manifest.json', 'preprocessor_config.json', 'weights.safetensors']

    ```
    """
    if format not in GRAPH_SUFFIXES:
        raise ArgumentError(f"format must be one of {', '.join(GRAPH_SUFFIXES)}, got {format!r:.100}.")
    dtype = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if dtype not in TOLERANCES:
        raise ArgumentError(f"dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r:.100}.")
    target = Path(folder)
    _require_free(target)
    require_packages(format, "export")
    subject = Subject(model, getattr(torch, dtype))
    listed = subject.require(degrees)
    preprocessing = processor_config(processor, subject)
    writer = make_writer(format, subject, standalone, dynamic_batch)
    entries: dict[str, dict[str, Any]] = {}
    with write_folder(target, replaces=[EXPORTED_FILES]) as fresh:
        for degree in listed:
            logger.info(f"Tracing degree {degree}")
            with subject.at(degree):
                writer.add(degree, fresh)
            count = subject.count_at(degree)
            graph = f"degree_{degree}{GRAPH_SUFFIXES[format]}"
            entries[str(degree)] = {"graph": graph, "tokens": list(count.tokens), "gflops": count.flops / 1e9}
        manifest = _manifest(subject, format, standalone, dynamic_batch, dtype)
        manifest |= {"degrees": entries, **writer.write(fresh)}
        for degree in listed:
            entries[str(degree)]["composed"] = writer.composed_names(degree)
        if not standalone:
            _write_factors(subject, listed, fresh)
        _write_json(fresh / LABELS, _labels(subject))
        _write_json(fresh / PROCESSOR, preprocessing)
        manifest["files"] = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        _write_json(fresh / MANIFEST, manifest)
        for degree, deviation in verify(fresh, subject, listed, dtype, dynamic_batch).items():
            entries[str(degree)]["deviation"] = deviation
        _write_json(fresh / MANIFEST, manifest)
    return target


def require_packages(format: str, what: str) -> None:
    """Make sure that the packages are installed which an export to a format needs.

    Args:
        format: The format.
        what: What needs them, for the message.

    Raises:
        MissingExtraError: if one is not.
    """
    with require_extras(what):
        for package in _PACKAGES[format]:
            importlib.import_module(package)


def _require_free(target: Path) -> None:
    """Refuse a folder of something else, whose files an export would replace."""
    if not target.is_dir() or (target / MANIFEST).is_file():
        return
    others = sorted(path.name for path in target.iterdir() if not path.name.startswith(".tocom"))
    if others:
        raise ArgumentError(
            f"{target} holds {others[0]} and no export. Give a folder that is missing, empty, or an earlier export."
        )


def _manifest(subject: Subject, format: str, standalone: bool, dynamic_batch: bool, dtype: str) -> dict[str, Any]:
    """What the manifest says beside degrees and files."""
    shape: list[int | None] = list(subject.example.batch.shape)
    if dynamic_batch:
        shape[0] = None
    packages = ("torch", "transformers", *_PACKAGES[format])
    return {
        "format_version": FORMAT_VERSION,
        "format": format,
        "standalone": standalone,
        "dtype": dtype,
        "model_type": subject.backbone.module.config.model_type,
        "model_class": type(subject.example.module).__name__.removeprefix("Tocom"),
        "input": {"name": subject.input_name, "shape": shape},
        "output": subject.output_name,
        "scores": _scores(subject),
        "plugins": subject.plugin_facts(),
        "versions": {
            "tocom_hf": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _scores(subject: Subject) -> str | None:
    """How the logits of a classifier become scores; `None` for a head that regresses them, and without classes."""
    labels = _labels(subject)
    return None if labels is None else kind_of_scores(subject.model.config.problem_type, len(labels))


def _labels(subject: Subject) -> dict[str, str] | None:
    """The names of the classes, `None` for a model that does not classify."""
    config = subject.example.module.config
    if subject.output_name != "logits" or subject.output_shape[1:] != (config.num_labels,):
        return None
    return {str(label): str(name) for label, name in sorted((config.id2label or {}).items())}


def _write_factors(subject: Subject, degrees: Sequence[int], folder: Path) -> None:
    """Write the plugins between the source and the exported degrees, float32."""
    arrays: dict[str, np.ndarray] = {}
    for degree in degrees if subject.plugins is not None and subject.source_r is not None else ():
        steps, _ = chain(subject.source_r, degree)  # type: ignore[arg-type]
        for step in steps:
            for path, factors in subject.plugins.adapter(step).items():  # type: ignore[union-attr]
                arrays[f"{plugin_name(step)}.{path}.lora_A"] = factors.lora_A.float().numpy()
                arrays[f"{plugin_name(step)}.{path}.lora_B"] = factors.lora_B.float().numpy()
    if arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / PLUGINS)


def _write_json(path: Path, content: Mapping[str, Any] | None) -> None:
    if content is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
