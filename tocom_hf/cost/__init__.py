# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a degree costs, in operations and in time. On merging."""
