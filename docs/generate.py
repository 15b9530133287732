# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fill in the tables of the pages from the code and from the result files.

python docs/generate.py            write them
python docs/generate.py --check    name the pages that differ from what would be written, and exit with code 1

On a page a table stands between `<!-- generated: NAME -->` and `<!-- end -->`. `TABLES` has the function of every name.
"""

import argparse
import ast
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoModelForImageClassification

from tocom_hf import count_flops


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "fidelity" / "results"
STUDIES = ROOT / "benchmarks" / "fidelity"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = ("natural", "digits", "orientation")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown. A figure does not break in front of its error or its unit."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def read_table(path: Path, first_column: str) -> list[dict[str, str]]:
    """The rows of the table in a Markdown file whose first column has this name, by the names of their columns.

    A name that a table has several times is followed by the name of the column in front of it.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    names = _cells(lines[start])
    unique = []
    for position, name in enumerate(names):
        unique.append(f"{name}, {names[position - 1]}" if names.count(name) > 1 else name)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(unique, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# -- supported models ---------------------------------------------------------------------------------------------


# classes that have a test of their own, beside those of tests/helpers/families.py
MORE_CLASSES = {
    "vit": ["`ViTForMaskedImageModeling`"],
    "dinov2": ["`Dinov2Backbone`", "`DepthAnythingForDepthEstimation`", "`DepthProForDepthEstimation`"],
    "clip_vision_model": ["`CLIPModel` (its text side is untouched)"],
}
# of a library that need not be installed where the tables are made: what its tests and its models tell
WRAPPED = {"timm_wrapper": ["`TimmWrapperForImageClassification`", "`TimmWrapperModel`"]}
# what the tables do not say
TITLES = {"ViTMAEModel": "`ViTMAEModel` with `mask_ratio=0`"}
RESTORED = {"vit": "for masked image modelling", "timm_wrapper": "where patches are pooled"}


class Tested(NamedTuple):
    """What the tested models of one type show.

    Attributes:
        classes: Their names.
        inputs: What they take: `images`, `clips` or `spectrograms`.
        restored: Whether their tokens are restored where nothing else is asked for.
    """

    classes: list[str]
    inputs: str
    restored: bool


def supported_models() -> str:
    """The supported model types, from the table of architectures and from the families that are tested."""
    from tocom_hf.merging.architectures import ARCHITECTURES

    tested = _tested()
    missing = sorted(ARCHITECTURES.keys() - tested.keys())
    if missing:
        raise ValueError(f"tests/helpers/families.py has no family of the type {', '.join(missing)}. Add one.")
    rows = []
    for model_type, row in ARCHITECTURES.items():
        classes, inputs, restored = tested[model_type]
        rows.append(
            [
                f"`{model_type}`",
                ", ".join([*classes, *MORE_CLASSES.get(model_type, [])]),
                inputs,
                "what stands in front of the patches" if row.reader else _never_merged(row.protected, row.registers),
                RESTORED.get(model_type, "yes" if restored else "no"),
                "added to the tokens" if row.positions is None else "rotary",
            ]
        )
    return table(["model type", "classes tested", "input", "never merges", "restored", "positions"], rows)


# what the README leaves to the page: these are much used, or stand for others
IN_README = {
    "vit", "deit", "timm_wrapper", "vit_mae", "dinov2", "dinov3_vit", "clip_vision_model", "siglip_vision_model",
    "internvl_vision", "idefics3_vision", "blip_2_vision_model", "owlv2_vision_model", "dpt",
}  # fmt: skip


def supported_kinds() -> str:
    """The supported model types by what they take; of images those in `IN_README`, and how many more there are."""
    from tocom_hf.merging.architectures import ARCHITECTURES

    tested = _tested()
    kinds: dict[str, list[str]] = {}
    for model_type in ARCHITECTURES:
        kinds.setdefault(tested[model_type].inputs, []).append(model_type)
    rows = []
    for inputs, types in kinds.items():
        shown = [name for name in types if inputs != "images" or name in IN_README]
        more = len(types) - len(shown)
        rows.append([inputs, ", ".join(f"`{name}`" for name in shown) + (f" and {more} more" if more else "")])
    return table(["input", "model types"], rows)


@functools.cache
def _tested() -> dict[str, Tested]:
    """The tested models by the model type of their backbone."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from helpers.families import FAMILIES, SIMILAR
    finally:
        sys.path.remove(str(ROOT / "tests"))
    from tocom_hf import apply_tome
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.merging.patching import get_settings

    tested: dict[str, Tested] = {}
    for family in [*FAMILIES, *SIMILAR]:
        backbone = find_backbone(apply_tome(family.make(), 1))
        settings = get_settings(backbone)
        found = Tested([], _kind_of_input(family.inputs(batch=1)), settings is not None and settings.restore)
        classes = tested.setdefault(backbone.module.config.model_type, found).classes
        name = TITLES.get(family.model_class.__name__, f"`{family.model_class.__name__}`")
        if name not in classes:
            classes.append(name)
    tested |= {model_type: Tested(classes, "images", restored=False) for model_type, classes in WRAPPED.items()}
    return tested


def _kind_of_input(inputs: dict[str, Any]) -> str:
    """What a model takes: clips are `(batch, frames, channels, height, width)`, images have no frames."""
    pixels = [value for name, value in inputs.items() if name.startswith("pixel_values")]
    if not pixels:
        return "spectrograms"
    return {3: "sequences of patches", 4: "images", 5: "clips"}[pixels[0].ndim]


def _never_merged(protected: int, registers: str | None) -> str:
    front = {0: "nothing", 1: "the class token", 2: "the class and the distillation token"}
    words = front.get(protected, f"{protected} tokens at the front")
    if registers is None:
        return words
    more = "the register tokens" if "register" in registers else f"the tokens that `{registers}` counts"
    return f"{words}, {more}" if protected else more


def refused_models() -> str:
    """The well-known model types that are refused, by reason."""
    from tocom_hf.merging.refusals import REASONS

    types: dict[str, list[str]] = {}
    for model_type, reason in REASONS.items():
        types.setdefault(reason, []).append(f"`{model_type}`")
    return table(["model types", "why"], [[", ".join(names), reason] for reason, names in types.items()])


# -- results of the studies ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a table of shares.

    Attributes:
        models: The downstream models.
        plugins: Which plugins they got.
        run: The folder of the results, `study_a_mix`, or the name of another run in it, `study_a_mix/other/adapted`.
        prefix: What stands in front of the kind of task in the summary, such as `fitted-linear-`.
    """

    models: str
    plugins: str
    run: str
    prefix: str = ""

    @property
    def file(self) -> str:
        """Its summary, relative to the folder of results."""
        return f"{self.run}_summary.md" if "/other/" in self.run else f"{self.run}/summary.md"

    @property
    def group(self) -> str:
        """The row of the summary's table of mean gains."""
        models = "heads" if "linear-" in self.prefix else "fine-tuned"
        plugins = {"fitted-": ", fitted plugins", "scaled-": ", fitted scales", "adapted-": ", adapted plugins"}
        return models + next((text for prefix, text in plugins.items() if self.prefix.startswith(prefix)), "")


COLUMNS = {"no labels": "ToCom (no labels)", "paper": "ToCom (0.05 to 0.15)"}


def shares(rows: Sequence[Row], pick: str = "no labels", measure: str = "gap closed") -> str:
    """What plugins bring back, by kind of task.

    Args:
        rows: What to show.
        pick: How the scale was picked, one of `COLUMNS`.
        measure: `gap closed`, the share of the gap to models trained at the target degree, or `won back`, the share of
            what changing the degree costs.
    """
    lines = []
    for row in rows:
        gains = {line["mean gain (cells below plain by more than one standard error)"]: line for line in _gains(row)}
        gain = gains[row.group]
        mean, below = re.fullmatch(r"(\S+) \((\d+)\)", gain[COLUMNS[pick]]).groups()
        found = [_share(row, kind, pick, measure) for kind in KINDS]
        source = f"[file](RESULTS/{row.file})"  # `fill` puts the way to the folder in front
        lines.append([row.models, row.plugins, *found, mean, f"{below} of {gain['cells']}", source])
    header = ["models", "plugins", *(f"`{kind}`" for kind in KINDS), "mean gain, points", "cells below plain", "from"]
    return table(header, lines)


def _gains(row: Row) -> list[dict[str, str]]:
    return read_table(RESULTS / row.file, "mean gain (cells below plain by more than one standard error)")


def _share(row: Row, kind: str, pick: str, measure: str) -> str:
    path, column = RESULTS / row.file, COLUMNS[pick]
    if measure == "gap closed":
        lines, name = read_table(path, "task | seeds"), f"gap closed, {column}"
    else:
        lines, name = read_table(path, "task | cells with a clear loss"), column
        # a column of this table is called `won back, ToCom (...)` where it is the first
        name = next(key for key in lines[0] if key.removeprefix("won back, ") == column)
    found = {line["task"]: line for line in lines}
    return found[f"{row.prefix}{kind}"][name]


HEADS, TUNED = "heads", "fine-tuned"
MLPS, LINEAR = "fine-tuned, LoRA on the MLPs", "fine-tuned, LoRA on all linear layers"
MIX, A, B = "study_a_mix", "study_a", "study_b"
ALL_MIX = [
    Row(HEADS, "one set for all", MIX, "linear-"),
    Row(HEADS, "one set for all, scales fitted to each", f"{MIX}/other/all_but_keys_scales", "scaled-linear-"),
    Row(HEADS, "one set for all, on all linear layers, of rank 16", f"{MIX}/other/all_linear_rank_16", "linear-"),
    Row(HEADS, "one for each task, adapted", f"{MIX}/other/all_but_keys_adapted", "adapted-linear-"),
    Row(HEADS, "query and value: one set for all", f"{MIX}/other/query_and_value", "linear-"),
    Row(HEADS, "query and value: another seed", f"{MIX}/other/seed_1", "linear-"),
    Row(HEADS, "query and value: distilled on collages", f"{MIX}/other/collages", "linear-"),
    Row(HEADS, "query and value: one for each source degree", f"{MIX}/other/source_r_each", "linear-"),
    Row(HEADS, "query and value: one for each task, adapted", f"{MIX}/other/adapted", "adapted-linear-"),
    Row(TUNED, "one set for all", MIX),
    Row(TUNED, "one set for all, scales fitted to each", f"{MIX}/other/all_but_keys_scales", "scaled-"),
    Row(TUNED, "one set for all, on all linear layers, of rank 16", f"{MIX}/other/all_linear_rank_16"),
    Row(TUNED, "one for each task, adapted", f"{MIX}/other/all_but_keys_adapted", "adapted-"),
    Row(TUNED, "fitted to each checkpoint", f"{MIX}/other/all_but_keys_fitted", "fitted-"),
    Row(TUNED, "query and value: one set for all", f"{MIX}/other/query_and_value"),
    Row(TUNED, "query and value: scales fitted to each", f"{MIX}/other/query_and_value_scales", "scaled-"),
    Row(TUNED, "query and value: another seed", f"{MIX}/other/seed_1"),
    Row(TUNED, "query and value: distilled on collages", f"{MIX}/other/collages"),
    Row(TUNED, "query and value: one for each source degree", f"{MIX}/other/source_r_each"),
    Row(TUNED, "query and value: one for each task, adapted", f"{MIX}/other/adapted", "adapted-"),
    Row(TUNED, "query and value: fitted to each checkpoint", f"{MIX}/other/fitted", "fitted-"),
    Row(f"{LINEAR}, further", "one set for all", f"{MIX}/other/all_but_keys_all_layers"),
    Row(f"{LINEAR}, further", "query and value: one set for all", f"{MIX}/other/all_layers"),
]
ALL_A = [
    Row(HEADS, "one set for all", A, "linear-"),
    Row(HEADS, "one set for all, longer, of rank 8", f"{A}/other/rank_8_long", "linear-"),
    Row(HEADS, "one for each source degree", f"{A}/other/source_r_each", "linear-"),
    Row(HEADS, "fitted to each", A, "fitted-linear-"),
    Row(MLPS, "one set for all", f"{A}/other/mlp"),
    Row(MLPS, "one set for all, longer, of rank 8", f"{A}/other/mlp_rank_8_long"),
    Row(MLPS, "one for each source degree, of hidden states", f"{A}/other/mlp_hidden_states_source_r_each"),
    Row(LINEAR, "one set for all", A),
    Row(LINEAR, "one set for all, longer, of rank 8", f"{A}/other/rank_8_long"),
    Row(LINEAR, "one for each source degree", f"{A}/other/source_r_each"),
    Row(LINEAR, "fitted to each", A, "fitted-"),
]
ALL_B = [
    Row(HEADS, "one set for all", B, "linear-"),
    Row(HEADS, "one set for all, longer, of rank 6", f"{B}/other/longer", "linear-"),
    Row(HEADS, "one for r = 0, from there only", f"{B}/other/source_r_0", "linear-"),
    Row(HEADS, "fitted to each, from r = 0 only", f"{B}/other/fitted_longer", "fitted-linear-"),
    Row(MLPS, "one set for all, longer, of rank 6", f"{B}/other/longer_mlp"),
    Row(LINEAR, "one set for all", B),
    Row(LINEAR, "one set for all, longer, of rank 6", f"{B}/other/longer"),
    Row(LINEAR, "fitted to each, from r = 0 only", f"{B}/other/fitted_longer", "fitted-"),
]
HIGH_RATE = [
    Row(HEADS, "all linear layers but the keys, high rate", f"{B}/other/224_px_r20_wide", "linear-"),
    Row(HEADS, "all linear layers but the keys, low rate", f"{B}/other/224_px_r20_wide_low_rate", "linear-"),
    Row(HEADS, "query and value, high rate", f"{B}/other/224_px_r20_query_value", "linear-"),
]
KNOWLEDGE = [
    Row("backbone of a wider mix", "query and value, rank 8, collages", f"{MIX}/other/collages"),
    Row("backbone of clothing alone", "query and value, rank 8, collages", f"{A}/other/mlp_rank_8_long"),
]
ONE_SET, FITTED_SCALES = "one set for all", "one set for all, scales fitted to each"
ADAPTED, FITTED = "one for each task, adapted", "fitted to each checkpoint"
QUERY_AND_VALUE = "query and value: one set for all"


def _rows(rows: Sequence[Row], *plugins: str) -> list[Row]:
    """The rows of heads and of the main fine-tuned checkpoints with these plugins."""
    return [row for row in rows if row.plugins in plugins and row.models in (HEADS, TUNED)]


def _short_b() -> list[Row]:
    return [row for row in ALL_B if row.plugins in (ONE_SET, "fitted to each, from r = 0 only")]


def main_results() -> str:
    """Both directions on the main study, with standard errors over the test images."""
    rows = []
    for models, prefix in (("head", "linear-"), ("fine-tuned", "")):
        for kind in KINDS:
            path = RESULTS / "study_a_mix" / f"{prefix}{kind}" / "grid.json"
            grid = json.loads(path.read_text(encoding="utf-8"))
            closed, error = _gap_closed(grid)
            for source_r, target_r in ((0, 8), (8, 0)):
                cell = _cell(grid, source_r, target_r)
                tocom = cell["compensated"]["unlabelled"]
                share = f"{100 * closed:.0f} ± {100 * error:.0f} %" if source_r == 0 else ""
                rows.append(
                    [
                        models,
                        f"`{kind}`",
                        f"{source_r} to {target_r}",
                        f"{100 * cell['plain']:.1f} ± {100 * cell['plain_se']:.1f}",
                        f"{100 * tocom['accuracy']:.1f} ({100 * tocom['gain']:+.1f} ± {100 * tocom['gain_se']:.1f})",
                        f"{100 * cell['trained']:.1f} ({100 * cell['gap']:+.1f} ± {100 * cell['gap_se']:.1f})",
                        share,
                    ]
                )
    header = [
        "model", "task", "change of r", "merging alone, %", "with ToCom, % (over merging alone)",
        "trained at the target, % (over merging alone)", "gap closed, over all six changes",
    ]  # fmt: skip
    return table(header, rows)


def _cell(grid: dict, source_r: int, target_r: int) -> dict:
    return next(c for c in grid["cells"] if (c["source_r"], c["target_r"]) == (source_r, target_r))


def _gap_closed(grid: dict) -> tuple[float, float]:
    """The share of the gap that is closed over all changes of the degree, the scale picked without labels, and its
    standard error: that of a ratio of two means over the same test images (delta method)."""
    gains, gaps = 0.0, 0.0
    for source_r, target_r in {(run["source_r"], run["target_r"]) for run in grid["runs"]}:
        if source_r == target_r:
            continue
        plain = _right(grid, source_r, target_r, "plain")
        gains = gains + _right(grid, source_r, target_r, "unlabelled") - plain
        gaps = gaps + _right(grid, target_r, target_r, "plain") - plain
    share = gains.mean() / gaps.mean()
    residual = gains - share * gaps
    return share, residual.std(ddof=1) / math.sqrt(len(residual)) / gaps.mean()


def _right(grid: dict, source_r: int, target_r: int, method: str) -> np.ndarray:
    """How many of the checkpoints of a source degree get each test image right, as a share: float64 `(images,)`."""
    outcomes = []
    for run in grid["runs"]:
        if (run["source_r"], run["target_r"]) != (source_r, target_r):
            continue
        outcome = run["plain"]
        if method != "plain":
            scale = run["picked"][method]
            at_scale = {float(key): value for key, value in run["at_scale"].items()}
            outcome = at_scale[scale] if scale else run["plain"]
        packed = np.frombuffer(bytes.fromhex(outcome["right"]), np.uint8)
        outcomes.append(np.unpackbits(packed, count=run["images"]))
    return np.mean(outcomes, axis=0)


def nothing_to_win() -> str:
    """Heads of DINOv2-small that run with less merging than they were trained for."""
    rows = []
    for kind in KINDS:
        path = RESULTS / "study_b" / f"linear-{kind}" / "grid.json"
        grid = json.loads(path.read_text(encoding="utf-8"))
        for source_r, target_r in ((3, 0), (5, 0)):
            cell = _cell(grid, source_r, target_r)
            tocom = cell["compensated"]["unlabelled"]
            rows.append(
                [
                    f"`{kind}`",
                    f"{source_r} to {target_r}",
                    f"{-100 * cell['lost']:+.1f} ± {100 * cell['lost_se']:.1f}",
                    f"{100 * tocom['gain']:+.1f} ± {100 * tocom['gain_se']:.1f}",
                ]
            )
    header = ["task", "change of r", "merging alone over its source degree, points", "ToCom over merging alone, points"]
    return table(header, rows)


def few_images() -> str:
    """DINOv2-small on 800 digits: where five tokens are left, training at 0 or there."""
    folder = RESULTS / "study_b"
    shared = _cell(json.loads((folder / "digits" / "grid.json").read_text(encoding="utf-8")), 0, 5)
    fitted = _cell(json.loads((folder / "fitted-digits" / "grid.json").read_text(encoding="utf-8")), 0, 5)
    rows = []
    for title, cell in (("one set for all", shared), ("fitted to the checkpoint", fitted)):
        tocom = cell["compensated"]["unlabelled"]
        plain = f"{100 * cell['plain']:.1f} ± {100 * cell['plain_se']:.1f}"
        gain = f"{100 * tocom['accuracy']:.1f} ({100 * tocom['gain']:+.1f} ± {100 * tocom['gain_se']:.1f})"
        rows.append(["0", title, cell["checkpoints"], plain, gain])
    trained = f"{100 * shared['trained']:.1f} ± {100 * shared['trained_se']:.1f}"
    rows.append(["5", "none needed", shared["checkpoints"], trained, ""])
    return table(
        ["trained at r", "plugins", "checkpoints", "merging alone, %", "with ToCom, % (over merging alone)"], rows
    )


def tasks() -> str:
    """The data sets of the paper by name."""
    from tocom_hf.data.tasks import TASKS

    rows = []
    for name, task in TASKS.items():
        images = "800 images" if task.few_shot else "all"
        rows.append([f"`{name}`", task.kind, task.num_classes, images, f"`{task.hub_name}`"])
    return table(["name", "kind", "classes", "training images", "on the Hub"], rows)


def embedded_checkpoint() -> str:
    """Accuracy of the checkpoint of digits that the repository carries, at five degrees."""
    config = json.loads((ROOT / "hub_cards" / "tocom-vit-mix" / "tocom_config.json").read_text(encoding="utf-8"))
    entries = [e for e in config["evaluation"] if e["dataset"] == "digits" and e["source_r"] == 0]
    rows = []
    for entry in entries:
        flipped = entry.get("sign_flipped", entry["plain"])
        figures = [f"{100 * value:.1f}" for value in (entry["plain"], entry["tocom"], flipped)]
        rows.append([entry["target_r"], *figures, f"{100 * entry['standard_error']:.1f}"])
    return table(
        ["target r", "merging alone, %", "with ToCom, %", "sign flipped, %", "standard error of merging alone"], rows
    )


def readme_results() -> str:
    """What the plugin set gives the checkpoint of digits, beside what a degree costs."""
    model = AutoModelForImageClassification.from_pretrained(ROOT / "examples" / "digits" / "checkpoint")
    config = json.loads((ROOT / "hub_cards" / "tocom-vit-mix" / "tocom_config.json").read_text(encoding="utf-8"))
    rows = []
    for entry in config["evaluation"]:
        if entry["dataset"] != "digits" or entry["source_r"] != 0:
            continue
        error = 100 * entry["standard_error"]
        rows.append(
            [
                entry["target_r"],
                f"{count_flops(model, entry['target_r']) / 1e9:.3f}",
                f"{100 * entry['plain']:.1f}",
                f"{100 * entry['tocom']:.1f}",
                f"{error:.1f}",
            ]
        )
    header = [
        "target r",
        "GFLOPs an image",
        "accuracy of merging alone, %",
        "with plugins, %",
        "standard error of merging alone",
    ]
    return table(header, rows)


def learning_rates() -> str:
    """The learning rates of the distillations of the studies."""
    rows = []
    names = {
        "study_a": "study A",
        "study_a_mix": "study A on a wider mix",
        "study_b": "study B",
        "study_b_224": "study B at 224 px",
        "dinov2_small": "study C",
    }
    for name, title in names.items():
        config = json.loads((STUDIES / f"{name}.json").read_text(encoding="utf-8"))
        recipe = config["distillation"]
        modules = recipe.get("target_modules")
        rows.append(
            [
                f"[{title}](STUDIES/{name}.json)",
                recipe["max_r"],
                "query and value" if modules is None else " ".join(f"`{module}`" for module in modules),
                recipe["rank"],
                recipe["per_device_train_batch_size"],
                recipe["max_steps"],
                recipe["learning_rate"],
                round(recipe["learning_rate"] * recipe["per_device_train_batch_size"] / 512, 6),
            ]
        )
    header = ["study", "plugins", "on", "rank", "batch", "steps", "`--learning_rate`", "rate that the optimiser sees"]
    return table(header, rows)


def heads_at_224() -> str:
    """What `heads.py` wrote of study C."""
    return (RESULTS / "study_c" / "heads.md").read_text(encoding="utf-8").strip()


def fine_tuned_at_224() -> str:
    """What `finetuned.py` wrote of study C."""
    return (RESULTS / "study_c" / "finetuned.md").read_text(encoding="utf-8").strip()


def means_at_224() -> str:
    """The rows of study C on the mean over its tasks."""
    rows = []
    for models, name in (("heads", "heads"), ("fine-tuned checkpoints", "finetuned")):
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in json.loads((RESULTS / "study_c" / f"{name}.json").read_text(encoding="utf-8")):
            if row.get("gain_se"):
                groups.setdefault((row["change"], row["what"]), []).append(row)
        for (change, what), group in groups.items():
            gain, lost = (sum(row[value] for row in group) / len(group) for value in ("gain", "lost"))
            error, lost_error = (
                math.sqrt(sum(row[value] ** 2 for row in group)) / len(group) for value in ("gain_se", "lost_se")
            )
            # a share of a loss that is not clear of its error says nothing
            share = f"{100 * gain / lost:.0f} ± {100 * error / lost:.0f} %" if lost > 2 * lost_error else ""
            rows.append([models, change, what, f"{100 * lost:.1f}", f"{100 * gain:+.1f} ± {100 * error:.1f}", share])
    header = ["models", "change of r", "what", "lost by ToMe, points", "over ToMe, points", "of the loss won back"]
    return table(header, rows)


def own_set() -> str:
    """What `own_set.py` wrote."""
    rows = read_table(ROOT / "benchmarks" / "own_set.md", "r")
    return table(list(rows[0]), [list(row.values()) for row in rows])


# -- cost ---------------------------------------------------------------------------------------------------------


BENCHMARKS = (
    "inference_cpu",
    "inference_cpu_batch1",
    "inference_cpu_bfloat16",
    "inference_cpu_large",
    "inference_cpu_384",
    "inference_gpu_float32",
    "inference_gpu",
    "inference_gpu_384",
    "inference_gpu_small",
)


def speed() -> str:
    """How fast merged inference is over dense, at two degrees of every benchmark."""
    rows = []
    for name in BENCHMARKS:
        path = ROOT / "benchmarks" / f"{name}.md"
        device = re.search(r"^(.*?); torch", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
        for line in read_table(path, "model"):
            if line["r"] not in ("8", "16"):
                continue
            setting = [line["model"], line["image size"], line["batch"], line["dtype"], line["r"]]
            rows.append([f"[{device}](BENCHMARKS/{name}.md)", *setting, line["FLOP ratio"], line["ours / dense"]])
    header = ["device", "model", "px", "batch", "dtype", "r", "FLOPs, dense over merged", "speed, merged over dense"]
    return table(header, rows)


def memory() -> str:
    """Activation memory of a training step."""
    rows = read_table(ROOT / "benchmarks" / "memory.md", "model")
    return table(list(rows[0]), [list(row.values()) for row in rows])


def service() -> str:
    """What the service does under load."""
    rows = read_table(ROOT / "benchmarks" / "serving.md", "service")
    names = ("service", "load over dense capacity", "refused", "p95 ms", "accuracy")
    return table(names, [[row[name] for name in names] for row in rows])


# -- the packages -------------------------------------------------------------------------------------------------


def packages() -> str:
    """The packages of tocom_hf, each below those that it imports from; of several that import each other, the one that
    most of the rest need comes first."""
    imports = {path.parent.name: _imports(path.parent) for path in (ROOT / "tocom_hf").glob("*/__init__.py")}
    imports = {name: found & imports.keys() - {name} for name, found in imports.items()}
    rows, left = [], dict(imports)
    while left:
        ready = sorted(name for name, found in left.items() if not found & left.keys())
        for name in ready or [max(left, key=lambda name: sum(name in found for found in left.values()))]:
            code = (ROOT / "tocom_hf" / name / "__init__.py").read_text(encoding="utf-8")
            purpose = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0].replace("\n", " ")
            rows.append([f"`{name}`", purpose, ", ".join(f"`{other}`" for other in sorted(left.pop(name))) or "none"])
    return table(["package", "what it holds", "imports from"], rows)


def _imports(folder: Path) -> set[str]:
    """The packages that the modules in a folder import from."""
    import tocom_hf

    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "tocom_hf":
                found |= {tocom_hf._MODULES.get(alias.name, "errors").split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tocom_hf."):
                found.add(str(node.module).split(".")[1])
    return found


# -- the API ------------------------------------------------------------------------------------------------------


# page, its title, who it is for, and the public names on it
API = {
    "models": (
        "Models",
        "For those who run a checkpoint at another degree than it was trained at, or merge tokens alone.",
        [
            "TocomModel",
            "load_lora",
            "apply_tome",
            "remove_tome",
            "trace_tokens",
            "MergeRecipe",
            "find_recipe",
            "FoundRecipe",
        ],
    ),
    "plugins": (
        "Plugin sets",
        "For those who load, combine, store or publish plugins.",
        ["PluginSet", "save_composite"],
    ),
    "cost": (
        "Cost",
        "For those who ask for a time or a number of operations instead of a degree.",
        ["calibrate", "Calibration", "DegreeCost", "count_flops"],
    ),
    "evaluation": (
        "Scales and evaluation",
        "For those who pick or fit the strength of plugins, and measure what these recover.",
        ["pick_scale", "fit_scales", "evaluate_degrees", "DegreeResult"],
    ),
    "distillation": (
        "Distillation",
        "For those who make a plugin set from Python instead of the command line.",
        ["distill", "fit_plugins", "DistillationArguments"],
    ),
    "export": (
        "Export",
        "For those who write a model for another runtime, and run it there.",
        ["export", "ExportedTocom"],
    ),
    "images": (
        "Images",
        "For those who read images, or paint what merges.",
        ["load_images", "match_labels", "with_pixel_values", "paint_groups", "tile"],
    ),
    "errors": ("Errors", "For those who handle what goes wrong. All are subclasses of `TocomError`.", []),
}


def api_pages() -> dict[Path, str]:
    """The pages of the API reference: one directive for every public name, at the module that defines it."""
    import tocom_hf

    modules = tocom_hf._MODULES
    named = {name for _, _, names in API.values() for name in names}
    errors = [name for name in tocom_hf.__all__ if name not in modules and name != "__version__"]
    missing = sorted(set(tocom_hf.__all__) - named - set(errors) - {"__version__"})
    if missing:
        raise ValueError(f"These public names are on no page of the API: {', '.join(missing)}. Add them to API.")
    errors.sort(key=lambda name: (name != "TocomError", name))
    pages = {}
    for page, (title, purpose, names) in API.items():
        parts = [f"# {title}", f"{purpose} All names are imported from `tocom_hf`."]
        parts += [f"::: tocom_hf.{modules.get(name, 'errors')}.{name}" for name in names or errors]
        pages[ROOT / "docs" / "api" / f"{page}.md"] = "\n\n".join(parts) + "\n"
    return pages


def api_index() -> str:
    """Every public name with the page that it is on."""
    rows = []
    for page, (title, _, names) in API.items():
        words = ", ".join(f"`{name}`" for name in names) or "`TocomError` and its subclasses"
        rows.append([f"[{title}]({page}.md)", words])
    return table(["page", "names"], rows)


# -- all of it ----------------------------------------------------------------------------------------------------


TABLES: dict[str, Callable[[], str]] = {
    "supported-models": supported_models,
    "supported-kinds": supported_kinds,
    "refused-models": refused_models,
    "main-results": main_results,
    "embedded-checkpoint": embedded_checkpoint,
    "readme-results": readme_results,
    "learning-rates": learning_rates,
    "where-plugins-apply": lambda: shares(_rows(ALL_MIX, QUERY_AND_VALUE, ONE_SET)),
    "scales": lambda: shares(_rows(ALL_MIX, ONE_SET, FITTED_SCALES)),
    "adapted-and-fitted": lambda: shares(_rows(ALL_MIX, ONE_SET, ADAPTED, FITTED)),
    "knowledge": lambda: shares(KNOWLEDGE),
    "moved-far": lambda: shares([row for row in ALL_A if row.models == LINEAR]),
    "learning-rate-harm": lambda: shares(HIGH_RATE, measure="won back"),
    "nothing-to-win": nothing_to_win,
    "few-images": few_images,
    "tasks": tasks,
    "study-a-mix": lambda: shares(ALL_MIX),
    "study-a-mix-paper": lambda: shares(ALL_MIX, "paper"),
    "study-a-mix-short": lambda: shares(_rows(ALL_MIX, QUERY_AND_VALUE, ONE_SET, FITTED_SCALES, ADAPTED, FITTED)),
    "study-a-short": lambda: shares([row for row in ALL_A if row.plugins in (ONE_SET, "fitted to each")]),
    "study-a": lambda: shares(ALL_A),
    "study-a-paper": lambda: shares(ALL_A, "paper"),
    "study-b-short": lambda: shares(_short_b(), measure="won back"),
    "study-b": lambda: shares(ALL_B, measure="won back"),
    "study-c": heads_at_224,
    "study-c-fine-tuned": fine_tuned_at_224,
    "study-c-means": means_at_224,
    "own-set": own_set,
    "speed": speed,
    "memory": memory,
    "service": service,
    "packages": packages,
    "api-index": api_index,
}


def pages() -> list[Path]:
    """The pages that may hold generated tables."""
    found = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *STUDIES.glob("*.md"),
    ]
    return sorted(path for path in found if path.is_file())


def fill(path: Path, text: str) -> str:
    """The text of a page with its tables as they should be."""
    up = "../" * (len(path.relative_to(ROOT).parts) - 1)

    def replace(match: re.Match) -> str:
        found = TABLES[match[2]]()
        for word, folder in (("RESULTS/", RESULTS), ("STUDIES/", STUDIES), ("BENCHMARKS/", ROOT / "benchmarks")):
            relative = folder.relative_to(ROOT).as_posix()
            inside = path.parent == STUDIES and folder in (RESULTS, STUDIES)
            way = "results/" if folder == RESULTS and inside else "" if inside else f"{up}{relative}/"
            found = found.replace(f"]({word}", f"]({way}")
        return f"{match[1]}\n{found}\n\n{match[3]}"

    return BLOCK.sub(replace, text)


def generate() -> dict[Path, str]:
    """Every page with its text as it should be, by path."""
    texts = {path: path.read_text(encoding="utf-8") for path in pages()}
    texts.update(api_pages())
    return {path: fill(path, text) for path, text in texts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with code 1 if a page is stale.")
    check = parser.parse_args().check
    stale = []
    for path, text in generate().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("Stale, run python docs/generate.py: " if check else "Written: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
