# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Writing a model as graphs for other runtimes, one for each degree, around one copy of its weights."""
