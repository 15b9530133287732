# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Run the study of a configuration, stage by stage. Every stage skips what is already there.

    python benchmarks/fidelity/run.py --config benchmarks/fidelity/study_b.json --output_dir runs/study-b
    python benchmarks/fidelity/run.py --config ... --output_dir ... --stages finetune evaluate --tasks digits --seeds 1

Stages: `data` makes the images, `base` stores the backbone with an image processor of the study's size, `distil`
makes the plugin set, `finetune` the checkpoints, `fit` a plugin set for each of these, or one for each task, from the
training images without labels, or only its scales, from the validation images without labels, `evaluate` the grid of
each task, `arithmetic` the evidence of eq. 1, `tabulate` the tables and plots. The work is done by the scripts in
`examples/`, whose commands are printed.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mix
import torch
import transformers
from images import CANVAS, STYLES, distillation_images, write_task
from transformers import AutoConfig, AutoImageProcessor

from tocom_hf import PluginSet
from tocom_hf.evaluation.grid import Cell
from tocom_hf.evaluation.reports import Report, clearly_lost, gap_closed, won_back
from tocom_hf.plugins.config import CONFIG_NAME


HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
LINEAR = "linear-"  # before the name of a task: a linear head on the frozen backbone instead of fine-tuning
FITTED = "fitted-"  # before the name of a task: the same checkpoints, each with a plugin set fitted to it
SCALED = "scaled-"  # as FITTED, but only a scale for every layer and plugin is fitted; for tasks that are asked for
ADAPTED = "adapted-"  # as FITTED, but one set a task, distilled on the backbone; only for tasks that are asked for
EACH = "each"  # as source_r of the distillation: a plugin set for each degree that checkpoints are trained at
MIX = "distillation_mix"  # in a configuration: distil on images of `mix.py` instead of collages
METHODS = ("paper", "wide", "unlabelled")  # what picked the scale
STAGES = ("data", "base", "distil", "finetune", "fit", "evaluate", "arithmetic", "tabulate")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="Hub id or folder of the backbone; default: the configuration's.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--tasks", nargs="+", help="Only these tasks.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Only these seeds.")
    parser.add_argument("--degrees", type=int, nargs="+", help="Only these degrees, as source and as target.")
    parser.add_argument("--source_r", type=int, nargs="+", help="Only checkpoints of these degrees.")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        help="Other values than the configuration's, for an output_dir of their own: finetuning.learning_rate=1e-3.",
    )
    parser.add_argument("--results_dir", type=Path, help="Where tables and plots go; default: OUTPUT_DIR/results.")
    return parser.parse_args()


def override(config: dict, settings: list[str]) -> None:
    """Change entries of a configuration: `finetuning.learning_rate=1e-3`."""
    for setting in settings:
        path, _, value = setting.partition("=")
        *parents, name = path.split(".")
        part: Any = config
        for parent in parents:
            part = part.get(parent, {})
        if name not in part:
            raise SystemExit(f"The configuration has no {path}.")
        try:
            part[name] = json.loads(value)
        except ValueError:
            raise SystemExit(f"The value of {path} must be JSON, such as 1e-3 or [0, 4], got {value!r}.") from None


def make_data(config: dict, folder: Path, tasks: list[str]) -> None:
    size, seed, style = config["image_size"], config["data_seed"], STYLES[config["style"]]
    wanted = {data_folder(folder, task).name for task in tasks}
    for offset, name in enumerate(config["tasks"]):
        if name in wanted and not (folder / name / "test.parquet").exists():
            write_task(name, folder / name, config["tasks"][name], size, 1000 * seed + offset, style)
            print(f"images of the task {name} written to {folder / name}", flush=True)
    distil = folder / "distil.parquet"
    if not distil.exists():
        count, seed = config["distillation_images"], 1000 * seed + 999
        if config.get(MIX):
            images = mix.distillation_images(count, seed)
        else:
            images = distillation_images(count, seed, style, config.get("distillation_image_size", CANVAS))
        images.to_parquet(distil.with_suffix(".part"))
        distil.with_suffix(".part").rename(distil)
        print(f"{len(images)} images to distil on written to {distil}", flush=True)


