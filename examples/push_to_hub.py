# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a plugin set, or a checkpoint saved by TocomModel, on the Hugging Face Hub, in one commit.

    hf auth login
    python examples/push_to_hub.py tocom-deit-base user/tocom-deit-base --private

A plugin set gets a model card made from what its tocom_config.json records. To read it first, add --card_only: it is
written to README.md in the folder, and nothing is uploaded.

It is the command `tocom push`.
"""

import sys

from tocom_hf.cli.push import main


if __name__ == "__main__":
    sys.exit(main())
