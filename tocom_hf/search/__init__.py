# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The merging recipe of a model, from unlabelled images."""
