# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of merged inference: dense, the reference algorithm and tocom_hf, in turn in one process.

    python benchmarks/inference.py                                     # ViT-B/16, batch 8, float32
    python benchmarks/inference.py --models s b l --batch_sizes 1 8 64 256 --dtypes float32 bfloat16 --compile
    python benchmarks/inference.py --min_fraction 0.95                 # exit code 1 where it is slower: a guard

Writes a table and a plot. Only ratios within one run mean anything. Operations are those of torch that compute
something in one uncompiled pass, which a GPU launches one by one. At batch 1 the table has a second ceiling beside the
FLOP ratio: there a layer takes no less time than its weights need to be read once.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from reference_tome import apply_reference_tome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from tocom_hf import apply_tome
from tocom_hf.devices import describe_device, synchronize


SIZES = {"t": (192, 3, 12), "s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}  # hidden size, heads, layers
MISSING = "n/a"  # what was not measured, and what means nothing at this batch size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=SIZES, default=["b"], help="ViT-T, ViT-S, ViT-B, ViT-L with patch 16."
    )
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--compile", action="store_true", help="Compile all of them.")
    parser.add_argument(
        "--compile_mode",
        help="Of torch.compile, e.g. reduce-overhead; by default max-autotune-no-cudagraphs on a GPU.",
    )
    parser.add_argument("--compile_backend", default="inductor", help="Of torch.compile; eager tries this script only.")
    parser.add_argument("--without_reference", action="store_true", help="Measure dense and ours only.")
    parser.add_argument("--proportional_attention", choices=["on", "off"], default="on", help="Of ours.")
    parser.add_argument(
        "--attn_implementation",
        default="sdpa",
        help="Of dense and ours, e.g. flash_attention_2; the reference has its own.",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without_plot", action="store_true", help="Write the table only.")
    parser.add_argument("--min_fraction", type=float, help="Fail if a fraction of the FLOP ceiling is below this.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "inference")
    return parser.parse_args()


def make_model(size: str, image_size: int, attention: str = "sdpa") -> ViTForImageClassification:
    hidden, heads, layers = SIZES[size]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * hidden,
        image_size=image_size, num_labels=1000, initializer_range=0.05,
    )  # fmt: skip
    config._attn_implementation = attention
    return ViTForImageClassification(config).eval()


def clone_of(
    dense: ViTForImageClassification, size: str, image_size: int, attention: str = "sdpa"
) -> ViTForImageClassification:
    """A model on the weights of another, so that no variant has the luckier memory."""
    with torch.device("meta"):
        model = make_model(size, image_size, attention)
    model.load_state_dict(dense.state_dict(), assign=True)
    return model


def structured_images(batch_size: int, image_size: int) -> torch.Tensor:
    """Random images whose neighbouring patches resemble each other, as in photographs: `(batch, 3, height, width)`."""
    coarse = torch.randn(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic")


def count_flops(size: str, image_size: int, r: int) -> dict[str, int]:
    """FLOPs of one image in the reference algorithm by torch's own counter, with the attention written out.

    Returns:
        FLOPs of each layer by its number, and of all the rest of the model under the name "rest".
    """
    with torch.device("meta"):
        model = apply_reference_tome(make_model(size, image_size, "eager"), r)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, image_size, image_size))
    modules = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    layers = {str(i): modules[f"ViTForImageClassification.vit.layers.{i}"] for i in range(len(model.vit.layers))}
    return {**layers, "rest": counter.get_total_flops() - sum(layers.values())}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that compute something: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if not is_view and not any(word in func.__name__ for word in ("empty", "_unsafe_view")):
            self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_operations(model, pixel_values: torch.Tensor) -> int:
    """Operations of one pass that is not compiled."""
    with OperationCounter() as counter:
        model(pixel_values=pixel_values)
    return counter.count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a tensor much larger than the caches reads and writes."""
    source = torch.ones(64 * 2**20 if device.type == "cpu" else 512 * 2**20, dtype=torch.float32, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def roofline(
    dense, dense_seconds: float, dense_flops: dict[str, int], flops: dict[str, int], bandwidth: float
) -> float:
    """The speed-up over dense if every layer ran at the dense rate, but no faster than its weights are read once.

    Args:
        dense: The model, which has `vit.layers`.
        dense_seconds: What its pass takes.
        dense_flops, flops: Of the dense and of the merged model, as `count_flops` returns them.
        bandwidth: Bytes a second.
    """
    seconds_per_flop = dense_seconds / sum(dense_flops.values())
    total = flops["rest"] * seconds_per_flop
    for index, layer in enumerate(dense.vit.layers):
        reading = sum(parameter.nbytes for parameter in layer.parameters()) / bandwidth
        total += max(flops[str(index)] * seconds_per_flop, reading)
    return dense_seconds / total


@torch.no_grad()
def seconds(model, pixel_values: torch.Tensor) -> float:
    synchronize(pixel_values.device)
    start = time.perf_counter()
    model(pixel_values=pixel_values)
    synchronize(pixel_values.device)
    return time.perf_counter() - start


def measure(args, size: str, image_size: int, batch_size: int, dtype: str) -> Iterator[dict]:
    """One row for each degree, as soon as it is measured."""
    device, kind = torch.device(args.device), getattr(torch, dtype)
    pixel_values = structured_images(batch_size, image_size).to(device, kind)
    dense = make_model(size, image_size, args.attn_implementation).to(device, kind)

    def clone(attention: str = "sdpa") -> ViTForImageClassification:
        return clone_of(dense, size, image_size, attention)

    def prepare(model):
        """Compile a model where that is asked for, and run it until it is warm."""
        if args.compile:
            mode = args.compile_mode or ("max-autotune-no-cudagraphs" if device.type == "cuda" else None)
            model = torch.compile(
                model, backend=args.compile_backend, mode=mode if args.compile_backend == "inductor" else None
            )
        for _ in range(3 if args.compile else 1):
            seconds(model, pixel_values)
        return model

    operations = {"dense": count_operations(dense, pixel_values[:1])}
    compiled_dense = prepare(dense)
    dense_flops, bandwidth = count_flops(size, image_size, 0), copy_bandwidth(device)
    for r in args.r:
        models = {"ours": apply_tome(clone(args.attn_implementation), r)}
        if args.proportional_attention == "off":
            apply_tome(models["ours"], r, proportional_attention=False)
        if not args.without_reference:
            models["reference"] = apply_reference_tome(clone(), r)
            models["fused"] = apply_reference_tome(clone(), r, fused_attention=True)
        operations |= {name: count_operations(model, pixel_values[:1]) for name, model in models.items()}
        models = {"dense": compiled_dense, **{name: prepare(model) for name, model in models.items()}}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                times[name].append(seconds(model, pixel_values))

        def ratio(slow: str, fast: str, times=times) -> float | str:
            if slow not in times or fast not in times:
                return MISSING
            return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 3)

        flops, dense_seconds = count_flops(size, image_size, r), statistics.median(times["dense"])
        ceiling = sum(dense_flops.values()) / sum(flops.values())
        ours = statistics.median(a / b for a, b in zip(times["dense"], times["ours"], strict=True))
        limit = roofline(dense, dense_seconds, dense_flops, flops, bandwidth)
        more = {name: found - operations["dense"] for name, found in operations.items()}
        row = {
            "model": f"ViT-{size.upper()}/16", "image_size": image_size, "batch_size": batch_size, "dtype": dtype,
            "compiled": args.compile, "r": r, "flop_ratio": round(ceiling, 3),
            "reference": ratio("dense", "reference"), "reference_fused": ratio("dense", "fused"),
            "ours": round(ours, 3), "ours_over_reference": ratio("reference", "ours"),
            "ours_over_fused": ratio("fused", "ours"), "fraction_of_ceiling": round(ours / ceiling, 3),
            "dense_images_per_second": round(batch_size / dense_seconds, 1),
            "dense_operations": operations["dense"], "more_operations_reference": more.get("fused", MISSING),
            "more_operations": more["ours"],
            "roofline": round(limit, 3) if batch_size == 1 else MISSING,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        yield row


def write_table(rows: list[dict], args, path: Path) -> None:
    header = ["model", "image size", "batch", "dtype", "r", "FLOP ratio", "reference / dense",
              "reference with fused attention / dense", "ours / dense", "ours / reference",
              "ours / reference with fused attention", "ours of the FLOP ratio", "dense images/s",
              "operations, dense", "more in the reference with fused attention", "more in ours",
              "FLOP ratio, weights read once"]  # fmt: skip
    lines = [
        f"# Merged inference, {datetime.date.today().isoformat()}",
        "",
        f"{describe_device(args.device)}; torch {torch.__version__}; "
        f"{f'compiled ({args.compile_mode or args.compile_backend})' if args.compile else 'eager'}; "
        f"{args.attn_implementation}; proportional attention {args.proportional_attention}; "
        f"TOCOM_KERNELS={os.environ.get('TOCOM_KERNELS', 'unset')}; "
        f"{args.rounds} interleaved rounds, medians of the ratios of each round. `python {' '.join(sys.argv)}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    lines += ["| " + " | ".join(str(value) for key, value in row.items() if key != "compiled") + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["image_size"], row["batch_size"], row["dtype"]), []).append(row)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.4 * len(groups), 3.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (key, group) in zip(axes[0], groups.items(), strict=True):
        degrees = [row["r"] for row in group]
        axis.plot(degrees, [row["flop_ratio"] for row in group], "k:", label="FLOP ratio")
        axis.plot(degrees, [row["ours"] for row in group], "o-", color="tab:blue", label="tocom_hf")
        if group[0]["reference"] != MISSING:
            reference = [row["reference"] for row in group]
            axis.plot(degrees, reference, "s--", color="tab:orange", label="reference algorithm")
        axis.axhline(1, color="0.8", linewidth=1)
        axis.set(title=f"{key[0]}, {key[1]} px\nbatch {key[2]}, {key[3]}", xlabel="r")
    axes[0][0].set_ylabel("speed over dense")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    args = parse_args()
    # every variant is a model of its own, on code that they share
    torch._dynamo.config.recompile_limit = 100
    rows = []
    for size in args.models:
        for image_size in args.image_sizes:
            for batch_size in args.batch_sizes:
                for dtype in args.dtypes:
                    for row in measure(args, size, image_size, batch_size, dtype):
                        rows.append(row)
                        # after each, so that a run that is interrupted keeps what it has
                        write_table(rows, args, args.output)
    if not args.without_plot:
        plot(rows, args.output)
    slow = [row for row in rows if args.min_fraction and row["fraction_of_ceiling"] < args.min_fraction]
    if slow:
        sys.exit(f"{len(slow)} of {len(rows)} rows are below {args.min_fraction} of the ceiling.")


if __name__ == "__main__":
    main()
