# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a plugin set, or a checkpoint saved by TocomModel, on the Hugging Face Hub, in one commit.

    hf auth login
    python examples/push_to_hub.py tocom-deit-base user/tocom-deit-base --private

A plugin set gets a model card made from what its tocom_config.json records. To read it first, add --card_only: it is
written to README.md in the folder, and nothing is uploaded.
"""

import argparse
from pathlib import Path

from tocom_hf import PluginSet, TocomModel
from tocom_hf.plugins.cards import CARD_NAME, plugin_set_card
from tocom_hf.plugins.config import CONFIG_NAME


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of a plugin set, or of a checkpoint saved by TocomModel.")
    parser.add_argument("repo_id", help="Hub id of the repository; made if missing.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to commit to; made if missing.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead.")
    parser.add_argument("--commit_message", default="Upload with tocom_hf")
    parser.add_argument("--card_only", action="store_true", help="Write the card of a plugin set, and upload nothing.")
    parser.add_argument("--checkpoint", help="With --card_only: the checkpoint to show; by default the backbone.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    is_set = (args.folder / CONFIG_NAME).exists()
    loaded = PluginSet.from_pretrained(args.folder) if is_set else TocomModel.from_pretrained(args.folder)
    if args.card_only:
        if not is_set:
            raise SystemExit(f"--card_only expects the folder of a plugin set; {args.folder} has no {CONFIG_NAME}.")
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


if __name__ == "__main__":
    main()
