# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A service that merges more tokens when the load rises."""