def make_base(config: dict, model: str, folder: Path) -> None:
    """The backbone as it is, with an image processor that takes images of the study's size as they are."""
    if (folder / "preprocessor_config.json").exists():
        return
    model_class = getattr(transformers, AutoConfig.from_pretrained(model).architectures[0])
    backbone = model_class.from_pretrained(model, dtype=torch.float32)
    backbone.config.__dict__.pop("tocom", None)  # plugins are for checkpoints of any degree, not for this one
    backbone.save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(model)
    processor.size = processor.crop_size = {"height": config["image_size"], "width": config["image_size"]}
    processor.do_resize = processor.do_center_crop = False
    processor.save_pretrained(folder)


def train(config: dict, arguments: dict, model: Path, data: Path, output_dir: Path, **more: Any) -> None:
    run(
        "finetune.py",
        model_name_or_path=model,
        dataset_name=data,
        output_dir=output_dir,
        save_strategy="no",
        report_to="none",
        logging_steps=32,
        disable_tqdm=True,
        bf16=config["precision"] == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        **more,
        **arguments,
    )


def distil(config: dict, root: Path) -> None:
    """One plugin set, or, where the configuration's `source_r` is "each", one for the checkpoints of each degree."""
    if config["distillation"].get("source_r") != EACH:
        distil_set(config, root, root / "plugins", {})
        return
    for source_r in config["degrees"]:
        distil_set(config, root, root / "plugins" / f"r{source_r}", {"source_r": source_r})


def distil_set(config: dict, root: Path, folder: Path, more: dict) -> None:
    if (folder / CONFIG_NAME).exists():
        return
    run(
        "distill.py",
        model_name_or_path=root / "base",
        dataset_name=root / "data" / "distil.parquet",
        output_dir=folder,
        mixed_precision=config["precision"],
        **{**config["distillation"], **more},
    )
    plugins = PluginSet.from_pretrained(folder)
    plugins.config.base_model = config["model"]
    source = "the pre-training mix" if config.get(MIX) else "drawings and of Fashion-MNIST"
    plugins.config.training["dataset"] = f"{config['distillation_images']} images of {source}"
    plugins.save_pretrained(folder)


def finetune(config: dict, root: Path, task: str, source_r: int, seed: int) -> None:
    folder = checkpoint(root, task, source_r, seed)
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    base, data = root / "base", data_folder(root, task)
    if task.startswith(LINEAR):
        more = {"source_r": source_r, "mixed_precision": config["precision"]}
        run(HERE / "linear.py", model=base, data=data, output_dir=part, **more)
    else:
        if config.get("linear"):
            base = checkpoint(root, LINEAR + task, source_r, config["seeds"][0])
        more = {"source_r": source_r, "seed": seed, "eval_split": "validation"}
        train(config, config["finetuning"], base, data, part, **more)
    part.rename(folder)


def adapt(config: dict, root: Path, task: str) -> None:
    """The plugin set, distilled further on the backbone and the images of one task, for all checkpoints of it."""
    folder = plugins_folder(root, task, 0, 0)
    if (folder / CONFIG_NAME).exists():
        return
    as_distilled = {name: config["distillation"][name] for name in ("objective", "learning_rate")}
    run(
        "distill.py",
        model_name_or_path=root / "base",
        dataset_name=data_folder(root, task) / "train.parquet",
        init_plugins=root / "plugins",
        output_dir=folder,
        mixed_precision=config["precision"],
        **{**config["fitting"], **as_distilled},
    )


def fit(config: dict, root: Path, task: str, source_r: int, seed: int) -> None:
    """The plugin set, distilled further on one checkpoint at its own degree."""
    folder = plugins_folder(root, task, source_r, seed)
    if (folder / CONFIG_NAME).exists():
        return
    run(
        "distill.py",
        model_name_or_path=checkpoint(root, task, source_r, seed),
        dataset_name=data_folder(root, task) / "train.parquet",
        init_plugins=plugins_folder(root, checkpoint_name(task), source_r, seed),
        source_r=source_r,
        output_dir=folder,
        mixed_precision=config["precision"],
        **config["fitting"],
    )


