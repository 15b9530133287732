# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What merging costs checkpoints that were fine-tuned on a task, and what a recipe, plugins and both win back.

    python benchmarks/fidelity/run.py --config benchmarks/fidelity/study_c.json --output_dir runs/study-c \\
        --stages data base finetune
    python benchmarks/fidelity/finetuned.py --root runs/study-c --work_dir runs/study-c/logits \\
        --recipe benchmarks/fidelity/results/study_c/recipe.json \\
        --plugins "recipe and plugins=hub_cards/tocom-dinov2-small"

The checkpoints are those of `run.py`: fine-tuned without merging, and while merging by ToMe's rule. Those without run
at other degrees; the others are what training at the target degree would give, and run without merging, too. Logits
are kept in `--work_dir`, so that a run that was stopped goes on.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import PLUGINS_HELP, TOME, Task, load_sets, make_row, table
from transformers import AutoModelForImageClassification, PreTrainedModel

from tocom_hf import MergeRecipe, PluginSet, TocomModel, apply_tome
from tocom_hf.merging.recipes import read_recipe


DIVERGENCE = {"divergence": "divergence from r = 0, nats"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="The --output_dir of run.py.")
    parser.add_argument("--tasks", nargs="+", default=["digits", "natural", "orientation"])
    parser.add_argument("--degrees", type=int, nargs="+", default=[8, 12, 16, 20])
    parser.add_argument("--trained_at", type=int, default=20, help="Degree of the checkpoints that merge.")
    parser.add_argument("--recipe", help="JSON file of `tocom find-recipe`, to be measured without plugins.")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="NAME=FOLDER", help=PLUGINS_HELP)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--work_dir", type=Path, required=True, help="Where logits are kept.")
    parser.add_argument("--output", type=Path, help="Tables, without the ending; default: WORK_DIR/finetuned.")
    return parser.parse_args()


def merging(checkpoint: Path, degree: int, recipe: MergeRecipe | None = None) -> Callable[[], PreTrainedModel]:
    """A checkpoint as it is, merging at a degree."""

    def prepare() -> PreTrainedModel:
        model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return apply_tome(model, degree, recipe=recipe)

    return prepare


def compensated(checkpoint: Path, plugins: PluginSet, degree: int) -> Callable[[], PreTrainedModel]:
    """A checkpoint that was fine-tuned without merging, with plugins for a degree."""

    def prepare() -> PreTrainedModel:
        model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=degree)

    return prepare


def read_logits(outputs: Any) -> torch.Tensor:
    return outputs.logits


def divergence(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of what others say of the classes, in nats."""
    target, found = logits.log_softmax(dim=1), others.log_softmax(dim=1)
    return torch.nn.functional.kl_div(found, target, reduction="batchmean", log_target=True).item()


def measure(
    task: Task, folder: Path, recipe: MergeRecipe | None, sets: dict[str, PluginSet], args: argparse.Namespace
) -> list[dict]:
    """The rows of one task, whose checkpoints are in a folder."""
    own, trained = folder / "r0-seed0", folder / f"r{args.trained_at}-seed0"

    def logits(name: str, prepare: Callable[[], PreTrainedModel]) -> torch.Tensor:
        """Of each test image: float64 `(images, classes)`."""
        return task.outputs(name, "test", prepare, read_logits).double()

    def is_right(logits: torch.Tensor) -> np.ndarray:
        """Whether the model is right, for each test image: float64 `(images,)`."""
        return (logits.argmax(dim=1) == task.labels["test"]).double().numpy()

    def right(name: str, prepare: Callable[[], PreTrainedModel]) -> np.ndarray:
        return is_right(logits(name, prepare))

    unmerged = logits("r0-at-0", merging(own, 0))
    dense = is_right(unmerged)
    rows = [make_row(task, "at 0", "r = 0", dense)]
    for degree in args.degrees:
        found = {TOME: logits(f"r0-at-{degree}", merging(own, degree))}
        if recipe is not None:
            found["recipe alone"] = logits(f"r0-at-{degree}-recipe", merging(own, degree, recipe))
        for name, plugins in sets.items():
            found[name] = logits(f"r0-at-{degree}-{name}", compensated(own, plugins, degree))
        plain = is_right(found[TOME])
        for what, values in found.items():
            rows.append(make_row(task, f"0 to {degree}", what, is_right(values), plain, dense))
            rows[-1]["divergence"] = divergence(unmerged, values)
        if degree == args.trained_at:
            hits = right(f"r{degree}-at-{degree}", merging(trained, degree))
            rows.append(make_row(task, f"0 to {degree}", f"ToMe, fine-tuned at {degree}", hits, plain, dense))
    change, at_home = (
        f"{args.trained_at} to 0",
        right(f"r{args.trained_at}-at-{args.trained_at}", merging(trained, args.trained_at)),
    )
    plain = right(f"r{args.trained_at}-at-0", merging(trained, 0))
    rows.append(make_row(task, change, f"at {args.trained_at}", at_home))
    rows.append(make_row(task, change, "no merging", plain, plain, at_home))
    return rows


def main() -> None:
    args = parse_args()
    sets = {name: load_sets(args.plugins, name) for name in args.tasks}
    recipe = None if args.recipe is None else read_recipe(args.recipe)
    output = args.output or args.work_dir / "finetuned"
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for name in args.tasks:
        task = Task(args.root / "data" / name, str(args.root / "base"), args.work_dir, args.test_images)
        rows += measure(task, args.root / "checkpoints" / name, recipe, sets[name], args)
        output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(table(rows, DIVERGENCE) + "\n", encoding="utf-8")
    print(table(rows, DIVERGENCE))


if __name__ == "__main__":
    main()
