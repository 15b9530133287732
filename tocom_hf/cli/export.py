# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Write a model as graphs for ONNX Runtime or OpenVINO, one for each degree, around one copy of its weights.

    tocom export deit-food101 exported --plugins tocom-deit-base --source_r 0 --degrees 0 8 16

`tocom_hf.ExportedTocom("exported")` runs it without torch and transformers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import load_processor


COMMAND = "tocom export"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a checkpoint.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="Where to write; an earlier export is replaced.")
    parser.add_argument(
        "--plugins", help="Plugin set: Hub id or folder; default: what the checkpoint brings, else merge alone."
    )
    parser.add_argument("--source_r", type=int, help="The degree of the checkpoint, if it does not record it.")
    parser.add_argument("--scale", type=float, help="Strength of the plugins; default: what the set recommends.")
    parser.add_argument("--format", choices=["onnx", "openvino", "torch"], default="onnx")
    parser.add_argument("--degrees", type=int, nargs="+", default=[0, 4, 8, 12, 16], help="Default: %(default)s.")
    parser.add_argument("--standalone", action="store_true", help="Graphs that run without this package.")
    parser.add_argument("--one_image", action="store_true", help="Graphs that take a single image, not any number.")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--processor", help='Hub id or folder; default: that of the model; "" for none.')
    return parser.parse_args(argv)


def load_exportable(args: argparse.Namespace) -> Any:
    """The model: with its plugins where there are any, else the transformers model, which merges alone."""
    from tocom_hf.model.loading import open_checkpoint
    from tocom_hf.model.tocom_model import TocomModel

    opened = open_checkpoint(args.model, {})
    if hasattr(opened.config, "mask_ratio"):  # a masked autoencoder drops patches at random
        opened.config.mask_ratio = 0.0
    if args.plugins is None and args.source_r is None and not getattr(opened.config, "tocom", None):
        return opened.checkpoint.load(opened.model_class, opened.config, opened.arguments).eval()
    return TocomModel.from_pretrained(args.model, plugins=args.plugins, source_r=args.source_r, scale=args.scale)


def find_processor(args: argparse.Namespace, model: Any) -> Any:
    """The image processor to export: the one asked for, that of the model if it has one, or `False`."""
    from tocom_hf.errors import ArgumentError
    from tocom_hf.merging.backbones import find_backbone

    if args.processor is not None:
        return load_processor(args.processor) if args.processor else False
    path = getattr(model, "_tocom_path", None)
    if find_backbone(model, path).architecture.inputs != "images":
        return False
    try:
        return load_processor(args.model)
    except ArgumentError as error:
        print(f"Exporting without an image processor. {error}", file=sys.stderr)
        return False


def export_checkpoint(args: argparse.Namespace) -> None:
    from tocom_hf.exporting.export import export, require_packages

    require_packages(args.format, COMMAND)
    model = load_exportable(args)
    folder = export(
        model,
        args.folder,
        format=args.format,
        degrees=args.degrees,
        standalone=args.standalone,
        dynamic_batch=not args.one_image,
        dtype=args.dtype,
        processor=find_processor(args, model),
    )
    print(describe(folder))


def describe(folder: Path) -> str:
    """What was written, as a table of degrees."""
    from tocom_hf.deployed.manifest import ExportedFolder

    manifest = ExportedFolder(folder).manifest
    lines = [f"{'degree':>6}  {'tokens at the end':>17}  {'GFLOPs':>8}  {'deviation':>9}"]
    for degree, entry in manifest["degrees"].items():
        tokens, gflops = entry["tokens"][-1], entry["gflops"]
        lines.append(f"{degree:>6}  {tokens:>17}  {gflops:>8.3f}  {entry['deviation']:>9.1e}")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    lines.append(f"{size / 2**20:.1f} MiB in {folder.resolve()}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, export_checkpoint, argv)


if __name__ == "__main__":
    sys.exit(main())