def scale(config: dict, root: Path, task: str, source_r: int, seed: int) -> None:
    """The plugin set with a scale for every layer and plugin, fitted to one checkpoint on the images that other runs
    pick one scale on, without their labels."""
    folder = plugins_folder(root, task, source_r, seed)
    if (folder / CONFIG_NAME).exists():
        return
    run(
        "fit_scales.py",
        model_name_or_path=checkpoint(root, task, source_r, seed),
        plugins=plugins_folder(root, checkpoint_name(task), source_r, seed),
        dataset_name=data_folder(root, task) / "validation.parquet",
        output_dir=folder,
        **config["scale_fitting"],
    )


def evaluate(config: dict, root: Path, task: str, source_r: int, seed: int) -> None:
    """One row of the grid. Rows are joined by `tabulate`, from what every checkpoint made of every image."""
    folder = grid(root, task, source_r, seed)
    if (folder / "grid.json").exists():
        return
    run(
        "evaluate.py",
        checkpoints=checkpoint(root, task, source_r, seed),
        plugins=plugins_folder(root, task, source_r, seed),
        dataset_name=data_folder(root, task),
        target_r=config["degrees"],
        scales=config["scales"],
        fixed_scales=config.get("fixed_scales", []),
        mixed_precision=config["precision"],
        speed_rounds=config.get("speed_rounds", 0),
        output_dir=folder,
    )


def arithmetic(config: dict, root: Path, results: Path, seed: int) -> None:
    """Model arithmetic from the first task to the others, from the lowest degree to the highest."""
    source_r, target_r = min(config["degrees"]), max(config["degrees"])
    task_a, *others = config["tasks"]
    run(
        "model_arithmetic.py",
        target_a=checkpoint(root, task_a, target_r, seed),
        source_a=checkpoint(root, task_a, source_r, seed),
        source_b=[checkpoint(root, task, source_r, seed) for task in others],
        target_b=[checkpoint(root, task, target_r, seed) for task in others],
        dataset_name=[root / "data" / task for task in others],
        mixed_precision=config["precision"],
        output=results / f"arithmetic_seed{seed}.json",
    )


