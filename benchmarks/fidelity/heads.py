# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What merging costs linear heads on a frozen backbone, and what a recipe, plugins and both win back.

    python benchmarks/fidelity/heads.py --model facebook/dinov2-small --data runs/study-c/data \\
        --recipe runs/study-c/recipe/recipe.json --plugins shipped=hub_cards/tocom-dinov2-small \\
        --work_dir runs/study-c/features

A head is fitted by ridge regression on the features of the backbone that does not merge, and run at other degrees; for
comparison, one is fitted at the degree that it runs at. `--reverse` has the other direction too: heads that were fitted
at a degree run without merging. The images of the tasks are made where they are missing; `images.py` names the packages
that they need. Features are kept in `--work_dir`, so that a run that was stopped goes on.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import STYLES, TASKS, write_task
from probe import fit
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from tocom_hf import MergeRecipe, PluginSet, TocomModel, apply_tome, remove_tome
from tocom_hf.data.images import with_pixel_values
from tocom_hf.data.tasks import load_labelled
from tocom_hf.merging.recipes import read_recipe


IMAGE_SIZE = 224
SPLITS = {"train": 800, "validation": 200, "test": 1000}
BATCH_SIZE = 25
TOME = "ToMe"
COLUMNS = ("task", "change of r", "what", "accuracy, %", "over ToMe, points", "of the loss won back")
COSINE = {"cosine": "cosine to r = 0"}
PLUGINS_HELP = "Plugin sets and their names; {task} in a folder stands for the task, where each has a set of its own."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the tasks' images.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["natural", "digits", "orientation"])
    parser.add_argument("--degrees", type=int, nargs="+", default=[8, 12, 16, 20])
    parser.add_argument("--trained_at", type=int, nargs="*", default=[20], help="Degrees to fit heads at, too.")
    parser.add_argument("--reverse", type=int, nargs="*", default=[20], help="Degrees to run from without merging.")
    parser.add_argument("--recipe", help="JSON file of `tocom find-recipe`, to be measured without plugins.")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="NAME=FOLDER", help=PLUGINS_HELP)
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[], help="Other scales of the plugins than their own."
    )
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--work_dir", type=Path, required=True, help="Where features are kept.")
    parser.add_argument("--output", type=Path, help="Tables, without the ending; default: WORK_DIR/heads.")
    return parser.parse_args()


Read = Callable[[Any], torch.Tensor]


def read_features(outputs: Any) -> torch.Tensor:
    """Class feature and mean patch feature, from the outputs of a backbone: float32 `(batch, 2 * hidden size)`."""
    states = outputs.last_hidden_state  # (batch, tokens, hidden size)
    return torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=-1)


class Task:
    """The images of a task, what any model says of them, and labels."""

    def __init__(self, folder: Path, model: str, work_dir: Path, test_images: int):
        self.name = folder.name
        self.work_dir = work_dir / folder.name
        self.work_dir.mkdir(parents=True, exist_ok=True)
        processor = AutoImageProcessor.from_pretrained(model)
        # the images have the size of the study already
        processor.do_resize = processor.do_center_crop = False
        self.images, self.labels = {}, {}
        for split, count in (("train", None), ("test", test_images)):
            dataset, self.classes = load_labelled(str(folder), split)
            if count is not None:
                dataset = dataset.select(range(min(count, len(dataset))))
            self.labels[split] = torch.tensor(dataset["label"])
            self.images[split] = with_pixel_values(dataset, processor)

    def outputs(
        self, name: str, split: str, prepare: Callable[[], PreTrainedModel], read: Read = read_features
    ) -> torch.Tensor:
        """What `read` takes from the outputs of a model for all images of a split: float32 `(images, ...)`.

        Args:
            name: Of the model; it is not run where a file of that name has its outputs.
            split: `train` or `test`.
            prepare: Makes the model.
            read: By default features.
        """
        path = self.work_dir / f"{split}-{len(self.images[split])}-{name}.npy"
        if not path.exists():
            model = prepare()
            rows = []
            images = self.images[split]
            for start in tqdm(range(0, len(images), BATCH_SIZE), desc=f"{self.name} {split} {name}", mininterval=10):
                samples = [images[index] for index in range(start, min(start + BATCH_SIZE, len(images)))]
                pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
                with torch.inference_mode():
                    rows.append(read(model(pixel_values=pixel_values)))
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, torch.cat(rows).numpy())
            part.rename(path)
        return torch.from_numpy(np.load(path))


