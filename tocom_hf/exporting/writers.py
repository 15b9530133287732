# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""One writer for each runtime: it collects the graphs of all degrees, and writes them around their shared weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from tocom_hf.deployed.manifest import GRAPH_SUFFIXES, WEIGHTS
from tocom_hf.deployed.weights import MappedWeights
from tocom_hf.exporting.catalogue import Catalogue, DegreeCatalogue
from tocom_hf.exporting.subject import Subject
from tocom_hf.exporting.tracing import trace
from tocom_hf.merging.inputs import model_inputs
from tocom_hf.plugins.composition import Composite
from tocom_hf.storage.transaction import scratch_folder


class GraphWriter(ABC):
    """Writes the graphs of one export.

    Args:
        subject: What is exported.
        standalone: Whether graphs run without `ExportedTocom`.
        dynamic_batch: Whether they take any number of images.
    """

    format = ""

    def __init__(self, subject: Subject, standalone: bool, dynamic_batch: bool):
        self.subject = subject
        self.standalone = standalone
        self.dynamic_batch = dynamic_batch
        self.paths = subject.composed_paths()
        with subject.at_source():
            source = subject.state()
            # what plugins change in place later
            self.source = {name: array.copy() if name in self.paths else array for name, array in source.items()}

    @abstractmethod
    def add(self, degree: int, folder: Path) -> None:
        """Trace the model, which runs at this degree now."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Write what was added.

        Returns:
            What the manifest says about it.
        """

    def composed_names(self, degree: int) -> list[str]:
        """Names of the weights that must be composed before the graph of a degree, once written, can run."""
        return []

    def _trace(self) -> torch.export.ExportedProgram:
        images = self.subject.images(2 if self.dynamic_batch else 1, seed=0)
        return trace(self.subject.graph, (images,), self.dynamic_batch)

    def _is_composed(self, degree: int) -> bool:
        """Whether plugins change weights at a degree."""
        return bool(self.paths) and degree != self.subject.source_r

    def _path(self, folder: Path, degree: int) -> Path:
        return folder / f"degree_{degree}{GRAPH_SUFFIXES[self.format]}"


class OnnxWriter(GraphWriter):
    """ONNX graphs, whose weights are external data in the one file of weights."""

    format = "onnx"

    def __init__(self, *args):
        super().__init__(*args)
        self.catalogue = Catalogue(self.source)
        self.models: dict[int, Any] = {}

    def add(self, degree: int, folder: Path) -> None:
        from tocom_hf.exporting import onnx_graph

        subject = self.subject
        model = onnx_graph.make_graph(self._trace(), subject.input_name, subject.output_name)
        live = {}
        if self._is_composed(degree):
            state = subject.state()
            live = {name: state[name] for name in self.paths}
        names = self.catalogue.at_degree(live, self.paths)
        onnx_graph.take_weights(model, names)
        if live and self.standalone:
            self._add_factors(model, degree, names)
        self.models[degree] = model

    def write(self, folder: Path) -> dict[str, Any]:
        save_file(self.catalogue.arrays, folder / WEIGHTS)
        self._save_graphs(folder, folder / WEIGHTS, refused=not self.standalone)
        return {"composed": {} if self.standalone else self.catalogue.composed}

    def composed_names(self, degree: int) -> list[str]:
        from tocom_hf.exporting import onnx_graph

        if self.standalone or not self._is_composed(degree):
            return []
        return [name for name in onnx_graph.weights_of(self.models[degree]) if name in self.catalogue.composed]

    def _save_graphs(self, folder: Path, weights: Path, refused: bool) -> None:
        from tocom_hf.exporting import onnx_graph

        offsets = _offsets(weights)
        for degree, model in self.models.items():
            beyond = self.catalogue.composed if refused and self._is_composed(degree) else {}
            path = folder / f"degree_{degree}.onnx"
            onnx_graph.save_graph(model, path, _with_gaps(offsets, beyond, weights))

    def _add_factors(self, model: Any, degree: int, names: DegreeCatalogue) -> None:
        """Let a graph compose the weights of its degree itself.

        A weight takes more room than its factors, unless the chain of plugins is long.
        """
        from tocom_hf.exporting import onnx_graph

        composite = self.subject.composite(degree)
        for key in onnx_graph.weights_of(model):
            if not names.is_composed(key):
                continue
            entry = self.catalogue.composed[key]
            left, right = _factors(composite, str(entry["path"]), bool(entry["transposed"]))
            weight = self.catalogue.arrays[key]
            if left.nbytes + right.nbytes >= weight.nbytes:
                live = self.subject.state()[key.removesuffix(".T")]
                name = f"degree_{degree}.{key}"
                self.catalogue.arrays[name] = np.array(live.T if entry["transposed"] else live, order="C")
                onnx_graph.rename_weight(model, key, name)
                continue
            left_name, right_name = f"degree_{degree}.{key}.left", f"degree_{degree}.{key}.right"
            self.catalogue.arrays |= {left_name: left, right_name: right}
            onnx_graph.add_factors(model, key, left_name, right_name, (left.shape, right.shape))


