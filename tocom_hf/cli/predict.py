# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Predict the labels of all images of a data set, or the features that a model without a head has of them.

    tocom predict --model_name_or_path deit-food101 --plugins tocom-deit-base --source_r 0 --target_r 8 \\
        --dataset_name food101 --dataset_split validation --keep_columns label=true_label --output predictions

It writes parquet files, one after the other, and shows how many rows a second it does. It may be stopped or killed at
any time: the same command goes on behind the last file, without a row lost or doubled. Data sets larger than the
disk are read as they come with --streaming. Several machines, or several devices of one, share the work when each
gets a --shard_index of its own and all the same --num_shards and --output.

Without plugins the model merges alone. It may be an export of `tocom export`, which runs in its own runtime.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import unmasked
from tocom_hf.cli.samples import SampleKind
from tocom_hf.errors import ArgumentError


if TYPE_CHECKING:
    from tocom_hf.prediction.backends import Backend

COMMAND = "tocom predict"
# what a shell shows for a program that SIGINT has ended
INTERRUPTED = 128 + 2
DTYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument(
        "--model_name_or_path", required=True, help="Checkpoint: Hub id or folder; or a folder of `tocom export`."
    )
    parser.add_argument(
        "--plugins", help="Plugin set: Hub id or folder; default: what the checkpoint brings, else merge alone."
    )
    parser.add_argument("--source_r", type=int, help="The degree of the checkpoint, if it does not record it.")
    parser.add_argument("--target_r", type=int, required=True, help="The degree to run at.")
    parser.add_argument("--scale", type=float, help="Strength of the plugins; default: what the set recommends.")
    parser.add_argument("--dtype", choices=DTYPES, help="Of weights and inputs; default: float32.")
    parser.add_argument("--device", help="Where to run, such as cuda:1; default: an accelerator if there is one.")
    parser.add_argument("--threads", type=positive_integer, help="Threads of the model on a CPU.")
    parser.add_argument("--dataset_name", required=True, help="Hub name, folder of images, or parquet file.")
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    parser.add_argument("--dataset_split", default="train", help="Split to predict; default: %(default)s.")
    parser.add_argument(
        "--image_column", default="image", help="Column of the images, or of the clips: lists of images, or videos."
    )
    parser.add_argument(
        "--keep_columns",
        nargs="+",
        default=[],
        metavar="COLUMN[=NAME]",
        help="Columns of the data set to write beside the predictions, under another name if one is given.",
    )
    parser.add_argument("--streaming", action="store_true", help="Read rows as they come, without downloading all.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the parquet files.")
    parser.add_argument("--batch_size", type=positive_integer, default=32, help="Rows of a forward pass.")
    parser.add_argument(
        "--rows_per_part",
        type=positive_integer,
        default=10_000,
        help="Rows of a file, which is written after five minutes anyhow; default: %(default)s.",
    )
    parser.add_argument("--top_k", type=positive_integer, default=5, help="Labels of a row; default: %(default)s.")
    parser.add_argument(
        "--skip_damaged", action="store_true", help="Give damaged images the reason instead of a label, and go on."
    )
    parser.add_argument("--num_workers", type=positive_integer, default=4, help="Threads that read and decode images.")
    parser.add_argument("--num_shards", type=positive_integer, default=1, help="Commands that share the data set.")
    parser.add_argument("--shard_index", type=int, default=0, help="Which of them this is, from 0 on.")
    args = parser.parse_args(argv)
    if not 0 <= args.shard_index < args.num_shards:
        parser.error(f"--shard_index must be one of 0 to {args.num_shards - 1}, got {args.shard_index}")
    return args


def is_export(args: argparse.Namespace) -> bool:
    """Whether the model is a folder that `tocom export` wrote."""
    from tocom_hf.deployed.manifest import MANIFEST

    return (Path(args.model_name_or_path) / MANIFEST).is_file()


def load_export(args: argparse.Namespace) -> "tuple[Backend, dict[str, Any]]":
    """The export at its degree, and what is to be recorded of it."""
    from tocom_hf.deployed.exported import ExportedTocom
    from tocom_hf.prediction.backends import ExportBackend

    for name in ("plugins", "source_r", "scale", "dtype"):
        if getattr(args, name) is not None:
            raise ArgumentError(f"{args.model_name_or_path} is an export, which has its own: leave --{name} out.")
    exported = ExportedTocom(args.model_name_or_path, args.target_r, device=args.device, threads=args.threads)
    backend = ExportBackend(exported, args.model_name_or_path, args.image_column)
    return backend, {"format": exported.manifest["format"], "dtype": exported.manifest["dtype"]}


