# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`TocomModel`: a transformers model that runs at another degree than it was trained at. On plugins and cost."""
