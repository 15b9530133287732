# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks of runtimes share: exporting, opening files with equal threads, timing in turn, tables.

All runtimes get the same number of threads. Within a runtime the variants run in turn, so that a machine that slows
down slows all of them.
"""

import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from torch import nn

from tocom_hf.devices import describe_device
from tocom_hf.exporting.onnx_graph import make_graph
from tocom_hf.exporting.tracing import trace


Call = Callable[[np.ndarray], np.ndarray]


class OneOutput(nn.Module):
    """A model that gives one tensor: its logits, or the class token where it has no head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values=pixel_values)
        if "logits" in output:
            return output.logits  # (batch, labels)
        return output.last_hidden_state[:, 0]  # (batch, hidden)


def export_onnx(model: nn.Module, path: Path, image_size: int) -> Path:
    """Write a model as one ONNX file for any batch size, as `tocom_hf.export` makes graphs, its weights beside it.

    Args:
        model: A transformers model, patched or not.
        path: The file to write.
        image_size: Height and width of its images in pixels.

    Returns:
        `path`.
    """
    sample = torch.randn(2, 3, image_size, image_size)
    program = trace(OneOutput(model).eval(), (sample,), dynamic_batch=True)
    graph = make_graph(program, "pixel_values", "output")
    onnx_ir.save(graph, path, external_data=f"{path.name}.data")
    return path


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file that is not there yet, and what it puts beside it: all of it, or nothing where it stops.

    A run that was cut off leaves no half of a file for the next one.
    """
    if path.exists():
        return path
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder) / path.name)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
            part.rename(path.parent / part.name)
    print(f"wrote {path.name} in {time.perf_counter() - start:.0f} s", flush=True)
    return path


def torch_call(model: nn.Module) -> Call:
    model = model if isinstance(model, OneOutput) else OneOutput(model).eval()

    @torch.no_grad()
    def call(pixel_values: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixel_values)).numpy()

    return call


def compiled_call(model: nn.Module, *, freezing: bool) -> Call:
    """`torch.compile` for the shapes that it is called with; `freezing` makes weights constants, which are packed."""
    model = OneOutput(model).eval()
    # compiled in place: what torch.compile returns is of another class, which torch_call would wrap once more
    model.compile(dynamic=False, options={"freezing": freezing})
    return torch_call(model)


def onnxruntime_call(path: Path, threads: int, batch_size: int | None = None) -> Call:
    """Open a file with ONNX Runtime, for one batch size where it is given, else for any."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # All sessions share one pool: the threads of a pool of its own would spin for a while after its turn, against the
    # session whose turn it is then.
    if not getattr(onnxruntime_call, "pool", None):
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        onnxruntime_call.pool = threads  # type: ignore[attr-defined]
    options.use_per_session_threads = False
    if batch_size is not None:
        options.add_free_dimension_override_by_name("batch", batch_size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(None, {"pixel_values": pixel_values})[0]


def openvino_call(path: Path, threads: int, batch_size: int | None = None) -> Call:
    """Open a file with OpenVINO in float32, or whatever integers it holds, as `onnxruntime_call` does."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if batch_size is not None:
        model.reshape([batch_size, *(side.get_length() for side in list(model.input(0).partial_shape)[1:])])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(model, "CPU", settings)
    return lambda pixel_values: compiled(pixel_values)[0].copy()


def time_in_turn(
    calls: Mapping[str, Call], pixel_values: np.ndarray, rounds: int, limit: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that is not counted.

    Args:
        calls: What to time, by name. A round runs each of them once.
        pixel_values: What they are called with.
        rounds: How many rounds.
        limit: Seconds after which no round begins, once there are three.
    """
    for call in calls.values():
        call(pixel_values)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > limit:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call(pixel_values)
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """The median of the ratios of each round: how many times faster `fast` is than `slow`."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command of this run; folders outside the working directory by their names alone."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


class Results:
    """Rows of a run, written as a table and as JSON after each of them, and taken up again by a later run.

    Args:
        path: Of the files, without their endings.
        title: Heading of the table.
        columns: What the table shows: its headings by the names of the values in a row.
        notes: How to read it.
        packages: Versions of what was measured.
        resume: Keep the rows that are there already.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        columns: Mapping[str, str],
        notes: list[str],
        packages: Mapping[str, str],
        *,
        resume: bool,
    ):
        self.path, self.title, self.columns, self.notes = path, title, columns, notes
        here = {"device": describe_device("cpu"), "versions": dict(packages)}
        self.state: dict = {"date": datetime.date.today().isoformat(), **here, "commands": [], "rows": []}
        if resume and self._json.exists():
            before = json.loads(self._json.read_text(encoding="utf-8"))
            other = [name for name in here if before[name] != here[name]]
            if other:
                raise SystemExit(
                    f"{self._json} was measured with another {' and other '.join(other)}: "
                    f"{[before[name] for name in other]} instead of {[here[name] for name in other]}. Run without "
                    "--resume, or choose another --output."
                )
            self.state = before
        if command_line() not in self.state["commands"]:
            self.state["commands"].append(command_line())

    @property
    def _json(self) -> Path:
        return self.path.with_suffix(".json")

    def has(self, **key) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.state["rows"])

    def add(self, rows: list[dict]) -> None:
        self.state["rows"] += rows
        for row in rows:
            print(json.dumps(row), flush=True)
        self._json.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(self._table(), encoding="utf-8")

    def _table(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.state["versions"].items())
        lines = [
            f"# {self.title}, {self.state['date']}",
            "",
            f"{self.state['device']}; {packages}.",
            "",
            "```bash",
            *self.state["commands"],
            "```",
            "",
            *(f"- {note}" for note in self.notes),
            "",
            "| " + " | ".join(self.columns.values()) + " |",
            "|" + " --- |" * len(self.columns),
        ]
        lines += [
            "| " + " | ".join(str("" if row.get(name) is None else row[name]) for name in self.columns) + " |"
            for row in self.state["rows"]
        ]
        return "\n".join(lines) + "\n"
