# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Example scripts as modules."""

import importlib.util

from helpers.paths import EXAMPLES


def load_script(name):
    """An example script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
