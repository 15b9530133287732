# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The labels of all images of a data set, or their features, in files that a run which was killed goes on from."""
