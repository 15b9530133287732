# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Making a plugin set by self-distillation. On merging, plugins and data; does not know `TocomModel`."""
