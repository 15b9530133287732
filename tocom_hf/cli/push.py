# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a plugin set, or a checkpoint saved by TocomModel, on the Hugging Face Hub, in one commit.

    hf auth login
    tocom push tocom-deit-base user/tocom-deit-base --private

A plugin set gets a model card made from what its tocom_config.json records. To read it first, add --card_only: it is
written to README.md in the folder, and nothing is uploaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.errors import ArgumentError


COMMAND = "tocom push"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("folder", type=Path, help="Folder of a plugin set, or of a checkpoint saved by TocomModel.")
    parser.add_argument("repo_id", help="Hub id of the repository; made if missing.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to commit to; made if missing.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead.")
    parser.add_argument("--commit_message", default="Upload with tocom_hf")
    parser.add_argument("--card_only", action="store_true", help="Write the card of a plugin set, and upload nothing.")
    parser.add_argument("--checkpoint", help="With --card_only: the checkpoint to show; by default the backbone.")
    return parser.parse_args(argv)


def push(args: argparse.Namespace) -> None:
    from tocom_hf.model.tocom_model import TocomModel
    from tocom_hf.plugins.cards import CARD_NAME, plugin_set_card
    from tocom_hf.plugins.config import CONFIG_NAME
    from tocom_hf.plugins.plugin_set import PluginSet

    if not args.folder.is_dir():
        raise ArgumentError(f"There is no folder {args.folder}. Give the folder of a plugin set or a checkpoint.")
    is_set = (args.folder / CONFIG_NAME).exists()
    loaded: Any = PluginSet.from_pretrained(args.folder) if is_set else TocomModel.from_pretrained(args.folder)
    if args.card_only:
        if not is_set:
            raise ArgumentError(f"--card_only expects the folder of a plugin set; {args.folder} has no {CONFIG_NAME}.")
        plugin_set_card(loaded.config, args.repo_id, checkpoint=args.checkpoint).save(args.folder / CARD_NAME)
        print(args.folder / CARD_NAME)
        return
    address = loaded.push_to_hub(
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    print(address)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, push, argv)


if __name__ == "__main__":
    sys.exit(main())
