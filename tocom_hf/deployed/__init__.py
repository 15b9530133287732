# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Running what was exported: needs numpy and the runtime, and neither torch nor transformers."""
