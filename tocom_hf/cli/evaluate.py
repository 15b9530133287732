# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure fine-tuned checkpoints over a grid of degrees: plain merging, ToCom, and training at the target degree.

Checkpoints of the same source degree count as seeds of one experiment, those of other source degrees as what training
at the target reaches. The scale is picked on the validation split, by its labels and, apart from that, without them.

    tocom evaluate --checkpoints cub-r0 cub-r8 cub-r16 --plugins tocom-deit-base --dataset_name cub-200 \\
        --target_r 0 8 16 --output_dir results/cub-200

The classes of the data set are matched with those of each checkpoint by their names. Checkpoints of video classify
clips: rows that are lists of images, or videos.

`--dataset_name` takes a name of `tocom_hf.data.tasks.TASKS` (cifar-100, cub-200, cars, dogs, flowers,
vtab-1k/svhn, ...), a Hub name, a folder of images or of parquet files, or a parquet file. On several devices:
`accelerate launch -m tocom_hf.cli.evaluate` with the same options.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import load_config, make_accelerator
from tocom_hf.cli.samples import SampleKind, one_kind
from tocom_hf.errors import ArgumentError


if TYPE_CHECKING:
    import datasets
    import torch

    from tocom_hf.model.tocom_model import TocomModel
    from tocom_hf.plugins.plugin_set import PluginSet

COMMAND = "tocom evaluate"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--checkpoints", nargs="+", required=True, help="Hub ids or folders of fine-tuned classifiers.")
    parser.add_argument(
        "--source_r",
        type=int,
        nargs="+",
        help="Degree of each checkpoint that does not record it; one value is for all.",
    )
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        help="Hub id or folder of the plugin set, or of one for each checkpoint. Default: plain merging only.",
    )
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    parser.add_argument("--validation_split", default="validation", help="Where the scale is picked.")
    parser.add_argument("--test_split", default="test", help="Where accuracy is measured.")
    parser.add_argument(
        "--image_column", default="image", help="Column of the images, or of the clips: lists of images, or videos."
    )
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--target_r", type=int, nargs="+", required=True, help="Degrees to run at.")
    parser.add_argument(
        "--scales", type=float, nargs="+", help="Scales to pick from; default: tocom_hf.scales.choice.WIDE_SCALES."
    )
    parser.add_argument(
        "--fixed_scales", type=float, nargs="*", default=(), help="Scales to report too, negative for a flipped sign."
    )
    parser.add_argument("--per_device_eval_batch_size", type=positive_integer, default=100)
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Worker processes that load data, for each process."
    )
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's.")
    parser.add_argument("--speed_rounds", type=int, default=5, help="Rounds of timing; 0 for none.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for table, CSV, JSON and plots.")
    return parser.parse_args(argv)


def load_split(args: argparse.Namespace, kind: SampleKind, split: str) -> "datasets.Dataset":
    from tocom_hf.data.tasks import load_labelled

    dataset, _ = load_labelled(
        args.dataset_name,
        split,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
        load=kind.load,
    )
    return dataset


def for_each(checkpoints: list, values: list, option: str) -> list:
    """One value for each checkpoint, from one for all or one for each."""
    if len(values) not in (1, len(checkpoints)):
        raise ArgumentError(
            f"There are {len(checkpoints)} checkpoints and {len(values)} values of {option}; give one for all or one "
            "for each."
        )
    return values * len(checkpoints) if len(values) == 1 else values


def find_kinds(checkpoints: Sequence[str]) -> list[SampleKind]:
    """Look at what the checkpoints are, and whether they take images or clips, before any data are loaded."""
    from tocom_hf.evaluation.classifiers import require_classifier
    from tocom_hf.model.loading import model_class_of

    kinds = []
    for checkpoint in checkpoints:
        config = load_config(checkpoint)
        require_classifier(config, model_class_of(config).__name__, checkpoint)
        kinds.append(SampleKind.of(config, checkpoint))
    one_kind(dict(zip(checkpoints, kinds, strict=True)))
    return kinds


