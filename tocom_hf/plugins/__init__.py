# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a plugin set is: its format, its adapters, their composition (ToCom). On merging and storage."""
