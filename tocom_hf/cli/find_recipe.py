# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Choose what tokens are matched by and how many merge in which layer, on a few hundred unlabelled images.

    tocom find-recipe --model_name_or_path facebook/dinov2-small --dataset_name food101 --degrees 8 12 16 \\
        --output_dir recipe-dinov2-small

The result is `recipe.json`, for `apply_tome(model, r, recipe=MergeRecipe.load(path))` and for
`tocom distill --merge_recipe`, and a table of what each choice gave. A search that was cut off goes on when the same
command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import load_config, load_model, unmasked
from tocom_hf.cli.samples import SampleKind, add_image_options, load_samples_and_more
from tocom_hf.merging.schedule import require_degree


COMMAND = "tocom find-recipe"
_SPREAD_IMAGES = 1500


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Pre-trained or fine-tuned: Hub id or folder.")
    parser.add_argument("--degrees", type=int, nargs="+", required=True, help="Degrees to search for.")
    add_image_options(parser)
    parser.add_argument(
        "--spread_samples",
        type=int,
        help="Further ones, of which only the spread of features is taken; default: 1500 images, but no clips.",
    )
    parser.add_argument(
        "--first_layers", type=int, default=4, help="How many first layers may have a rule of their own; 0 for none."
    )
    parser.add_argument("--max_evaluations", type=int, default=60, help="Schedules to try at each degree; 0 for none.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the recipe and its table.")
    return parser.parse_args(argv)


def search(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModel

    from tocom_hf.search.find_recipe import find_recipe

    config = load_config(args.model_name_or_path)
    kind = SampleKind.of(config, args.model_name_or_path)
    model = load_model(AutoModel, args.model_name_or_path, dtype=torch.float32, **unmasked(config)).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    default = _SPREAD_IMAGES if kind.num_frames is None else 0
    more = default if args.spread_samples is None else require_degree(args.spread_samples, "spread_samples")
    samples, spread_samples = load_samples_and_more(args, kind, more)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = find_recipe(
        model,
        samples,
        args.degrees,
        spread_images=spread_samples,
        first_layers=args.first_layers,
        max_evaluations=args.max_evaluations,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=args.output_dir / "progress.json",
        report=lambda line: print(line, flush=True),
    )
    found.recipe.save(args.output_dir / "recipe.json")
    (args.output_dir / "recipe.md").write_text(found.table() + "\n", encoding="utf-8")
    print(found.table())
    print(f"recipe.json and recipe.md written to {args.output_dir.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, search, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
