# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of merged inference in two commits of this repository, in turn on one machine.

    python benchmarks/commits.py --before c3ff7c0                      # against the working tree
    python benchmarks/commits.py --before c3ff7c0 --models s --batch_sizes 1 --compile --resume

Each commit runs in a process of its own, on the same weights and images. In a round each of them has its turn: a pass
that is not counted, because the process has slept, then one of the dense model and one of the merged.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from http_load import ROOT, package_of


BEFORE, AFTER = "before", "after"
VARIANTS = "dense", "merged"
COLUMNS = {
    "runtime": "runtime", "model": "model", "image_size": "image size", "batch_size": "batch", "r": "r",
    "flop_ratio": "FLOP ratio", "speed_before": "before / dense", "speed_after": "after / dense",
    "share_before": "before of the FLOP ratio", "share_after": "after of the FLOP ratio",
    "after_over_before": "after over before", "dense_mib": "dense, MiB at the peak", "mib_before": "before, MiB",
    "mib_after": "after, MiB", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Speeds are over the dense model in the same process, medians of the ratios of each round. *After over before* is "
    "the ratio of the two times of the merged model. The FLOP ratio is that of the reference algorithm.",
    "*MiB at the peak*: the most that torch's allocator held at once during one forward pass in eager mode, weights "
    "and images left out.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="A commit to compare the working tree with.")
    parser.add_argument("--models", nargs="+", choices=("t", "s", "b", "l"), default=["s", "b"])
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="Compile all of them.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "commits_cpu")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)  # model, image size, batch size, r, compile
    args = parser.parse_args()
    if args.worker is None and args.before is None:
        parser.error("--before is required: the commit to compare the working tree with.")
    return args


def work(size: str, image_size: int, batch_size: int, r: int, compiled: bool) -> None:
    """Answer every line of standard input: a variant to time, after a pass to wake up or not, or its memory."""
    import torch
    from inference import make_model, structured_images

    import tocom_hf
    from tocom_hf import apply_tome

    if Path(tocom_hf.__file__).parents[1] != Path.cwd():
        raise SystemExit(f"{tocom_hf.__file__} was imported, not the package in {Path.cwd()}.")
    models = {"dense": make_model(size, image_size), "merged": apply_tome(make_model(size, image_size), r)}
    pixel_values = structured_images(batch_size, image_size)
    with torch.no_grad():
        memory = {name: peak_bytes(lambda model=model: model(pixel_values)) for name, model in models.items()}
        for model in models.values():
            if compiled:
                model.compile(dynamic=False)
            model(pixel_values)
        for line in sys.stdin:
            question, name = line.split()
            if question == "memory":
                print(memory[name], flush=True)
                continue
            if question == "wake":
                models[name](pixel_values)
            start = time.perf_counter()
            models[name](pixel_values)
            print(time.perf_counter() - start, flush=True)


def peak_bytes(call) -> int:
    """The most bytes that torch's allocator on the CPU holds at once while `call` runs, over what it held before."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


class Worker:
    """One commit in a process of its own.

    Args:
        package: The folder whose `tocom_hf` it imports.
        script: What it runs, with `--worker` and the arguments. It prints a line for each line that it reads.
        arguments: As it takes them.
    """

    def __init__(self, package: Path, script: str, arguments: Iterable):
        command = [sys.executable, str(Path(script).resolve()), "--worker", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(package)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=package
        )

    def ask(self, question: str, argument: object = "") -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, argument, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"A worker ended with code {self.process.wait()}; its message stands above.")
        return float(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def packages_of(before: str) -> Iterator[dict[str, Path]]:
    """The folders of the package in a commit and in the working tree, within the `with` block."""
    with package_of(before) as package:
        yield {BEFORE: package, AFTER: ROOT}


def measure(packages: dict[str, Path], cell: tuple, rounds: int) -> dict:
    """One row of the table."""
    from inference import count_flops

    size, image_size, batch_size, r, compiled = cell
    workers = {commit: Worker(package, __file__, cell) for commit, package in packages.items()}
    times: dict[tuple[str, str], list[float]] = {(commit, name): [] for commit in workers for name in VARIANTS}
    memory = {(commit, name): workers[commit].ask("memory", name) / 2**20 for commit, name in times}
    for _ in range(rounds):
        for commit, worker in workers.items():
            times[commit, "dense"].append(worker.ask("wake", "dense"))
            times[commit, "merged"].append(worker.ask("time", "merged"))
    for worker in workers.values():
        worker.end()

    def ratio(slow: tuple[str, str], fast: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    speed = {commit: ratio((commit, "dense"), (commit, "merged")) for commit in workers}
    flop_ratio = sum(count_flops(size, image_size, 0).values()) / sum(count_flops(size, image_size, r).values())
    return {
        "runtime": "compile" if compiled else "eager", "model": f"ViT-{size.upper()}/16", "image_size": image_size,
        "batch_size": batch_size, "r": r, "flop_ratio": round(flop_ratio, 3),
        "speed_before": round(speed[BEFORE], 3), "speed_after": round(speed[AFTER], 3),
        "share_before": round(speed[BEFORE] / flop_ratio, 3), "share_after": round(speed[AFTER] / flop_ratio, 3),
        "after_over_before": round(ratio((BEFORE, "merged"), (AFTER, "merged")), 3),
        "dense_mib": round(memory[AFTER, "dense"], 1), "mib_before": round(memory[BEFORE, "merged"], 1),
        "mib_after": round(memory[AFTER, "merged"], 1), "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        size, *numbers = args.worker
        image_size, batch_size, r, compiled = map(int, numbers)
        work(size, image_size, batch_size, r, bool(compiled))
        return
    from sessions import Results, versions

    results = Results(
        args.output, f"Merging in {args.before} and after", COLUMNS, NOTES, versions("torch", "transformers"),
        resume=args.resume,
    )  # fmt: skip
    with packages_of(args.before) as packages:
        for size in args.models:
            for image_size in args.image_sizes:
                for batch_size in args.batch_sizes:
                    cell = (size, image_size, batch_size, args.r, int(args.compile))
                    key = {"model": f"ViT-{size.upper()}/16", "image_size": image_size, "batch_size": batch_size}
                    if not results.has(runtime="compile" if args.compile else "eager", r=args.r, **key):
                        results.add([measure(packages, cell, args.rounds)])


if __name__ == "__main__":
    main()