class OpenVinoWriter(OnnxWriter):
    """OpenVINO graphs, converted from ONNX graphs, whose weights lie in the one file of weights."""

    format = "openvino"

    def write(self, folder: Path) -> dict[str, Any]:
        from tocom_hf.exporting import openvino_graph

        # OpenVINO may hold weights in another way than ONNX
        catalogue = Catalogue(self.source)
        names = catalogue.at_degree({}, self.paths)
        roots: dict[int, Any] = {}
        with scratch_folder() as scratch:
            save_file(self.catalogue.arrays, scratch / WEIGHTS)
            self._save_graphs(scratch, scratch / WEIGHTS, refused=False)
            for degree in self.models:
                graph, weights = openvino_graph.convert(scratch / f"degree_{degree}.onnx", scratch)
                roots[degree] = openvino_graph.take_weights(graph, weights, names)
        save_file(catalogue.arrays, folder / WEIGHTS)
        offsets = _offsets(folder / WEIGHTS)
        for degree, root in roots.items():
            beyond = catalogue.composed if not self.standalone and self._is_composed(degree) else {}
            openvino_graph.save_graph(root, self._path(folder, degree), _with_gaps(offsets, beyond, folder / WEIGHTS))
        self._composed = {} if self.standalone else catalogue.composed
        return {"composed": self._composed}

    def composed_names(self, degree: int) -> list[str]:
        return list(self._composed) if self._is_composed(degree) else []


class TorchWriter(GraphWriter):
    """Programs of torch.export, which take the weights as an argument, or have them all inside."""

    format = "torch"

    def add(self, degree: int, folder: Path) -> None:
        if self.standalone:
            program = self._trace()
        else:
            images = self.subject.images(2 if self.dynamic_batch else 1, seed=0)
            weights = dict(self.subject.example.module.state_dict())
            program = trace(_WithWeights(self.subject), (images, weights), self.dynamic_batch)
        # else it would hold the example
        program._example_inputs = None
        torch.export.save(program, self._path(folder, degree))

    def write(self, folder: Path) -> dict[str, Any]:
        if self.standalone:
            return {"composed": {}}
        save_file({name: np.ascontiguousarray(array) for name, array in self.source.items()}, folder / WEIGHTS)
        composed = {name: {"path": path, "transposed": False} for name, path in self.paths.items()}
        return {"composed": composed, "parameters": list(self.source)}

    def composed_names(self, degree: int) -> list[str]:
        return [] if self.standalone or not self._is_composed(degree) else list(self.paths)


class _WithWeights(nn.Module):
    """From a batch and all weights to the output. The model is no submodule: none of its weights shall be traced."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject = [subject]

    def forward(self, images: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        subject = self.subject[0]
        module = subject.example.module
        inputs = model_inputs(module, subject.backbone, images)
        return torch.func.functional_call(module, weights, (), inputs)[subject.output_name]


def make_writer(format: str, subject: Subject, standalone: bool, dynamic_batch: bool) -> GraphWriter:
    """The writer for a runtime."""
    writers: list[type[GraphWriter]] = [OnnxWriter, OpenVinoWriter, TorchWriter]
    found = {writer.format: writer for writer in writers}[format]
    return found(subject, standalone, dynamic_batch)


def _factors(composite: Composite, path: str, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 matrices, whose product is the change of a weight as the graph holds it."""
    factors = composite.factors[path]
    lora_A = factors.lora_A.float().numpy()  # (rank, in)
    lora_B = (factors.lora_B.double() * composite.scale).float().numpy()  # (out, rank)
    left, right = (lora_A.T, lora_B.T) if transposed else (lora_B, lora_A)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _offsets(weights: Path) -> dict[str, int]:
    mapped = MappedWeights(weights)
    return {name: mapped.span(name)[0] for name in mapped}


def _with_gaps(offsets: Mapping[str, int], beyond: Mapping[str, Any], weights: Path) -> dict[str, int]:
    """Offsets at which nothing is, for weights that must be composed first.

    A program that opens such a graph by itself fails, instead of running it with the weights of another degree.
    """
    end = weights.stat().st_size
    return {name: end if name in beyond else offset for name, offset in offsets.items()}
