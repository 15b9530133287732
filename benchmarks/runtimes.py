# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of merging in eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, each against its own dense model.

    python benchmarks/runtimes.py --models s --resume      # a model at a time; a later run adds its rows to the table
    python benchmarks/runtimes.py --models b --resume
    python benchmarks/runtimes.py --models s b --runtimes compile compile_freezing --batch_sizes 1 --resume

In every runtime four variants run in turn in one process: dense, the reference algorithm, tocom_hf, and tokens that are
dropped for free.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from inference import SIZES, clone_of, copy_bandwidth, count_flops, make_model, structured_images
from reference_tome import apply_reference_tome
from sessions import (
    Call,
    Results,
    compiled_call,
    export_onnx,
    median_ratio,
    onnxruntime_call,
    openvino_call,
    time_in_turn,
    torch_call,
    versions,
    write_whole,
)
from transformers import ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from tocom_hf import apply_tome
from tocom_hf.merging.schedule import clamp_r


RUNTIMES = ("eager", "compile", "compile_freezing", "onnxruntime", "openvino")
DENSE, REFERENCE, OURS, DROPPED = "dense", "reference", "ours", "dropped"
COLUMNS = {
    "runtime": "runtime", "model": "model", "image_size": "image size", "batch_size": "batch", "r": "r",
    "flop_ratio": "FLOP ratio", REFERENCE: "reference / dense", OURS: "ours / dense",
    DROPPED: "tokens dropped for free / dense", "reference_share": "reference of the FLOP ratio",
    "ours_share": "ours of the FLOP ratio", "dropped_share": "dropped of the FLOP ratio",
    "ours_over_dropped": "ours of dropped", "dense_ms": "dense, ms", "weights_ms": "weights read once, ms",
    "weights_share": "weights of ours' time", "difference": "largest difference from eager", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Speeds are over the dense model of the same runtime: medians of the ratios of each round, in which the four "
    "variants run in turn. Milliseconds are medians; those of two runtimes were not measured in the same round.",
    "*Tokens dropped for free*: after attention every layer keeps its first tokens, as many as merging would leave, "
    "and does nothing else. It shows what the runtime's matrix products allow at these token counts: what it misses "
    "of the FLOP ratio is the runtime's, what tocom_hf misses of it is the cost of merging.",
    "The FLOP ratio is that of the reference algorithm.",
    "*Weights read once*: the time in which this machine reads all weights, at the bandwidth of a copy. No "
    "pass over one image can be faster.",
    "*Largest difference from eager*: of the outputs of tocom_hf. The reference merges with scatter_reduce; torch "
    "exports its sums rightly and its means wrongly, without an error. Here it sums, and its speed is what is shown.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["s", "b"], help="ViT-S, ViT-B, ViT-L, patch 16.")
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--r", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=["eager", "onnxruntime", "openvino"],
        help="compile_freezing is torch.compile with torch._inductor.config.freezing, which packs weights.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Of every runtime.")
    parser.add_argument("--files", type=Path, help="Keep the exported files here, and use those that are here.")
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "runtimes_cpu")
    return parser.parse_args()


class DroppingLayer(ViTLayer):
    """A layer that loses the last tokens after attention, for nothing.

    Attributes:
        r: How many it loses, if so many are left.
    """

    r: int

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        # the mask is one of ones, which transformers makes for all tokens while a model is exported
        branch, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + branch  # (batch, tokens, hidden)
        tokens = hidden_states.shape[1]
        hidden_states = hidden_states[:, : tokens - clamp_r(self.r, tokens, 1)]  # (batch, tokens - r, hidden)
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


def drop_tokens(model: ViTForImageClassification, r: int) -> ViTForImageClassification:
    """Patch a model in place to have the token counts of merging `r` in every layer, without merging."""
    for layer in model.vit.layers:
        layer.__class__ = DroppingLayer
        layer.r = r
    return model


