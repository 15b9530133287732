# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Alter the inference cost of a Vision Transformer without re-tuning it (Token Compensator, arXiv 2408.06798)."""

from .calibration import Calibration, DegreeCost, calibrate
from .errors import (
    ArgumentError,
    BackboneMismatchError,
    BudgetError,
    CalibrationError,
    ComposedWeightsError,
    DatasetError,
    DegreeError,
    PluginFileError,
    TocomError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .flops import count_flops
from .modeling import TocomModel
from .patching import apply_tome, remove_tome, trace_tokens
from .plugins import PluginSet, save_composite
from .version import __version__


__all__ = [
    "ArgumentError",
    "BackboneMismatchError",
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "ComposedWeightsError",
    "DatasetError",
    "DegreeCost",
    "DegreeError",
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
    "remove_tome",
    "save_composite",
    "trace_tokens",
]
