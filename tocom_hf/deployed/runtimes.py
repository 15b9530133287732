# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The runtimes that graphs are opened in. Each imports its library when it is made."""

import re
import xml.etree.ElementTree as ElementTree
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tocom_hf.deployed.manifest import WEIGHTS, ExportedFolder
from tocom_hf.deployed.weights import Composer, MappedWeights
from tocom_hf.errors import ArgumentError, TocomError


Run = Callable[[np.ndarray], np.ndarray]
"""From the inputs of a batch to the output."""


class Runtime(ABC):
    """Opens the graphs of an export; the weights that all degrees share are read once.

    Args:
        exported: The export.
        device: Where to run, in the words of the runtime; `None` for the CPU.
        threads: Threads of one call, `None` for what the runtime thinks best.
        options: Settings in the words of the runtime.
        share_weights: Whether all open degrees use one copy of the shared weights, where the runtime would lay out a
            copy for each of them.
    """

    name = ""

    def __init__(
        self,
        exported: ExportedFolder,
        device: str | None,
        threads: int | None,
        options: Mapping[str, Any],
        share_weights: bool,
    ):
        self.exported = exported
        self.device = device
        self.threads = threads
        self.options = options
        self.share_weights = share_weights
        self.standalone: bool = exported.manifest["standalone"]
        if exported.has(WEIGHTS):
            self.weights = MappedWeights(exported.path(WEIGHTS))
            self.composer = Composer(exported, self.weights)

    def open(self, degree: int) -> Run:
        """Open the graph of a degree.

        Raises:
            PluginFileError: if a file is missing or damaged.
            ArgumentError: if the runtime refuses the graph, the device or an option.
        """
        self.exported.path(self.exported.graph(degree))
        try:
            return self._open(degree)
        except TocomError:
            raise
        except Exception as error:  # each runtime has exceptions of its own, all of which are about what it was given
            reason = " ".join(str(error).split())
            raise ArgumentError(
                f"{self.name} cannot open {self.exported.graph(degree)} on {self.device or 'the CPU'}: {reason:.400}"
            ) from error

    @abstractmethod
    def _open(self, degree: int) -> Run:
        """`open`, but for its errors."""


