# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure fine-tuned checkpoints over a grid of degrees: plain merging, ToCom, and training at the target degree.

Checkpoints of the same source degree count as seeds of one experiment, those of other source degrees as what training
at the target reaches. The scale is picked on the validation split, by its labels and, apart from that, without them.

    accelerate launch examples/evaluate.py --checkpoints cub-r0 cub-r8 cub-r16 --plugins tocom-deit-base \\
        --dataset_name cub-200 --target_r 0 8 16 --output_dir results/cub-200

`--dataset_name` takes a name of `tocom_hf.data.tasks.TASKS` (cifar-100, cub-200, cars, dogs, flowers,
vtab-1k/svhn, ...), a Hub name, a folder of images or of parquet files, or a parquet file.
"""

import argparse
import datetime
import platform
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import default_collate
from transformers import AutoImageProcessor, PreTrainedConfig

from tocom_hf import ArgumentError, DatasetError, PluginSet, TocomModel
from tocom_hf.data.images import with_pixel_values
from tocom_hf.data.tasks import load_labelled, require_disjoint
from tocom_hf.evaluation.grid import evaluate_checkpoint
from tocom_hf.evaluation.reports import Report, measure_costs
from tocom_hf.plugins.composition import require_scale
from tocom_hf.scales.choice import WIDE_SCALES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--target_r", type=int, nargs="+", required=True, help="Degrees to run at.")
    parser.add_argument("--scales", type=float, nargs="+", default=WIDE_SCALES, help="Scales to pick from.")
    parser.add_argument(
        "--fixed_scales", type=float, nargs="*", default=(), help="Scales to report too, negative for a flipped sign."
    )
    parser.add_argument("--per_device_eval_batch_size", type=int, default=100)
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Worker processes that load images, for each process."
    )
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's.")
    parser.add_argument("--speed_rounds", type=int, default=5, help="Rounds of timing; 0 for none.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for table, CSV, JSON and plots.")
    return parser.parse_args()


def load_split(args: argparse.Namespace, split: str):
    dataset, _ = load_labelled(
        args.dataset_name,
        split,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
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


def require_classes(dataset: datasets.Dataset, split: str, config: PreTrainedConfig, checkpoint: str) -> None:
    """Check that the labels of a split mean what they mean to a checkpoint."""
    highest = max(dataset["label"])
    if highest >= config.num_labels:
        raise DatasetError(
            f"The {split} split has the label {highest}, but {checkpoint} knows {config.num_labels} classes."
        )
    names = getattr(dataset.features["label"], "names", None) or []
    known = [config.id2label[index] for index in range(config.num_labels)]
    if names != known and sorted(names) == sorted(known):
        index = next(i for i, (name, own) in enumerate(zip(names, known, strict=True)) if name != own)
        raise DatasetError(
            f"The classes of the {split} split are those of {checkpoint} in another order: {index} is {names[index]!r} "
            f"there and {known[index]!r} to the checkpoint. Bring the data set into its order with "
            "dataset.align_labels_with_mapping(config.label2id, 'label')."
        )


def require_folder(path: Path) -> None:
    """Make the folder of the results, before there are any that could be lost."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"The folder {path} cannot be made: {error}. Choose another --output_dir.") from error


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    degrees = sorted(set(args.target_r))
    for scale in (*args.scales, *args.fixed_scales):
        require_scale(scale)
    source_rs = for_each(args.checkpoints, args.source_r or [None], "--source_r")
    sets = {name: PluginSet.from_pretrained(name) for name in args.plugins}
    plugins = for_each(args.checkpoints, [sets[name] for name in args.plugins] or [None], "--plugins")

    with accelerator.main_process_first():
        test = load_split(args, args.test_split)
        validation = load_split(args, args.validation_split) if args.plugins else None
    one_source = args.validation_split.partition("[")[0] == args.test_split.partition("[")[0]
    if validation is not None and (one_source or Path(args.dataset_name).is_file()):
        require_disjoint(validation, test)

    def load(index: int) -> TocomModel:
        return TocomModel.from_pretrained(
            args.checkpoints[index], plugins=plugins[index], source_r=source_rs[index], dtype=torch.float32
        )

    processors = [AutoImageProcessor.from_pretrained(checkpoint) for checkpoint in args.checkpoints]
    splits = {"test": test} if validation is None else {"test": test, "validation": validation}
    for index, checkpoint in enumerate(args.checkpoints):  # before the first of them runs; one at a time in memory
        model = load(index)
        for split, dataset in splits.items():
            require_classes(dataset, split, model.config, checkpoint)
        for degree in degrees if model.plugins is not None else ():
            model.plugins.compose(model.source_r, degree)

    require_folder(args.output_dir)

    runs, costs = [], []
    for index, checkpoint in enumerate(args.checkpoints):
        model = load(index)
        processed = [
            data and with_pixel_values(data, processors[index], label_column="label") for data in (test, validation)
        ]
        runs += evaluate_checkpoint(
            model,
            Path(checkpoint).name,
            degrees,
            *processed,
            scales=args.scales,
            fixed_scales=args.fixed_scales,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            accelerator=accelerator,
        )
        if not costs and accelerator.is_main_process:
            batch = default_collate([processed[0][i] for i in range(min(len(test), args.per_device_eval_batch_size))])
            with accelerator.autocast(), torch.no_grad():
                pixel_values = batch["pixel_values"].to(accelerator.device)
                costs = measure_costs(model, degrees, pixel_values, args.speed_rounds)
        for run in runs[-len(degrees) :]:
            picked = "".join(f", scale {s:g} {run.at_scale[s].double().mean():.2%}" for s in set(run.picked.values()))
            accelerator.print(
                f"{run.checkpoint}: r {run.source_r} -> {run.target_r}: plain {run.plain.double().mean():.2%}{picked}"
            )
    if accelerator.is_main_process:
        settings = {
            "dataset": args.dataset_name,
            "test": f"{args.test_split}, {len(test)} images",
            "validation": f"{args.validation_split}, {len(validation)} images" if validation is not None else None,
            "checkpoints": [Path(checkpoint).name for checkpoint in args.checkpoints],
            "plugins": ", ".join(Path(name).name for name in args.plugins) or None,
            "scales": list(args.scales),
            "precision": accelerator.mixed_precision,
            "batch_size": args.per_device_eval_batch_size,
            "processes": accelerator.num_processes,
            "device": device_name(accelerator.device),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        report = Report(settings, runs, costs)
        report.save(args.output_dir)
        print(report.markdown())
        print(f"Written to {args.output_dir.resolve()}")
    accelerator.end_training()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