class Variants:
    """The backbone as it merges with a recipe and a plugin set. One is prepared at a time."""

    def __init__(self, name_or_path: str, recipe: MergeRecipe | None):
        self.name_or_path = name_or_path
        self.recipes: dict[str, MergeRecipe | None] = {TOME: None}
        if recipe is not None:
            self.recipes["recipe"] = recipe
        self.sets: dict[str, PluginSet] = {}
        self.plain = AutoModel.from_pretrained(name_or_path, dtype=torch.float32).eval()

    def merging(self, name: str, degree: int) -> Callable[[], PreTrainedModel]:
        """The backbone as it is, merging at a degree by one of the recipes."""

        def prepare() -> PreTrainedModel:
            remove_tome(self.plain)
            return apply_tome(self.plain, degree, recipe=self.recipes[name])

        return prepare

    def compensated(self, name: str, source_r: int, degree: int, scale: float | None) -> Callable[[], PreTrainedModel]:
        """The backbone with plugins from one degree to another."""

        def prepare() -> PreTrainedModel:
            backbone = AutoModel.from_pretrained(self.name_or_path, dtype=torch.float32).eval()
            return TocomModel.from_pretrained(
                backbone, plugins=self.sets[name], source_r=source_r, target_r=degree, scale=scale
            )

        return prepare


def measure(task: Task, variants: Variants, args: argparse.Namespace) -> list[dict]:
    """The rows of one task."""
    dense = {split: task.outputs("r0", split, variants.merging(TOME, 0)) for split in ("train", "test")}
    head = fit(dense["train"], task.labels["train"], task.classes)
    right = {0: _right(head, dense["test"], task)}
    rows = [make_row(task, "at 0", "r = 0", right[0])]
    scales = [None, *args.scales]
    for degree in args.degrees:
        change = f"0 to {degree}"
        found: dict[str, torch.Tensor] = {}
        for name in variants.recipes:
            key = f"{name}-r{degree}"
            found[name if name == TOME else "recipe alone"] = task.outputs(key, "test", variants.merging(name, degree))
        for name in variants.sets:
            for scale in scales:
                what = name if scale is None else f"{name}, s = {scale:g}"
                key = f"{name}-0-to-{degree}" + ("" if scale is None else f"-s{scale:g}")
                found[what] = task.outputs(key, "test", variants.compensated(name, 0, degree, scale))
        plain = _right(head, found[TOME], task)
        for what, features in found.items():
            rows.append(make_row(task, change, what, _right(head, features, task), plain, right[0]))
            rows[-1]["cosine"] = _cosine(features, dense["test"])
        if degree in args.trained_at:
            for name in variants.recipes:
                key = f"{name}-r{degree}"
                trained = fit(
                    task.outputs(key, "train", variants.merging(name, degree)), task.labels["train"], task.classes
                )
                what = f"{name if name == TOME else 'recipe alone'}, head fitted at {degree}"
                test = task.outputs(key, "test", variants.merging(name, degree))
                rows.append(make_row(task, change, what, _right(trained, test, task), plain, right[0]))
                if degree in args.reverse:
                    rows += _reversed(task, variants, trained, name, degree, dense["test"])
    return rows


