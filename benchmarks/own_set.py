# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a recipe and plugins in closed form do for a small model, each made in seconds of unlabelled images.

    python benchmarks/own_set.py

`tocom find-recipe` and `tocom fit-plugins` see the backbone and 300 images of the task without their labels; the
checkpoint and the other images judge. Beside them are ToMe's rule, plugins in closed form on it, and the set that the
repository ships, which was distilled on ToMe's rule and other images.
"""

import argparse
import contextlib
import io
import math
import os
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
COLUMNS = {
    "r": "r", "what": "what", "accuracy": "accuracy, %", "gain": "over ToMe, points",
    "divergence": "divergence from r = 0, nats",
}  # fmt: skip
TOME = "ToMe"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=str(ROOT / "examples" / "digits" / "backbone"))
    parser.add_argument("--checkpoint", default=str(ROOT / "examples" / "digits" / "checkpoint"))
    parser.add_argument("--plugins", default=str(ROOT / "hub_cards" / "tocom-vit-mix"))
    parser.add_argument("--data", default=str(ROOT / "examples" / "digits" / "test.parquet"))
    parser.add_argument("--unlabelled", type=int, default=300, help="The first images, which are not judged by.")
    parser.add_argument("--degrees", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "own_set")
    return parser.parse_args()


def run(command: str, *arguments: str) -> float:
    """Run a command of tocom_hf; returns its seconds."""
    from tocom_hf.cli.main import main as tocom

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = tocom([command, *arguments])
    if code:
        raise SystemExit(f"tocom {command} ended with {code}.")
    return time.perf_counter() - start


def make_sets(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, str], list[str]]:
    """Find a recipe, and fit plugins with it and without.

    Returns:
        The recipe's file, the folders of all plugin sets by name, and how long each command took.
    """
    common = ["--model_name_or_path", args.backbone, "--dataset_name", args.data, "--max_samples",
              str(args.unlabelled), "--dataset_split", f"test[:{args.unlabelled}]"]  # fmt: skip
    degrees = [str(degree) for degree in args.degrees]
    seconds = run("find-recipe", *common, "--degrees", *degrees, "--output_dir", str(folder / "recipe"))
    notes = [f"Seconds of `tocom find-recipe`: {seconds:.0f}."]
    recipe = folder / "recipe" / "recipe.json"
    sets = {"plugins of the repository": args.plugins}
    for name, options in (
        ("plugins in closed form", []),
        ("recipe and plugins in closed form", ["--merge_recipe", str(recipe)]),
    ):
        sets[name] = str(folder / name)
        largest = str(max(args.degrees))
        seconds = run("fit-plugins", *common, "--max_r", largest, *options, "--output_dir", sets[name])
        notes.append(f"Seconds of `tocom fit-plugins`, {name}: {seconds:.0f}.")
    return recipe, sets, notes


def measure(args: argparse.Namespace, recipe: Path, sets: dict[str, str]) -> tuple[list[dict], str]:
    """What the checkpoint says of the images that the search did not see: the rows, and its accuracy at r = 0."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

    from tocom_hf import MergeRecipe, TocomModel, apply_tome, load_images, match_labels, with_pixel_values

    def checkpoint() -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(args.checkpoint, dtype=torch.float32).eval()

    images = load_images(args.data, split=f"test[{args.unlabelled}:]", label_column="label")
    images = match_labels(images, checkpoint().config)
    samples = with_pixel_values(images, AutoImageProcessor.from_pretrained(args.checkpoint), label_column="label")
    samples = [samples[index] for index in range(len(samples))]
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(pixel_values=part).logits for part in pixel_values.split(100)]).double()

    def is_right(values: torch.Tensor) -> torch.Tensor:
        return (values.argmax(dim=1) == labels).double()

    dense = logits(checkpoint())
    rows = []
    for degree in args.degrees:
        found = {TOME: logits(apply_tome(checkpoint(), degree))}
        found["recipe alone"] = logits(apply_tome(checkpoint(), degree, recipe=MergeRecipe.load(recipe)))
        for name, plugins in sets.items():
            model = TocomModel.from_pretrained(checkpoint(), plugins=plugins, source_r=0, target_r=degree)
            found[name] = logits(model)
        for name, values in found.items():
            gains = is_right(values) - is_right(found[TOME])
            error = gains.std() / math.sqrt(len(labels))
            own, target = values.log_softmax(dim=1), dense.log_softmax(dim=1)
            rows.append({
                "r": degree, "what": name, "accuracy": round(100 * is_right(values).mean().item(), 1),
                "gain": "" if name == TOME else f"{100 * gains.mean():+.1f} ± {100 * error:.1f}",
                "divergence": round(F.kl_div(own, target, log_target=True, reduction="batchmean").item(), 4),
            })  # fmt: skip
    return rows, f"{len(labels)} images; at r = 0 {100 * is_right(dense).mean():.1f} % are right."


def main() -> None:
    args = parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sessions import Results, versions

    with tempfile.TemporaryDirectory() as folder:
        recipe, sets, notes = make_sets(args, Path(folder))
        rows, note = measure(args, recipe, sets)
    results = Results(
        args.output, "A recipe and plugins of one's own for a small model", COLUMNS, [*notes, note],
        versions("torch", "transformers"), resume=False,
    )  # fmt: skip
    results.add(rows)


if __name__ == "__main__":
    main()