def require_folder(path: Path) -> None:
    """Make the folder of the results, before there are any that could be lost."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"The folder {path} cannot be made: {error}. Choose another --output_dir.") from error


def load_checkpoint(args: argparse.Namespace, plugins: "list[PluginSet | None]", index: int) -> "TocomModel":
    """The checkpoint with this index, at its source degree."""
    import torch

    from tocom_hf.model.tocom_model import TocomModel

    source_rs = for_each(args.checkpoints, args.source_r or [None], "--source_r")
    return TocomModel.from_pretrained(
        args.checkpoints[index], plugins=plugins[index], source_r=source_rs[index], dtype=torch.float32
    )


def open_plugins(args: argparse.Namespace) -> "list[PluginSet | None]":
    """The plugin set of each checkpoint, or `None`."""
    from tocom_hf.plugins.plugin_set import PluginSet

    sets = {name: PluginSet.from_pretrained(name) for name in args.plugins}
    named = [sets[name] for name in args.plugins]
    return for_each(args.checkpoints, named or [None], "--plugins")


def load_splits(args: argparse.Namespace, kind: SampleKind) -> "dict[str, datasets.Dataset]":
    """The test split, and with plugins the validation split, which may not share samples."""
    from tocom_hf.data.tasks import require_disjoint

    splits = {"test": load_split(args, kind, args.test_split)}
    if args.plugins:
        splits["validation"] = load_split(args, kind, args.validation_split)
    one_source = args.validation_split.partition("[")[0] == args.test_split.partition("[")[0]
    if args.plugins and (one_source or Path(args.dataset_name).is_file()):
        require_disjoint(splits["validation"], splits["test"])
    return splits


def require_runnable(
    args: argparse.Namespace, plugins: "list[PluginSet | None]", splits: "dict[str, datasets.Dataset]"
) -> None:
    """Look at every checkpoint before the first of them runs, one at a time in memory."""
    from tocom_hf.data.labels import match_labels

    for index in range(len(args.checkpoints)):
        model = load_checkpoint(args, plugins, index)
        for dataset in splits.values():
            match_labels(dataset, model.config)
        if model.plugins is None:
            continue
        for degree in args.target_r:
            model.plugins.require(model.source_r, degree)


def evaluate(args: argparse.Namespace) -> None:
    import torch
    from torch.utils.data import default_collate

    from tocom_hf.cost.flops import Example
    from tocom_hf.cost.timing import measure_costs
    from tocom_hf.data.labels import match_labels
    from tocom_hf.evaluation.grid import evaluate_checkpoint
    from tocom_hf.evaluation.reports import Report
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.plugins.composition import require_scale
    from tocom_hf.scales.choice import WIDE_SCALES

    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    degrees = sorted(set(args.target_r))
    scales = list(args.scales or WIDE_SCALES)
    for scale in (*scales, *args.fixed_scales):
        require_scale(scale)
    for_each(args.checkpoints, args.source_r or [None], "--source_r")
    kinds = find_kinds(args.checkpoints)
    plugins = open_plugins(args)
    named_kinds = zip(args.checkpoints, kinds, strict=True)
    processors = [kind.load_processor(checkpoint) for checkpoint, kind in named_kinds]
    with accelerator.main_process_first():
        splits = load_splits(args, kinds[0])
    require_runnable(args, plugins, splits)
    require_folder(args.output_dir)

    runs: list[Any] = []
    costs: list[Any] = []
    for index, checkpoint in enumerate(args.checkpoints):
        model = load_checkpoint(args, plugins, index)
        processed = {
            name: kinds[index].process(
                match_labels(split, model.config), processors[index], image_column="image", label_column="label"
            )
            for name, split in splits.items()
        }
        runs += evaluate_checkpoint(
            model,
            Path(checkpoint).name,
            degrees,
            processed["test"],
            processed.get("validation"),
            scales=scales,
            fixed_scales=args.fixed_scales,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            accelerator=accelerator,
        )
        if not costs and accelerator.is_main_process:
            count = min(len(splits["test"]), args.per_device_eval_batch_size)
            batch = default_collate([processed["test"][i] for i in range(count)])
            with accelerator.autocast(), torch.no_grad():
                pixel_values = batch["pixel_values"].to(accelerator.device)
                example = Example(find_backbone(model), model, pixel_values)
                costs = measure_costs(example, degrees, rounds=args.speed_rounds)
        for run in runs[-len(degrees) :]:
            picked = "".join(f", scale {s:g} {run.at_scale[s].double().mean():.2%}" for s in set(run.picked.values()))
            accelerator.print(
                f"{run.checkpoint}: r {run.source_r} -> {run.target_r}: plain {run.plain.double().mean():.2%}{picked}"
            )
    if accelerator.is_main_process:
        report = Report(settings_of(args, kinds[0], splits, scales, accelerator), runs, costs)
        report.save(args.output_dir)
        print(report.markdown())
        print(f"Written to {args.output_dir.resolve()}")
    accelerator.end_training()


def settings_of(
    args: argparse.Namespace,
    kind: SampleKind,
    splits: "dict[str, datasets.Dataset]",
    scales: list[float],
    accelerator: Any,
) -> dict[str, Any]:
    """What the report records about the run."""
    import torch

    validation = None
    if "validation" in splits:
        validation = f"{args.validation_split}, {len(splits['validation'])} {kind.noun}"
    return {
        "dataset": args.dataset_name,
        "samples": kind.noun,
        "test": f"{args.test_split}, {len(splits['test'])} {kind.noun}",
        "validation": validation,
        "checkpoints": [Path(checkpoint).name for checkpoint in args.checkpoints],
        "plugins": ", ".join(Path(name).name for name in args.plugins) or None,
        "scales": scales,
        "precision": accelerator.mixed_precision,
        "batch_size": args.per_device_eval_batch_size,
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, evaluate, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
