# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Does the change of a degree carry over between tasks? The evidence behind plugins (ToCom, section 3.1, eq. 1).

A model of task B that was trained at degree n runs at degree m: as it is, and after the difference between two models
of another task A, trained at m and at n, has been added to its backbone: `M_m^A - M_n^A + M_n^B`.

    accelerate launch examples/model_arithmetic.py --target_a cifar-r16 --source_a cifar-r0 \\
        --source_b cub-r0 cars-r0 --dataset_name cub-200 cars --output results/arithmetic.json

The checkpoints must record their degrees, as those of examples/finetune.py do. With --target_b, checkpoints of task B
that were trained at m stand beside them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from tocom_hf import ArgumentError, TocomModel
from tocom_hf.cli.endings import CommandParser, extras_or_exit, run_command
from tocom_hf.cli.loading import load_config, load_model, load_processor, make_accelerator
from tocom_hf.merging.backbones import find_backbone


COMMAND = "model_arithmetic.py"

with extras_or_exit(COMMAND):
    from tocom_hf.data.images import with_pixel_values
    from tocom_hf.data.labels import match_labels
    from tocom_hf.data.tasks import load_labelled
    from tocom_hf.evaluation.grid import estimate, evaluate_checkpoint


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--target_a", required=True, help="M_m^A: task A, trained at the degree to run at.")
    parser.add_argument("--source_a", required=True, help="M_n^A: task A, trained at the degree of --source_b.")
    parser.add_argument("--source_b", nargs="+", required=True, help="M_n^B: one checkpoint for each task B.")
    parser.add_argument("--target_b", nargs="*", default=(), help="M_m^B: one for each task B, for comparison.")
    parser.add_argument("--dataset_name", nargs="+", required=True, help="Data set of each task B.")
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    parser.add_argument("--test_split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=100)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures.")
    return parser.parse_args(argv)


def recorded_r(checkpoint: str) -> int:
    recorded = getattr(load_config(checkpoint), "tocom", None)
    if not recorded:
        raise ArgumentError(f"{checkpoint} does not record its degree. Fine-tune it with examples/finetune.py.")
    return recorded["source_r"]


def load(checkpoint: str) -> PreTrainedModel:
    return load_model(AutoModelForImageClassification, checkpoint, dtype=torch.float32)


@torch.no_grad()
def add_difference(model: PreTrainedModel, target: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """Add `target - source` to the backbone of a model, in place; heads belong to their tasks and stay."""
    target_weights = find_backbone(target).module.state_dict()
    source_weights = find_backbone(source).module.state_dict()
    for name, weight in find_backbone(model).module.state_dict().items():
        if weight.is_floating_point():
            difference = target_weights[name].double() - source_weights[name].double()
            weight.copy_(weight.double() + difference)
    return model


def add_and_measure(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    if len(args.dataset_name) != len(args.source_b) or len(args.target_b) not in (0, len(args.source_b)):
        raise ArgumentError(
            f"There are {len(args.source_b)} checkpoints of task B, {len(args.target_b)} of it trained at the target, "
            f"and {len(args.dataset_name)} data sets; give as many of each."
        )
    if args.output.is_dir():
        raise ArgumentError(f"--output {args.output} is a folder; expected the JSON file to write.")
    source_r, target_r = recorded_r(args.source_a), recorded_r(args.target_a)
    for checkpoint, wanted in [(c, source_r) for c in args.source_b] + [(c, target_r) for c in args.target_b]:
        if recorded_r(checkpoint) != wanted:
            raise ArgumentError(f"{checkpoint} was trained at r = {recorded_r(checkpoint)}, expected r = {wanted}.")

    rows = []
    for index, (checkpoint, name) in enumerate(zip(args.source_b, args.dataset_name, strict=True)):
        with accelerator.main_process_first():
            images, _ = load_labelled(
                name,
                args.test_split,
                config_name=args.dataset_config_name,
                image_column=args.image_column,
                label_column=args.label_column,
            )
        images = match_labels(images, load_config(checkpoint))
        test = with_pixel_values(images, load_processor(checkpoint), label_column="label")

        def right(model: TocomModel, test=test) -> torch.Tensor:
            run, *_ = evaluate_checkpoint(
                model, "", [target_r], test, None, batch_size=args.per_device_eval_batch_size, accelerator=accelerator
            )
            return run.plain.double()

        plain = right(TocomModel.from_pretrained(load(checkpoint)))
        arithmetic = add_difference(load(checkpoint), load(args.target_a), load(args.source_a))
        del arithmetic.config.tocom  # no longer a model of the source degree
        moved = right(TocomModel.from_pretrained(arithmetic, source_r=target_r))
        figures = {"plain": estimate(plain), "arithmetic": estimate(moved), "gain": estimate(moved - plain)}
        if args.target_b:
            figures["trained_at_target"] = estimate(right(TocomModel.from_pretrained(load(args.target_b[index]))))
        rows.append({"dataset": Path(name).name, "images": len(plain), **figures})
    if accelerator.is_main_process:
        m, n = target_r, source_r
        print(f"| task B at r = {m} | M_{n}^B | M_{m}^A - M_{n}^A + M_{n}^B | gain | M_{m}^B |")
        print("|---|---|---|---|---|")
        for row in rows:
            names = ("plain", "arithmetic", "gain", "trained_at_target")
            cells = [f"{100 * row[k][0]:.1f} ± {100 * row[k][1]:.1f}" if k in row else "" for k in names]
            print(f"| {row['dataset']} | {' | '.join(cells)} |")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"source_a": args.source_a, "target_a": args.target_a, "source_r": n, "target_r": m, "rows": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, add_and_measure, argv)


if __name__ == "__main__":
    sys.exit(main())
