# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of a merging layer by themselves: forms of proportional attention, and the kernels against PyTorch.

    python benchmarks/gpu_parts.py attention --output OUT.md
    python benchmarks/gpu_parts.py kernels --output OUT.md          # needs a GPU

Times are those of the device: on a GPU each call is captured in a CUDA graph, so that launching it costs nothing.
"""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.benchmark import Timer

from tocom_hf.devices import describe_device
from tocom_hf.merging import attention, kernels
from tocom_hf.merging.tokens import MergePlan, match_tokens, merge_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["attention", "kernels"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 133, 69])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call on the device."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return 1000 * do_bench_cudagraph(function, return_mode="median")
    return 1e6 * Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.05).median


def attention_forms(args, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Every form as a call without arguments, from sizes to output, by its name. All but the first give the same."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = (args.batch_size, tokens, args.heads, args.head_dim)
    query, key, value = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    sizes = torch.randint(1, 9, shape[:2], device=device).float()
    scaling = args.head_dim**-0.5
    stored = attention.proportional_bias(sizes, dtype)
    compiled_flex = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def sdpa(query, key, value, bias=None, backend=None):
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)

    def weighed(pad_heads: bool, backend=None):
        values = attention.weigh_values(value, sizes)
        more = values.shape[-1] - args.head_dim if pad_heads else 0
        output = sdpa(F.pad(query, (0, more)), F.pad(key, (0, more)), values, backend=backend)
        return attention.divide_weights(output, args.head_dim)

    def extended(backend=None):
        parts = attention.extend_heads(query, key, value, sizes, scaling)
        return sdpa(*parts, backend=backend)[..., : args.head_dim]

    forms = {
        "no sizes": lambda: sdpa(query, key, value),
        "bias, torch's choice of kernel": lambda: sdpa(query, key, value, attention.proportional_bias(sizes, dtype)),
        "values weighed, torch's choice": lambda: weighed(pad_heads=False),
        "heads extended, torch's choice": extended,
        "flex_attention": lambda: attention.attend_with_score_mod(
            query, key, value, sizes, scaling, compiled_flex
        ).transpose(1, 2),
    }
    if device.type == "cuda":
        unaligned = sizes.log().to(dtype)[:, None, None, :]
        forms |= {
            "bias made before, cuDNN": lambda: sdpa(query, key, value, stored, SDPBackend.CUDNN_ATTENTION),
            "bias made before, memory-efficient": lambda: attention.attend_efficiently(
                query, key, value, stored, scaling
            ).transpose(1, 2),
            "bias made before, not aligned, memory-efficient": lambda: sdpa(
                query, key, value, unaligned, SDPBackend.EFFICIENT_ATTENTION
            ),
            "values weighed, memory-efficient": lambda: weighed(False, SDPBackend.EFFICIENT_ATTENTION),
            "values weighed and heads padded, flash": lambda: weighed(True, SDPBackend.FLASH_ATTENTION),
            "heads extended, flash": lambda: extended(SDPBackend.FLASH_ATTENTION),
        }
    return forms


@torch.no_grad()
def measure_attention(args) -> list[list[object]]:
    device, rows = torch.device(args.device), []
    for tokens in args.tokens:
        forms = attention_forms(args, tokens)
        dense = microseconds(forms["no sizes"], device)
        expected = forms["bias, torch's choice of kernel"]()
        for name, form in forms.items():
            try:
                error = (form() - expected).abs().max().item()
                taken = microseconds(form, device)
            except Exception as reason:  # a kernel that does not take these shapes is a result
                rows.append([tokens, name, f"failed: {type(reason).__name__}", "n/a", "n/a"])
                continue
            difference = "n/a" if name == "no sizes" else f"{error:.1e}"
            rows.append([tokens, name, f"{taken:.1f}", f"{taken / dense:.2f}", difference])
            print(rows[-1], flush=True)
        write_table(args, ["tokens", "form", "µs", "over no sizes", "largest difference to the bias"], rows)
    return rows


@torch.no_grad()
def measure_kernels(args) -> list[list[object]]:
    device, rows = torch.device(args.device), []
    header = ["tokens", "what", "PyTorch µs", "PyTorch compiled µs", "Triton µs", "compiled over Triton"]
    if device.type != "cuda":
        rows.append(["", "skipped: the kernels need a GPU", "", "", "", ""])
        write_table(args, header, rows)
        return rows
    if not kernels.SWITCH.is_on(torch.device("cuda", torch.cuda.current_device()), getattr(torch, args.dtype)):
        rows.append(["", "skipped: the kernels are off here, see the log", "", "", "", ""])
        write_table(args, header, rows)
        return rows

    for tokens in args.tokens:
        for name, functions in kernel_calls(args, tokens).items():
            eager, compiled, triton = (microseconds(function, device) for function in functions)
            row = [tokens, name, f"{eager:.1f}", f"{compiled:.1f}", f"{triton:.1f}", f"{compiled / triton:.2f}"]
            rows.append(row)
            print(row, flush=True)
        write_table(args, header, rows)
    return rows


def kernel_calls(args, tokens: int) -> dict[str, tuple[Callable[[], object], ...]]:
    """Each step of merging in PyTorch, in PyTorch compiled, and in Triton, as calls without arguments."""
    device, dtype, hidden = torch.device(args.device), getattr(torch, args.dtype), args.heads * args.head_dim

    def plan(keys: torch.Tensor) -> MergePlan:
        return match_tokens(keys.mean(dim=2), args.r, 1)

    def merge(residual: torch.Tensor, branch: torch.Tensor, plan: MergePlan, sizes: torch.Tensor):
        hidden_states, sizes = merge_tokens(residual + branch, sizes, plan)
        return hidden_states, sizes, attention.proportional_bias(sizes, residual.dtype)

    keys = torch.randn(args.batch_size, tokens, args.heads, args.head_dim, device=device).to(dtype)
    residual, branch = (torch.randn(args.batch_size, tokens, hidden, device=device).to(dtype) for _ in range(2))
    sizes = torch.randint(1, 9, (args.batch_size, tokens), device=device).float()
    made = plan(keys)
    compiled_plan, compiled_merge = torch.compile(plan, dynamic=False), torch.compile(merge, dynamic=False)
    return {
        "plan": (lambda: plan(keys), lambda: compiled_plan(keys), lambda: kernels.fused_plan(keys, args.r, 1)),
        "merge": (
            lambda: merge(residual, branch, made, sizes),
            lambda: compiled_merge(residual, branch, made, sizes),
            lambda: kernels.fused_merge(residual, branch, made, sizes),
        ),
    }


def write_table(args, header: list[str], rows: list[list[object]]) -> None:
    """Write what there is so far, so that a run that is interrupted keeps it."""
    lines = [
        f"# {args.part.capitalize()} of a merging layer, {datetime.date.today().isoformat()}",
        "",
        f"{describe_device(args.device)}; torch {torch.__version__}; {args.dtype}, batch {args.batch_size}, "
        f"{args.heads} heads of {args.head_dim}.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    args.output.write_text("\n".join(lines) + "\n")


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    measure_attention(args) if args.part == "attention" else measure_kernels(args)


if __name__ == "__main__":
    main()
