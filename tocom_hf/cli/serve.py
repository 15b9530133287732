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
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tocom_hf.cli.endings import CommandParser, positive_integer, progress_bars_on_terminals_only, run_command, say
from tocom_hf.cli.loading import find_device, load_processor
from tocom_hf.errors import ArgumentError


COMMAND = "tocom serve"
POSITIVE = ("latency_ms", "max_megabytes", "max_megapixels", "receive_seconds", "answer_seconds")


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
    parser.add_argument(
        "--max_queue", type=int, help="Images that may wait, for each worker; default: what the objective allows."
    )
    parser.add_argument("--device", help="Default: cuda where there is one, else cpu.")
    parser.add_argument(
        "--workers", type=positive_integer, default=1,
        help="Processes that serve the port, each with a model and a queue of its own (Linux). Default: 1.",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_integer, help="Threads of torch on a CPU, in each worker. Default: all, shared out."
    )
    parser.add_argument("--calibration", type=Path, help="File to keep the measured speed of every degree in.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for one that is free.")
    parser.add_argument(
        "--reuse_port", action="store_true", help="Let another tocom serve take over the port: see docs/serving.md."
    )
    _add_limits(parser.add_argument_group("limits", "What one client may take of the service."))
    args = parser.parse_args(argv)
    for name in POSITIVE:
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} must be positive and finite, got {getattr(args, name):g}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {args.port}")
    return args


def _add_limits(group: Any) -> None:
    group.add_argument("--max_megabytes", type=float, default=16, help="Of a body, in MiB. Default: 16.")
    group.add_argument(
        "--max_megapixels", type=float, default=64, help="Of all images of a request, before resizing. Default: 64."
    )
    group.add_argument("--max_connections", type=positive_integer, help="Open at once, for each worker. Default: 512.")
    group.add_argument(
        "--receive_seconds", type=float, default=10, help="For a request to arrive, else 408. Default: 10."
    )
    group.add_argument(
        "--answer_seconds", type=float, default=20,
        help="For an answer, else 503; and for what waits when the service is stopped. Default: 20.",
    )  # fmt: skip


def load_classifier(args: argparse.Namespace) -> Any:
    """The model on its device, and the degrees that it may run at."""
    import torch

    from tocom_hf.model.tocom_model import TocomModel

    if args.threads:
        torch.set_num_threads(args.threads)
    elif args.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = TocomModel.from_pretrained(args.model_name_or_path, plugins=args.plugins or None, source_r=args.source_r)
    if model.plugins is None:
        raise ArgumentError("The model has no plugins, so it runs at one degree only. Pass --plugins.")
    degrees = args.degrees or list(range(model.plugins.config.min_r, model.plugins.config.max_r + 1))
    for degree in degrees:  # before a request asks for one that there is not
        model.plugins.require(model.source_r, degree)
    return model.to(device), degrees  # type: ignore[arg-type]


def measure(args: argparse.Namespace, model: Any, degrees: list[int], processor: Any) -> dict[int, float]:
    """Seconds for a full batch by degree, which are printed, too."""
    from tocom_hf.cost.calibration import calibrate
    from tocom_hf.data.colour import find_num_channels, model_channels

    find_num_channels(processor, model_channels(model.config))
    calibration = calibrate(
        model, batch_size=args.max_batch_size, degrees=degrees, seconds=3, cache_file=args.calibration
    )
    say(str(calibration))
    return {degree: calibration[degree].latency_ms / 1e3 for degree in degrees}


def load_and_measure(args: argparse.Namespace) -> dict[int, float]:
    with progress_bars_on_terminals_only():
        model, degrees = load_classifier(args)
        return measure(args, model, degrees, load_processor(args.model_name_or_path))


def make_app(
    args: argparse.Namespace,
    limits: Any,
    model: Any,
    processor: Any,
    batch_seconds: dict[int, float],
    shared_metrics: bool = False,
) -> Any:
    from tocom_hf.serving.batching import Metrics
    from tocom_hf.serving.policy import DegreePolicy
    from tocom_hf.serving.service import create_app

    policy = DegreePolicy(batch_seconds, args.max_batch_size, args.latency_ms / 1e3)
    return create_app(model, processor, policy, args.max_queue, limits=limits, metrics=Metrics(shared_metrics))


def serve(args: argparse.Namespace) -> None:
    from tocom_hf.serving.limits import Limits
    from tocom_hf.serving.server import bind, find_max_connections, serve_until_stopped

    limits = Limits(
        max_bytes=math.ceil(args.max_megabytes * 2**20),
        max_pixels=math.ceil(args.max_megapixels * 1e6),
        max_connections=find_max_connections(args.max_connections),
        receive_seconds=args.receive_seconds,
        answer_seconds=args.answer_seconds,
    )
    if args.workers > 1:
        serve_with_workers(args, limits)
        return
    listener = bind(args.host, args.port, args.reuse_port)
    model, degrees = load_classifier(args)
    processor = load_processor(args.model_name_or_path)
    app = make_app(args, limits, model, processor, measure(args, model, degrees, processor))
    serve_until_stopped(app, listener, lambda address: say(f"Serving on {address}"))


def serve_with_workers(args: argparse.Namespace, limits: Any) -> None:
    from tocom_hf.serving.server import address_of, bind
    from tocom_hf.serving.workers import Workers, call_apart, require_shared_ports, shared_metrics

    require_shared_ports()
    if not args.reuse_port:  # nobody else may serve there
        bind(args.host, args.port).close()
    with bind(args.host, args.port, reuse_port=True) as place:  # held, so that the port stays ours while workers change
        # here it would hold memory that the workers need
        batch_seconds = call_apart(load_and_measure, args)
        workers = Workers(
            work, (args, limits, batch_seconds, place.getsockname()[1]), args.workers, args.answer_seconds + 5
        )
        with shared_metrics() as forget:

            def started() -> None:
                say(f"Serving on {address_of(place)} with {args.workers} workers")

            def ended(pid: int, code: int) -> None:
                forget(pid)
                say(f"Worker {pid} has ended with the code {code}.")

            code = workers.run(started, ended)
    if code:
        sys.exit(code)


def work(
    args: argparse.Namespace, limits: Any, batch_seconds: dict[int, float], port: int, started: Callable[[str], None]
) -> None:
    """What each of several workers does."""
    from tocom_hf.serving.server import bind, serve_until_stopped

    with progress_bars_on_terminals_only():
        model, _ = load_classifier(args)
        processor = load_processor(args.model_name_or_path)
        app = make_app(args, limits, model, processor, batch_seconds, shared_metrics=True)
    serve_until_stopped(app, bind(args.host, port, reuse_port=True), started)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
