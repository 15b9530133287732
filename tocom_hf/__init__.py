# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Alter the inference cost of a Vision Transformer without re-tuning it (Token Compensator, arXiv 2408.06798)."""

from .errors import (
    ArgumentError,
    BackboneMismatchError,
    ComposedWeightsError,
    DatasetError,
    DegreeError,
    PluginFileError,
    TocomError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .modeling import TocomModel
from .patching import apply_tome, remove_tome, trace_tokens
from .plugins import PluginSet, save_composite
from .version import __version__


__all__ = [
    "ArgumentError",
    "BackboneMismatchError",
    "ComposedWeightsError",
    "DatasetError",
    "DegreeError",
    "PluginFileError",
    "PluginSet",
    "TocomError",
    "TocomModel",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "apply_tome",
    "remove_tome",
    "save_composite",
    "trace_tokens",
]