def _reversed(task: Task, variants: Variants, head: torch.nn.Linear, name: str, degree: int, dense: torch.Tensor):
    """Rows of a head that was fitted while merging by a recipe, run without merging."""
    change = f"{degree} to 0"
    own = _right(head, task.outputs(f"{name}-r{degree}", "test", variants.merging(name, degree)), task)
    plain = _right(head, dense, task)
    fitted = "" if name == TOME else ", head fitted with the recipe"
    rows = [
        make_row(task, change, f"at {degree}{fitted}", own),
        make_row(task, change, f"no merging{fitted}", plain, plain, own),
    ]
    for set_name, plugins in variants.sets.items():
        config = plugins.config
        if config.recipe != (variants.recipes[name] or MergeRecipe()) or config.source_r not in (None, degree):
            continue
        key = f"{set_name}-{degree}-to-0"
        features = task.outputs(key, "test", variants.compensated(set_name, degree, 0, None))
        rows.append(make_row(task, change, set_name, _right(head, features, task), plain, own))
    return rows


def _right(head: torch.nn.Linear, features: torch.Tensor, task: Task) -> np.ndarray:
    """Whether the head is right, for each test image: float64 `(images,)`."""
    with torch.inference_mode():
        return (head(features).argmax(dim=1) == task.labels["test"]).double().numpy()


def _cosine(features: torch.Tensor, dense: torch.Tensor) -> float:
    """Of class feature and mean patch feature to those without merging, the mean of both over all images."""
    halves = zip(features.chunk(2, dim=1), dense.chunk(2, dim=1), strict=True)
    return float(np.mean([torch.cosine_similarity(a, b).mean().item() for a, b in halves]))


def make_row(
    task: Task,
    change: str,
    what: str,
    right: np.ndarray,
    plain: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> dict:
    """One row: accuracy, the gain over plain merging, and what there was to win, with standard errors over images."""
    row = {"task": task.name, "change": change, "what": what, "images": len(right), **_mean("accuracy", right)}
    if plain is not None:
        row |= _mean("gain", right - plain)
    if plain is not None and own is not None:
        row |= _mean("lost", own - plain)
    return row


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_se": float(values.std(ddof=1) / math.sqrt(len(values)))}


def table(rows: list[dict], nearness: dict[str, str] = COSINE) -> str:
    """The rows in Markdown. `nearness` names what says how near the outputs are to those of r = 0, and its column."""
    header = (*COLUMNS, *nearness.values())
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [f"`{row['task']}`", row["change"], row["what"], _percent(row, "accuracy", "")]
        # that of ToMe's rule over itself is none
        has_gain = row.get("gain_se", 0) > 0
        cells.append(_percent(row, "gain", "+") if has_gain else "")
        # a share of a loss that is not clear of its error says nothing
        clear = has_gain and "lost" in row and row["lost"] > 2 * row["lost_se"]
        cells.append(
            f"{100 * row['gain'] / row['lost']:.0f} ± {100 * row['gain_se'] / row['lost']:.0f} %" if clear else ""
        )
        cells += [f"{row[name]:.4f}" if name in row else "" for name in nearness]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_sets(entries: list[str], task: str) -> dict[str, PluginSet]:
    """The plugin sets of `--plugins` for a task, by name."""
    named = (entry.partition("=") for entry in entries)
    return {name: PluginSet.from_pretrained(folder.replace("{task}", task)) for name, _, folder in named}


def _percent(row: dict, name: str, sign: str) -> str:
    return f"{100 * row[name]:{sign}.1f} ± {100 * row[f'{name}_se']:.1f}"


def main() -> None:
    args = parse_args()
    recipe = None if args.recipe is None else read_recipe(args.recipe)
    sets = {name: load_sets(args.plugins, name) for name in args.tasks}
    variants = Variants(args.model, recipe)
    rows: list[dict] = []
    output = args.output or args.work_dir / "heads"
    output.parent.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(args.tasks):
        folder = args.data / name
        if not (folder / "test.parquet").exists():
            write_task(name, folder, SPLITS, IMAGE_SIZE, seed, STYLES["cluttered"])
        variants.sets = sets[name]
        rows += measure(Task(folder, args.model, args.work_dir, args.test_images), variants, args)
        output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
