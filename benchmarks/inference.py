# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Speed of merged inference: dense, the reference algorithm and tocom_hf, in turn in one process.

    python benchmarks/inference.py                                     # ViT-B/16, batch 8, float32
    python benchmarks/inference.py --models s b l --batch_sizes 1 8 64 256 --dtypes float32 bfloat16 --compile
    python benchmarks/inference.py --min_fraction 0.95                 # exit code 1 where it is slower: a guard

Writes a table and a plot. Only ratios within one run mean anything.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from reference_tome import apply_reference_tome
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from tocom_hf import apply_tome
from tocom_hf.devices import describe_device, synchronize


SIZES = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}  # hidden size, heads, layers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["b"], help="ViT-S, ViT-B, ViT-L with patch 16.")
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--compile", action="store_true", help="Compile all three.")
    parser.add_argument(
        "--attn_implementation",
        default="sdpa",
        help="Of dense and ours, e.g. flash_attention_2; the reference has its own.",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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


def count_flops(size: str, image_size: int, r: int) -> int:
    """FLOPs of one image in the reference algorithm by torch's own counter, with the attention written out."""
    with torch.device("meta"):
        model = apply_reference_tome(make_model(size, image_size, "eager"), r)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


@torch.no_grad()
def seconds(model, pixel_values: torch.Tensor) -> float:
    synchronize(pixel_values.device)
    start = time.perf_counter()
    model(pixel_values=pixel_values)
    synchronize(pixel_values.device)
    return time.perf_counter() - start


def measure(args, size: str, image_size: int, batch_size: int, dtype: str) -> list[dict]:
    device, kind = torch.device(args.device), getattr(torch, dtype)
    # random images with some structure: neighbouring patches resemble each other, as in photographs
    coarse = torch.randn(batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixel_values = torch.nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic").to(device, kind)
    dense = make_model(size, image_size, args.attn_implementation).to(device, kind)

    def clone(attention: str = "sdpa") -> ViTForImageClassification:
        """A model on the same weights, so that no variant has the luckier memory."""
        with torch.device("meta"):
            model = make_model(size, image_size, attention)
        model.load_state_dict(dense.state_dict(), assign=True)
        return model

    variants = {"dense": dense}
    for r in args.r:
        variants[f"reference {r}"] = apply_reference_tome(clone(), r)
        variants[f"fused {r}"] = apply_reference_tome(clone(), r, fused_attention=True)
        variants[f"ours {r}"] = apply_tome(clone(args.attn_implementation), r)
    for name, model in variants.items():
        if args.compile:
            variants[name] = torch.compile(model, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)
    for model in variants.values():
        for _ in range(3 if args.compile else 1):
            seconds(model, pixel_values)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, model in variants.items():
            times[name].append(seconds(model, pixel_values))

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    dense_flops, rows = count_flops(size, image_size, 0), []
    for r in args.r:
        ceiling = dense_flops / count_flops(size, image_size, r)
        ours, reference = ratio("dense", f"ours {r}"), ratio("dense", f"reference {r}")
        rows.append({
            "model": f"ViT-{size.upper()}/16", "image_size": image_size, "batch_size": batch_size, "dtype": dtype,
            "compiled": args.compile, "r": r, "flop_ratio": round(ceiling, 3), "reference": round(reference, 3),
            "reference_fused": round(ratio("dense", f"fused {r}"), 3),
            "ours": round(ours, 3), "ours_over_reference": round(ratio(f"reference {r}", f"ours {r}"), 3),
            "ours_over_fused": round(ratio(f"fused {r}", f"ours {r}"), 3),
            "fraction_of_ceiling": round(ours / ceiling, 3),
            "dense_images_per_second": round(batch_size / statistics.median(times["dense"]), 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def write_table(rows: list[dict], args, path: Path) -> None:
    header = ["model", "image size", "batch", "dtype", "r", "FLOP ratio", "reference / dense",
              "reference with fused attention / dense", "ours / dense", "ours / reference",
              "ours / reference with fused attention", "ours of the FLOP ratio", "dense images/s"]  # fmt: skip
    lines = [
        f"# Merged inference, {datetime.date.today().isoformat()}",
        "",
        f"{describe_device(args.device)}; torch {torch.__version__}; {'compiled' if args.compile else 'eager'}; "
        f"{args.attn_implementation}; "
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
        axis.plot(degrees, [row["reference"] for row in group], "s--", color="tab:orange", label="reference algorithm")
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
                    rows += measure(args, size, image_size, batch_size, dtype)
                    write_table(rows, args, args.output)
    plot(rows, args.output)
    slow = [row for row in rows if args.min_fraction and row["fraction_of_ceiling"] < args.min_fraction]
    if slow:
        sys.exit(f"{len(slow)} of {len(rows)} rows are below {args.min_fraction} of the ceiling.")


if __name__ == "__main__":
    main()
