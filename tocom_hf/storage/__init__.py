# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Files of strangers, on disk and on the Hub. Knows no model."""
