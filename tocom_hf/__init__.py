# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Alter the inference cost of a Vision Transformer without re-tuning it (Token Compensator, arXiv 2408.06798).

`__all__` is the public surface. What is not in it may change between minor versions. A name is imported when it is
first asked for, so that `import tocom_hf` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tocom_hf.version import __version__


if TYPE_CHECKING:
    from tocom_hf.cost.calibration import Calibration, calibrate
    from tocom_hf.cost.flops import count_flops
    from tocom_hf.cost.timing import DegreeCost
    from tocom_hf.data.images import load_images, with_pixel_values
    from tocom_hf.data.labels import match_labels
    from tocom_hf.deployed.exported import ExportedTocom
    from tocom_hf.distillation.arguments import DistillationArguments
    from tocom_hf.distillation.distill import distill
    from tocom_hf.distillation.fit_plugins import fit_plugins
    from tocom_hf.errors import (
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
        MissingExtraError,
        PluginFileError,
        TocomError,
        UnreadableImageError,
        UnsupportedInputError,
        UnsupportedModelError,
    )
    from tocom_hf.evaluation.degrees import DegreeResult, evaluate_degrees
    from tocom_hf.exporting.export import export
    from tocom_hf.merging.patching import apply_tome, remove_tome
    from tocom_hf.merging.recipes import MergeRecipe
    from tocom_hf.merging.tracing import trace_tokens
    from tocom_hf.model.lora import load_lora
    from tocom_hf.model.tocom_model import TocomModel
    from tocom_hf.plugins.plugin_set import PluginSet, save_composite
    from tocom_hf.scales.choice import pick_scale
    from tocom_hf.scales.fitting import fit_scales
    from tocom_hf.search.find_recipe import find_recipe
    from tocom_hf.search.results import FoundRecipe
    from tocom_hf.visualization import paint_groups, tile


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
    "ExportedTocom",
    "FoundRecipe",
    "HubError",
    "MergeRecipe",
    "MissingExtraError",
    "PluginFileError",
    "PluginSet",
    "TocomError",
    "TocomModel",
    "UnreadableImageError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "apply_tome",
    "calibrate",
    "count_flops",
    "distill",
    "evaluate_degrees",
    "export",
    "find_recipe",
    "fit_plugins",
    "fit_scales",
    "load_images",
    "load_lora",
    "match_labels",
    "paint_groups",
    "pick_scale",
    "remove_tome",
    "save_composite",
    "tile",
    "trace_tokens",
    "with_pixel_values",
]

# the module of every public name; all others are errors
_MODULES = {
    "Calibration": "cost.calibration",
    "DegreeCost": "cost.timing",
    "DegreeResult": "evaluation.degrees",
    "DistillationArguments": "distillation.arguments",
    "ExportedTocom": "deployed.exported",
    "FoundRecipe": "search.results",
    "MergeRecipe": "merging.recipes",
    "PluginSet": "plugins.plugin_set",
    "TocomModel": "model.tocom_model",
    "apply_tome": "merging.patching",
    "calibrate": "cost.calibration",
    "count_flops": "cost.flops",
    "distill": "distillation.distill",
    "evaluate_degrees": "evaluation.degrees",
    "export": "exporting.export",
    "find_recipe": "search.find_recipe",
    "fit_plugins": "distillation.fit_plugins",
    "fit_scales": "scales.fitting",
    "load_images": "data.images",
    "load_lora": "model.lora",
    "match_labels": "data.labels",
    "paint_groups": "visualization",
    "pick_scale": "scales.choice",
    "remove_tome": "merging.patching",
    "save_composite": "plugins.plugin_set",
    "tile": "visualization",
    "trace_tokens": "merging.tracing",
    "with_pixel_values": "data.images",
}


# parts of the package that need the extra `train` whole
_TRAINING = ("data", "distillation", "evaluation", "scales", "search")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tocom_hf.extras import require_extras

    module = _MODULES.get(name, "errors")
    # without it one package after the other would be asked for
    extra = "train" if module.partition(".")[0] in _TRAINING else None
    with require_extras(name, extra):
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
