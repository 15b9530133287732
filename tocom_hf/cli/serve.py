# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Serve an image classifier that merges more tokens when the load rises, to hold a latency objective.

    pip install 'tocom-hf[serve]'
    tocom serve --model_name_or_path deit-food101 --plugins tocom-deit-base --latency_ms 200
    curl --data-binary @image.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/metrics

One model stays in memory. Requests that arrive while it is busy form the next batch, whose degree is picked from the
length of the queue.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom_hf.cli.endings import CommandParser, positive_integer, run_command
from tocom_hf.cli.loading import find_device, load_processor
from tocom_hf.errors import ArgumentError


COMMAND = "tocom serve"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Fine-tuned checkpoint: Hub id or folder.")
    parser.add_argument(
        "--plugins", help='Hub id or folder; by default or with "" those that a checkpoint saved by TocomModel brings.'
    )
    parser.add_argument("--source_r", type=int, help="Default: what the checkpoint records.")
    parser.add_argument("--degrees", type=int, nargs="+", help="Degrees to choose from; default: the set's.")
    parser.add_argument("--latency_ms", type=float, default=200, help="Objective for the time to an answer.")
    parser.add_argument("--max_batch_size", type=positive_integer, default=32)
    parser.add_argument("--max_queue", type=int, help="Images that may wait; default: what the objective allows.")
    parser.add_argument("--device", help="Default: cuda where there is one, else cpu.")
    parser.add_argument("--threads", type=positive_integer, help="Threads of torch on a CPU.")
    parser.add_argument("--calibration", type=Path, help="File to keep the measured speed of every degree in.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if not args.latency_ms > 0:
        parser.error(f"--latency_ms must be positive, got {args.latency_ms:g}")
    return args


def load_classifier(args: argparse.Namespace) -> Any:
    """The model on its device, and the degrees that it may run at."""
    import torch

    from tocom_hf.model.tocom_model import TocomModel

    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = TocomModel.from_pretrained(args.model_name_or_path, plugins=args.plugins or None, source_r=args.source_r)
    if model.plugins is None:
        raise ArgumentError("The model has no plugins, so it runs at one degree only. Pass --plugins.")
    degrees = args.degrees or list(range(model.plugins.config.min_r, model.plugins.config.max_r + 1))
    for degree in degrees:  # before a request asks for one that there is not
        model.plugins.require(model.source_r, degree)
    return model.to(device), degrees  # type: ignore[arg-type]


def serve(args: argparse.Namespace) -> None:
    import torch
    import uvicorn

    from tocom_hf.cost.calibration import calibrate
    from tocom_hf.data.colour import find_num_channels, model_channels
    from tocom_hf.serving.policy import DegreePolicy
    from tocom_hf.serving.service import create_app

    if args.threads:
        torch.set_num_threads(args.threads)
    model, degrees = load_classifier(args)
    processor = load_processor(args.model_name_or_path)
    find_num_channels(processor, model_channels(model.config))
    calibration = calibrate(
        model, batch_size=args.max_batch_size, degrees=degrees, seconds=3, cache_file=args.calibration
    )
    print(calibration, flush=True)
    batch_seconds = {degree: calibration[degree].latency_ms / 1e3 for degree in degrees}
    policy = DegreePolicy(batch_seconds, args.max_batch_size, args.latency_ms / 1e3)
    app = create_app(model, processor, policy, args.max_queue)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