def load_transformers_model(args: argparse.Namespace) -> Any:
    """The model at its degree: with its plugins where there are any, else merging alone."""
    import torch

    from tocom_hf.merging.patching import apply_tome
    from tocom_hf.model.loading import open_checkpoint
    from tocom_hf.model.tocom_model import TocomModel

    dtype = getattr(torch, args.dtype or "float32")
    config = open_checkpoint(args.model_name_or_path, {}).config
    arguments = {"dtype": dtype, **unmasked(config)}
    if args.plugins is None and args.source_r is None and not getattr(config, "tocom", None):
        if args.scale is not None:
            raise ArgumentError("--scale is the strength of plugins, and the model has none. Pass --plugins.")
        opened = open_checkpoint(args.model_name_or_path, arguments)
        model = opened.checkpoint.load(opened.model_class, opened.config, opened.arguments)
        return apply_tome(model.eval(), args.target_r)
    return TocomModel.from_pretrained(
        args.model_name_or_path,
        plugins=args.plugins,
        source_r=args.source_r,
        target_r=args.target_r,
        scale=args.scale,
        **arguments,
    )


def load_rows(args: argparse.Namespace, kind: SampleKind, columns: Sequence[str]) -> Any:
    """The data set, with the column of the images and those to keep."""
    return kind.load(
        args.dataset_name,
        split=args.dataset_split,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        keep_columns=columns,
        streaming=args.streaming,
    )


def names_of(columns: Sequence[str]) -> dict[str, str]:
    """The columns to keep, and what they shall be called, from `COLUMN` or `COLUMN=NAME`."""
    names = {}
    for column in columns:
        name, _, given = column.partition("=")
        names[name] = given or name
    return names


def predict_rows(args: argparse.Namespace) -> None:
    import torch

    from tocom_hf.cli.calibrate import measuring_device
    from tocom_hf.prediction.backends import ModelBackend
    from tocom_hf.prediction.parts import open_parts
    from tocom_hf.prediction.predict import Options, predict, result_features
    from tocom_hf.prediction.rows import read_rows

    keep = names_of(args.keep_columns)
    if args.threads:
        torch.set_num_threads(args.threads)
    backend: Backend
    if is_export(args):
        backend, recorded = load_export(args)
        kind = SampleKind(3)
        dataset = load_rows(args, kind, [*keep])
    else:
        device = measuring_device(args.device)
        model = load_transformers_model(args)
        kind = SampleKind.of(model.config, args.model_name_or_path)
        processor = kind.load_processor(args.model_name_or_path)
        dataset = load_rows(args, kind, [*keep])
        read = kind.reader(dataset, processor, args.image_column)
        backend = ModelBackend(model, read, processor, device)
        recorded = {
            "plugins": args.plugins,
            "source_r": getattr(model, "source_r", None),
            "scale": args.scale,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    rows = read_rows(dataset, args.image_column, args.num_shards, args.shard_index)
    options = Options(
        image_column=args.image_column,
        keep=keep,
        batch_size=args.batch_size,
        rows_per_part=args.rows_per_part,
        top_k=args.top_k,
        skip_damaged=args.skip_damaged,
        num_workers=args.num_workers,
        noun=kind.noun,
    )
    result_features(backend, rows.features, options)
    settings = {
        "model": args.model_name_or_path,
        "model_fingerprint": backend.fingerprint,
        "target_r": args.target_r,
        **recorded,
        "dataset": args.dataset_name,
        "dataset_config": args.dataset_config_name,
        "split": args.dataset_split,
        "streaming": args.streaming,
        "dataset_rows": None if args.streaming else len(dataset),
        "image_column": args.image_column,
        "keep_columns": keep,
        "top_k": args.top_k,
        "num_shards": args.num_shards,
    }
    with open_parts(args.output, settings, args.num_shards, args.shard_index) as parts:
        summary = predict(backend, rows, parts, options)
    print(f"{summary}. Written to {args.output.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run_command(COMMAND, parse_args, predict_rows, argv)
    except KeyboardInterrupt:
        print(f"{COMMAND}: stopped; the same command goes on from the last file that was written.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