def make_variants(size: str, image_size: int, degrees: list[int]) -> dict[str, ViTForImageClassification]:
    """All variants on the same weights, so that none has the luckier memory."""
    dense = make_model(size, image_size)

    variants = {DENSE: dense}
    for r in degrees:
        variants[f"{REFERENCE} {r}"] = apply_reference_tome(clone_of(dense, size, image_size), r)
        variants[f"{OURS} {r}"] = apply_tome(clone_of(dense, size, image_size), r)
        variants[f"{DROPPED} {r}"] = drop_tokens(clone_of(dense, size, image_size), r)
    return variants


def make_calls(
    runtime: str, variants: dict[str, ViTForImageClassification], file_of: Callable[[str], Path], args, batch_size: int
) -> dict[str, Call]:
    if runtime == "eager":
        return {name: torch_call(model) for name, model in variants.items()}
    if runtime.startswith("compile"):
        freezing = runtime == "compile_freezing"
        return {name: compiled_call(model, freezing=freezing) for name, model in variants.items()}
    open_file = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}[runtime]
    return {name: open_file(file_of(name), args.threads, batch_size) for name in variants}


def measure(args, runtime: str, size: str, image_size: int, batch_size: int, variants, file_of) -> list[dict]:
    pixel_values = structured_images(batch_size, image_size).numpy()
    calls = make_calls(runtime, variants, file_of, args, batch_size)
    outputs = {name: call(pixel_values) for name, call in calls.items()}
    times = time_in_turn(calls, pixel_values, args.rounds)
    weights = sum(parameter.nbytes for parameter in variants[DENSE].parameters())
    weights_ms = 1000 * weights / copy_bandwidth(torch.device("cpu")) if batch_size == 1 else None
    dense_flops, rows = sum(count_flops(size, image_size, 0).values()), []
    for r in args.r:
        flop_ratio = dense_flops / sum(count_flops(size, image_size, r).values())
        speeds = {name: median_ratio(times, DENSE, f"{name} {r}") for name in (REFERENCE, OURS, DROPPED)}
        expected = torch_call(variants[f"{OURS} {r}"])(pixel_values)
        ours_ms = 1000 * statistics.median(times[f"{OURS} {r}"])
        rows.append({
            "runtime": runtime, "model": f"ViT-{size.upper()}/16", "image_size": image_size, "batch_size": batch_size,
            "r": r, "flop_ratio": round(flop_ratio, 3), **{name: round(speed, 3) for name, speed in speeds.items()},
            **{f"{name}_share": round(speed / flop_ratio, 3) for name, speed in speeds.items()},
            "ours_over_dropped": round(median_ratio(times, f"{DROPPED} {r}", f"{OURS} {r}"), 3),
            "dense_ms": round(1000 * statistics.median(times[DENSE]), 1),
            "weights_ms": None if weights_ms is None else round(weights_ms, 1),
            "weights_share": None if weights_ms is None else round(weights_ms / ours_ms, 3),
            "difference": float(f"{np.abs(outputs[f'{OURS} {r}'] - expected).max():.1e}"),
            "rounds": args.rounds,
        })  # fmt: skip
    return rows


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    # every variant is a model of its own, on code that they share
    torch._dynamo.config.recompile_limit = 100
    packages = versions("torch", "transformers", "onnxruntime", "openvino")
    results = Results(args.output, "Merging in four runtimes", COLUMNS, NOTES, packages, resume=args.resume)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.models:
            for image_size in args.image_sizes:
                measure_model(args, size, image_size, folder, results)


def measure_model(args, size: str, image_size: int, folder: Path, results: Results) -> None:
    """All cells of one model that are not there yet. A cell is a runtime at a batch size."""
    variants = make_variants(size, image_size, args.r)

    def file_of(name: str) -> Path:
        path = folder / f"{size}-{image_size}-{name.replace(' ', '-')}.onnx"
        return write_whole(path, lambda part: export_onnx(variants[name], part, image_size))

    for batch_size in args.batch_sizes:
        for runtime in args.runtimes:
            key = {"runtime": runtime, "model": f"ViT-{size.upper()}/16", "image_size": image_size}
            if all(results.has(**key, batch_size=batch_size, r=r) for r in args.r):
                print(f"{runtime}, {key['model']}, {image_size} px, batch {batch_size}: there already", flush=True)
                continue
            results.add(measure(args, runtime, size, image_size, batch_size, variants, file_of))
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
