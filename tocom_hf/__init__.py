# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Alter the inference cost of a Vision Transformer without re-tuning it (Token Compensator, arXiv 2408.06798).

`__all__` is the public surface. What is not in it may change between minor versions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tocom_hf.cost.calibration import Calibration, DegreeCost, calibrate
from tocom_hf.cost.flops import count_flops
from tocom_hf.merging.patching import apply_tome, remove_tome, trace_tokens
from tocom_hf.model.tocom_model import TocomModel
from tocom_hf.plugins.plugin_set import PluginSet, save_composite

from .errors import (
    ArgumentError,
    BackboneMismatchError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ComposedWeightsError,
    DatasetError,
    DegreeError,
    DistillationError,
    DistillationInterrupted,
    HubError,
    PluginFileError,
    TocomError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .version import __version__


if TYPE_CHECKING:
    from tocom_hf.data.images import load_images, with_pixel_values

    from .arguments import DistillationArguments
    from .distillation import distill
    from .evaluation import DegreeResult, evaluate_degrees
    from .scale_fitting import fit_scales
    from .scales import pick_scale
    from .visualization import paint_groups, tile


# what needs accelerate, datasets or Pillow is imported when it is first asked for; by name, the module that has it
_LAZY = {
    "DegreeResult": "evaluation",
    "DistillationArguments": "arguments",
    "distill": "distillation",
    "evaluate_degrees": "evaluation",
    "fit_scales": "scale_fitting",
    "load_images": "data.images",
    "paint_groups": "visualization",
    "pick_scale": "scales",
    "tile": "visualization",
    "with_pixel_values": "data.images",
}

__all__ = [
    "ArgumentError",
    "BackboneMismatchError",
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ComposedWeightsError",
    "DatasetError",
    "DegreeCost",
    "DegreeError",
    "DegreeResult",
    "DistillationArguments",
    "DistillationError",
    "DistillationInterrupted",
    "HubError",
    "PluginFileError",
    "PluginSet",
    "TocomError",
    "TocomModel",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "apply_tome",
    "calibrate",
    "count_flops",
    "distill",
    "evaluate_degrees",
    "fit_scales",
    "load_images",
    "paint_groups",
    "pick_scale",
    "remove_tome",
    "save_composite",
    "tile",
    "trace_tokens",
    "with_pixel_values",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