def tabulate(config: dict, root: Path, results: Path, tasks: list[str], seeds: list[int]) -> None:
    lines = [
        "| task | seeds | cells with a clear gap | mean gap | plain | ToCom (0.05 to 0.15) | gap closed "
        "| ToCom (up to 0.3) | gap closed | ToCom (no labels) | gap closed "
        "| cells below plain by more than one standard error |",
        "|---" * 12 + "|",
    ]
    changes = [
        "| task | change | plain (over the source degree) | trained at target (over plain) | ToCom (0.05 to 0.15) "
        "| ToCom (no labels) | sign flipped |",
        "|---" * 7 + "|",
    ]
    losses = [
        "| task | cells with a clear loss | mean loss there | won back, ToCom (0.05 to 0.15) | ToCom (up to 0.3) "
        "| ToCom (no labels) |",
        "|---" * 6 + "|",
    ]
    groups: dict[str, list[Cell]] = {}
    for task in tasks:
        paths = [grid(root, task, r, seed) / "grid.json" for seed in seeds for r in config["degrees"]]
        reports = [Report.load(path) for path in paths if path.exists()]
        if not reports:
            continue
        names = [name for report in reports for name in report.settings["checkpoints"]]
        plugins = ", ".join(
            dict.fromkeys(report.settings["plugins"] for report in reports if report.settings.get("plugins"))
        )
        settings = {**reports[0].settings, "dataset": task, "checkpoints": names, "plugins": plugins}
        joined = Report(settings, [run for report in reports for run in report.runs], reports[0].costs)
        joined.save(results / task)
        moved = [cell for cell in joined.cells if cell.compensated]
        if any(cell.gap is not None for cell in moved):  # a checkpoint was trained at the target degree
            lines.append(summary_line(task, max(cell.checkpoints for cell in joined.cells), joined.cells))
        losses.append(loss_line(task, moved))
        changes += [change_line(task, cell) for cell in moved]
        groups.setdefault(group_name(task), []).extend(moved)
        print(f"{task}\n{joined.markdown()}\n", flush=True)
    lines = [
        *([*lines, ""] if len(lines) > 2 else []),
        *losses,
        "",
        "| mean gain (cells below plain by more than one standard error) | cells | ToCom (0.05 to 0.15) "
        "| ToCom (up to 0.3) | ToCom (no labels) | sign flipped |",
        "|---" * 6 + "|",
        *(group_line(name, cells) for name, cells in groups.items()),
    ]
    (results / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (results / "changes.md").write_text("\n".join(changes) + "\n", encoding="utf-8")
    print("\n".join(lines))


def summary_line(task: str, seeds: int, cells: list[Cell]) -> str:
    """Means over the cells off the diagonal; the gap closed is that of the summed gains over the summed gaps, where
    these are more than twice their standard error."""
    moved = [cell for cell in cells if cell.compensated and cell.gap is not None and cell.gap_se is not None]
    clear = sum(cell.gap > 2 * cell.gap_se for cell in moved if cell.gap is not None and cell.gap_se is not None)
    error = math.sqrt(sum(cell.gap_se**2 for cell in moved if cell.gap_se is not None))
    texts = [f"{100 * mean(cell.plain for cell in moved):.1f}"]
    for method in METHODS:
        if not all(method in cell.compensated for cell in moved):
            texts += ["", ""]
            continue
        closed = gap_closed(moved, method)
        texts.append(f"{100 * mean(cell.compensated[method].accuracy for cell in moved):.1f}")
        texts.append(f"{100 * closed[0]:.0f} %" if closed and closed[1] > 2 * error else "no clear gap")
    worse = [
        f"{cell.source_r}→{cell.target_r} ({method})"
        for cell in moved
        for method in METHODS
        if method in cell.compensated and cell.compensated[method].gain < -cell.compensated[method].gain_se
    ]
    gap = f"{100 * mean(cell.gap for cell in moved):.1f}"
    texts = [task, str(seeds), f"{clear} of {len(moved)}", gap, *texts, ", ".join(worse) or "none"]
    return f"| {' | '.join(texts)} |"


def loss_line(task: str, cells: list[Cell]) -> str:
    """What changing the degree costs, and how much of that plugins win back."""
    clear = [cell.lost for cell in cells if clearly_lost(cell) and cell.lost is not None]
    texts = [task, f"{len(clear)} of {len(cells)}", f"{100 * mean(clear):.1f}" if clear else ""]
    for method in METHODS:
        share = won_back(cells, method) if all(method in cell.compensated for cell in cells) else None
        texts.append(f"{100 * share[0]:.0f} %" if share else "")
    return f"| {' | '.join(texts)} |"


def change_line(task: str, cell: Cell) -> str:
    """One cell off the diagonal: accuracies, gains over plain, what was lost and the gap, in per cent."""
    texts = [f"{100 * cell.plain:.1f}", ""]
    if cell.lost is not None and cell.lost_se is not None:
        texts[0] += f" ({-100 * cell.lost:+.1f} ± {100 * cell.lost_se:.1f})"
    if cell.trained is not None and cell.gap is not None and cell.gap_se is not None:
        texts[1] = f"{100 * cell.trained:.1f} ({100 * cell.gap:+.1f} ± {100 * cell.gap_se:.1f})"
    for method in ("paper", "unlabelled", "scale -0.1"):
        found = cell.compensated.get(method)
        texts.append(f"{100 * found.gain:+.1f} ± {100 * found.gain_se:.1f}" if found else "")
    return f"| `{task}` | {cell.source_r} to {cell.target_r} | {' | '.join(texts)} |"


def group_name(task: str) -> str:
    name = "heads" if checkpoint_name(task).startswith(LINEAR) else "fine-tuned"
    plugins = {FITTED: ", fitted plugins", SCALED: ", fitted scales", ADAPTED: ", adapted plugins"}
    return name + next((text for prefix, text in plugins.items() if task.startswith(prefix)), "")


def group_line(name: str, cells: list[Cell]) -> str:
    """Mean gain over plain, in points, and how often a method does harm, over the cells off the diagonal."""
    texts = [name, str(len(cells))]
    for method in (*METHODS, "scale -0.1"):
        found = [cell.compensated[method] for cell in cells if method in cell.compensated]
        below = sum(tocom.gain < -tocom.gain_se for tocom in found)
        texts.append(f"{100 * mean(tocom.gain for tocom in found):+.2f} ({below})" if found else "")
    return f"| {' | '.join(texts)} |"


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def checkpoint_name(task: str) -> str:
    """The task without what says which plugins its checkpoints get."""
    return task.removeprefix(FITTED).removeprefix(SCALED).removeprefix(ADAPTED)


def data_folder(root: Path, task: str) -> Path:
    return root / "data" / checkpoint_name(task).removeprefix(LINEAR)


def checkpoint(root: Path, task: str, source_r: int, seed: int) -> Path:
    return root / "checkpoints" / checkpoint_name(task) / f"r{source_r}-seed{seed}"


def plugins_folder(root: Path, task: str, source_r: int, seed: int) -> Path:
    for prefix, folder in ((FITTED, "fitted"), (SCALED, "scaled")):
        if task.startswith(prefix):
            return root / folder / checkpoint_name(task) / f"r{source_r}-seed{seed}"
    if task.startswith(ADAPTED):
        return root / "adapted" / data_folder(root, task).name
    own = root / "plugins" / f"r{source_r}"
    return own if own.exists() else root / "plugins"


def grid(root: Path, task: str, source_r: int, seed: int) -> Path:
    return root / "grids" / task / f"r{source_r}-seed{seed}"


def run(script: str | Path, **arguments: Any) -> None:
    """Run a script of `examples/`, or of another folder, and stop where it fails."""
    command = [sys.executable, str(EXAMPLES / script)]
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        if value is not None and values:
            command += [f"--{name}", *map(str, values)]
    print("$ python " + " ".join([os.path.relpath(command[1]), *command[2:]]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    args = parse_args()
    config, root = json.loads(args.config.read_text(encoding="utf-8")), args.output_dir
    override(config, args.set)
    config["degrees"] = args.degrees or config["degrees"]
    models = [LINEAR, ""] if config.get("linear") else [""]
    sets = ["", FITTED] if "fitting" in config else [""]
    tasks = [plugins + model + task for task in config["tasks"] for model in models for plugins in sets]
    tasks, seeds = args.tasks or tasks, args.seeds or config["seeds"]
    model = args.model or config["model"]
    if "data" in args.stages:
        make_data(config, root / "data", tasks)
    if "base" in args.stages:
        make_base(config, model, root / "base")
    if "distil" in args.stages:
        distil(config, root)
    for seed in seeds:
        for task in tasks:
            for source_r in args.source_r or config["degrees"]:
                if checkpoint_name(task).startswith(LINEAR) and seed != config["seeds"][0]:
                    continue  # nothing about them is random
                if "finetune" in args.stages and task == checkpoint_name(task):
                    finetune(config, root, task, source_r, seed)
                if "fit" in args.stages and task.startswith(FITTED):
                    fit(config, root, task, source_r, seed)
                if "fit" in args.stages and task.startswith(SCALED):
                    scale(config, root, task, source_r, seed)
                if "fit" in args.stages and task.startswith(ADAPTED):
                    adapt(config, root, task)
                if "evaluate" in args.stages:
                    evaluate(config, root, task, source_r, seed)
    results = args.results_dir or root / "results"
    if "arithmetic" in args.stages:
        for seed in seeds:
            arithmetic(config, root, results, seed)
    if "tabulate" in args.stages:
        tabulate(config, root, results, tasks, seeds)


if __name__ == "__main__":
    main()
