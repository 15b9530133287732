# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is exported: a model at one degree after another, what goes in, and which of its outputs comes out."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.cost.flops import DegreeCount, Example
from tocom_hf.errors import DegreeError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.inputs import main_input_name, model_inputs
from tocom_hf.merging.patching import merging_at
from tocom_hf.merging.schedule import require_degree
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.plugins.composition import Composite
from tocom_hf.plugins.plugin_set import PluginSet


# in this order; the first that a model has is exported
_OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")


class Subject:
    """A model, or its vision backbone where it wants text too, in evaluation mode on the CPU.

    Args:
        model: The model. It is left as it was.
        dtype: The floating-point type to export; a model of another one is copied.

    Raises:
        UnsupportedModelError: if the architecture is not supported, or none of its outputs can be exported.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        backbone = _find_backbone(model)
        floating = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModelError(
                "Some weights of the model are not in memory (on the meta device), so it cannot be exported. Load it "
                "without offloading."
            )
        devices = {parameter.device.type for parameter in model.parameters()}
        self.is_copy = floating != {dtype} or devices != {"cpu"}
        if self.is_copy:
            model = copy.deepcopy(model).to("cpu", dtype)  # type: ignore[arg-type]
            backbone = _find_backbone(model)
        self.model = model
        self.backbone: Backbone = backbone
        self.example = Example.of(backbone, None, batch_size=1)
        self.plugins: PluginSet | None = model.plugins if isinstance(model, TocomModel) else None
        self.input_name = main_input_name(self.example.module)
        self.output_name = self._find_output()
        self.graph = _Graph(self)

    @property
    def source_r(self) -> int | None:
        """The degree of the weights, `None` for a model whose weights are the same at every degree."""
        return self.model.source_r if isinstance(self.model, TocomModel) else None

    def require(self, degrees: Any) -> list[int]:
        """The degrees in ascending order, if the model can run at all of them.

        Raises:
            DegreeError: if it cannot, or there are none.
        """
        if isinstance(degrees, str) or not hasattr(degrees, "__iter__"):
            raise DegreeError(f"degrees must be a list of integers, got {degrees!r:.100}.")
        listed = sorted({require_degree(degree, "every degree") for degree in degrees})
        if not listed:
            raise DegreeError("degrees must name at least one degree.")
        model = self.model
        for degree in listed if isinstance(model, TocomModel) else ():
            if self.plugins is not None:
                self.plugins.require(model.source_r, degree)  # type: ignore[arg-type]
            elif degree != model.source_r:
                raise DegreeError(
                    f"The model has no plugins, so it can be exported at source_r={model.source_r} only, not at "
                    f"{degree}. Load it with TocomModel.from_pretrained(..., plugins=...), or export the transformers "
                    "model itself to merge without compensation."
                )
        return listed

    @contextlib.contextmanager
    def at(self, degree: int) -> Iterator[None]:
        """Run at a degree within a `with` block, deterministically and by an attention that can be traced."""
        model = self.model
        training = {module: module.training for module in model.modules()}
        implementation = model.config._attn_implementation
        with contextlib.ExitStack() as stack:
            for module, mode in training.items():
                stack.callback(setattr, module, "training", mode)
                module.training = False
            if implementation != "sdpa":
                stack.callback(model.set_attn_implementation, implementation)
                model.set_attn_implementation("sdpa")
            if isinstance(model, TocomModel):
                stack.enter_context(model.at(degree))
            else:
                stack.enter_context(merging_at(self.backbone, degree))
            stack.enter_context(torch.no_grad())
            yield

    @contextlib.contextmanager
    def at_source(self) -> Iterator[None]:
        """Have the weights of the source degree within a `with` block."""
        with contextlib.ExitStack() as stack:
            if isinstance(self.model, TocomModel):
                stack.enter_context(self.model.at(self.model.source_r))
            yield

    def images(self, count: int, seed: int) -> torch.Tensor:
        """Random inputs, `(count, channels, height, width)` for images."""
        shape = self.example.batch.shape[1:]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *shape, generator=generator).to(self.example.batch.dtype)

    def composite(self, degree: int) -> Composite:
        """The plugins between the source and a degree as one."""
        model = self.model
        assert isinstance(model, TocomModel)
        assert model.plugins is not None
        return model.plugins.compose(model.source_r, degree, model.scale)

    def plugin_facts(self) -> dict[str, Any] | None:
        """What the manifest says about the plugin set, `None` without one."""
        if self.plugins is None or not isinstance(self.model, TocomModel):
            return None
        config = self.plugins.config
        return {
            "base_model": config.base_model,
            "base_model_revision": config.base_model_revision,
            "min_r": config.min_r,
            "max_r": config.max_r,
            "rank": config.rank,
            "source_r": self.model.source_r,
            "scale": self.model.scale,
        }

    def count_at(self, degree: int) -> DegreeCount:
        """Tokens and operations at a degree."""
        with self.at(degree):
            return self.example.count_at(degree)

    def state(self) -> dict[str, np.ndarray]:
        """Parameters and buffers as they are now, by their names in the graph's module. Not copies."""
        return {name: tensor.numpy() for name, tensor in self.example.module.state_dict().items()}

    def composed_paths(self) -> dict[str, str]:
        """The paths in the backbone of the layers that plugins change, by the name of the weight."""
        if self.plugins is None:
            return {}
        prefix = ""
        if self.example.module is not self.backbone.module and self.backbone.path:
            prefix = f"{self.backbone.path}."
        paths = self.backbone.projections(self.plugins.config.target_modules)
        return {f"{prefix}{path}.weight": path for path in paths}

    def _find_output(self) -> str:
        with self.at(self.source_r or 0):
            outputs = self.example.module(**model_inputs(self.example.module, self.backbone, self.example.batch))
        for name in _OUTPUTS:
            if isinstance(outputs.get(name), torch.Tensor):
                self.output_shape = tuple(outputs[name].shape)
                return name
        raise UnsupportedModelError(
            f"{type(self.model).__name__} gives {', '.join(outputs)}, none of which can be exported. Expected one of "
            f"{', '.join(_OUTPUTS)}."
        )


class _Graph(nn.Module):
    """From a batch to the one output that is exported. The model is no submodule, so that names stay as they are."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.module = subject.example.module
        self.subject = [subject]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        subject = self.subject[0]
        return self.module(**model_inputs(self.module, subject.backbone, images))[subject.output_name]


def _find_backbone(model: PreTrainedModel) -> Backbone:
    path = model._tocom_path if isinstance(model, TocomModel) else None
    return find_backbone(model, path)
