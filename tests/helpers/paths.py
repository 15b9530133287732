# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Where things are in the repository."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
