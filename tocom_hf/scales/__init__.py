# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The scale in front of the plugins, for one checkpoint, from unlabelled images."""
