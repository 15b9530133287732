# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Token merging for Vision Transformers of transformers."""

from .errors import DegreeError, TocomError, UnsupportedInputError, UnsupportedModelError
from .patching import apply_tome, remove_tome
from .version import __version__


__all__ = [
    "DegreeError",
    "TocomError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "apply_tome",
    "remove_tome",
]