class OnnxRuntime(Runtime):
    """ONNX Runtime. `device` is the name of an execution provider; options are entries of the session."""

    name = "onnxruntime"

    def __init__(self, *args, **kwargs):
        import onnxruntime

        super().__init__(*args, **kwargs)
        self._library = onnxruntime
        # sessions use the memory of these values, so they live as long
        self._shared = {}
        if not self.standalone:
            self._shared = self._values(self.weights)

    def _open(self, degree: int) -> Run:
        available = self._library.get_available_providers()
        if self.device is not None and self.device not in available:
            raise ArgumentError(
                f"onnxruntime has no execution provider {self.device!r}. Choose one of {', '.join(available)}."
            )
        options = self._library.SessionOptions()
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.share_weights:
            # a packed weight is a copy of its own in every session
            options.add_session_config_entry("session.disable_prepacking", "1")
        for key, value in self.options.items():
            options.add_session_config_entry(key, str(value))
        composed = {} if self.standalone else self._values(self.composer.at(degree))
        # what lies in the file is used where it lies
        for name, value in self._shared.items():
            if name not in composed:
                options.add_initializer(name, value)
        # what does not must replace the initializer in the graph itself, which onnxruntime's optimizer reads
        if composed:
            options.add_external_initializers(list(composed), list(composed.values()))
        path = self.exported.folder / self.exported.graph(degree)
        session = self._library.InferenceSession(path, options, providers=[self.device or "CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(batch: np.ndarray) -> np.ndarray:
            return session.run(None, {name: batch})[0]

        return run

    def _values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        make = self._library.OrtValue.ortvalue_from_numpy
        return {name: make(array) for name, array in arrays.items()}


class OpenVino(Runtime):
    """OpenVINO. `device` is one of its devices; options are properties of the compiled model."""

    name = "openvino"

    def __init__(self, *args, **kwargs):
        import openvino

        super().__init__(*args, **kwargs)
        self._library = openvino
        self._core = openvino.Core()
        self._bytes = openvino.Tensor(self.weights.bytes, shared_memory=True)

    def _open(self, degree: int) -> Run:
        path = self.exported.folder / self.exported.graph(degree)
        composed = {} if self.standalone else self.composer.at(degree)
        model = self._core.read_model(self._with_offsets(path.read_bytes(), composed), self._bytes)
        for node in model.get_ops():
            array = composed.get(stored_name(node.get_friendly_name()))
            if node.get_type_name() == "Constant" and array is not None:
                constant = self._library.opset13.constant(array, shared_memory=True)
                node.output(0).replace(constant.output(0))
        device = self.device or "CPU"
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        # a processor that has bfloat16 and no float16 takes that for both, of which eight times less precision is left
        if self.exported.manifest["dtype"] == "float32" or (device == "CPU" and not self._has_float16(device)):
            config["INFERENCE_PRECISION_HINT"] = "f32"
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.threads
        compiled = self._core.compile_model(model, device, {**config, **self.options})

        # the model uses the memory of `composed`, so these must live as long
        def run(batch: np.ndarray, composed: dict[str, np.ndarray] = composed) -> np.ndarray:
            # a request of its own, so that threads may call at once
            return compiled.create_infer_request().infer([batch])[0].copy()

        return run

    def _has_float16(self, device: str) -> bool:
        return "FP16" in self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")

    def _with_offsets(self, graph: bytes, composed: Mapping[str, np.ndarray]) -> bytes:
        """A graph in which the weights that will be replaced lie within the file of weights."""
        if not composed:
            return graph
        root = ElementTree.fromstring(graph)
        for layer in root.iter("layer"):
            name = stored_name(layer.get("name", ""))
            data = layer.find("data")
            if layer.get("type") == "Const" and data is not None and name in composed:
                data.set("offset", str(self.weights.span(name)[0]))
        return ElementTree.tostring(root)


class TorchPrograms(Runtime):
    """Programs of torch.export. `device` is one of torch's; there are no options."""

    name = "torch"

    def __init__(self, *args, **kwargs):
        import torch

        super().__init__(*args, **kwargs)
        self._library = torch
        if self.options:
            raise ArgumentError(f"The format torch takes no options, got {', '.join(self.options)}.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            torch.empty(0, device=self.device or "cpu")
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that torch was not built for
            raise ArgumentError(f"The device {self.device!r} cannot be used: {error}") from error
        self._shared = {}
        if not self.standalone:
            self._shared = self._tensors(self.weights)

    def _open(self, degree: int) -> Run:
        torch = self._library
        path = self.exported.folder / self.exported.graph(degree)
        program = torch.export.load(path)
        device = self.device or "cpu"
        weights: dict[str, Any] | None = None
        if self.standalone:
            if device != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
        else:
            weights = {**self._shared, **self._tensors(self.composer.at(degree))}
            weights = {name: weights[name] for name in self.exported.manifest["parameters"]}
        module = program.module()

        def run(batch: np.ndarray) -> np.ndarray:
            inputs = torch.from_numpy(batch).to(device)
            with torch.no_grad():
                output = module(inputs) if weights is None else module(inputs, weights)
            return output.cpu().numpy()

        return run

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        device = self.device or "cpu"
        return {name: self._library.from_numpy(array).to(device) for name, array in arrays.items()}


RUNTIMES: dict[str, type[Runtime]] = {"onnx": OnnxRuntime, "openvino": OpenVino, "torch": TorchPrograms}


def stored_name(name: str) -> str:
    """The name in the file of weights of a constant in an OpenVINO graph, in which names must not repeat."""
    return re.sub(r"#\d+$", "", name)
