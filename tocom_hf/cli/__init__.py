# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tocom`: one module for each of its subcommands, and what they share."""
