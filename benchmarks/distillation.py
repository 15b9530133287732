# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Cost of a distillation step: against the same model without plugins, and against a plain implementation.

    python benchmarks/distillation.py                             # ViT-B/16, batch 32, float32
    python benchmarks/distillation.py --device cuda --dtype bfloat16 --batch_size 128

The plain implementation follows the scheme of the authors' release: one adapter of rank 2 * max_r beside each
projection, of which a mask picks the rows of a degree; a second copy of the model as the teacher; a third for the
moving average. It is timed with the merging of the ToMe release, and with that of tocom_hf, where only plugins differ.
"""

import argparse
import copy
import datetime
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from inference import SIZES, make_model
from reference_tome import layer_forward
from torch import nn

from tocom_hf import apply_tome
from tocom_hf.devices import describe_device, synchronize
from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.degrees import uniform
from tocom_hf.distillation.keyed_random import image_keys
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.merging.backbones import find_backbone


MAX_R, RANK, SCALE, DROPOUT = 16, 2, 0.1, 0.1


class MaskedAdapter(nn.Module):
    """A projection with an adapter of all plugins, of which `mask` picks rows."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.dropout, self.mask = base, nn.Dropout(DROPOUT), None
        self.down = nn.Linear(base.in_features, MAX_R * RANK, bias=False)
        self.up = nn.Linear(MAX_R * RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states):
        output = self.base(hidden_states)
        if self.mask is None:
            return output
        return output + self.up(self.dropout(self.down(hidden_states)) * self.mask)


class Plain:
    """The authors' scheme, step by step."""

    def __init__(self, model, reference_merging: bool):
        self.reference_merging = reference_merging
        self.teacher, self.student = copy.deepcopy(model), model
        self.adapters = []
        backbone = find_backbone(model)
        for path, base in backbone.projections().items():
            adapter = MaskedAdapter(base).to(base.weight.device)
            self.adapters.append(adapter)
            backbone.module.set_submodule(path, adapter)
        model.requires_grad_(False)
        for adapter in self.adapters:
            adapter.down.requires_grad_(True)
            adapter.up.requires_grad_(True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = copy.deepcopy(model)
        self.states = [{}, {}]
        if reference_merging:
            for state, copied in zip(self.states, (self.teacher, self.student), strict=True):
                copied.vit.register_forward_pre_hook(lambda *_, state=state: state.clear())

    def merge_at(self, model, state, r):
        if not self.reference_merging:
            apply_tome(model, r)
            return
        for layer in model.vit.layers:
            layer.forward = functools.partial(layer_forward, layer, state, r, False)

    def loss(self, pixel_values, source_r, target_r):
        mask = torch.zeros(MAX_R * RANK, device=pixel_values.device)
        low, high = sorted((source_r, target_r))
        mask[low * RANK : high * RANK] = SCALE if target_r > source_r else -SCALE
        for adapter in self.adapters:
            adapter.mask = mask
            adapter.dropout.train()
        self.merge_at(self.teacher, self.states[0], source_r)
        self.merge_at(self.student, self.states[1], target_r)
        with torch.no_grad():
            teacher = self.teacher(pixel_values=pixel_values).logits.float().log_softmax(-1)
        student = self.student(pixel_values=pixel_values).logits.float().log_softmax(-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def after_step(self):
        for mean, value in zip(self.average.parameters(), self.student.parameters(), strict=True):
            mean.lerp_(value, 1e-4)


class Ours:
    """What `distill` runs in a step."""

    def __init__(self, model):
        plugins = PluginChain(find_backbone(model), MAX_R, RANK, SCALE, DROPOUT).to(next(model.parameters()).device)
        self.distiller = SelfDistiller(find_backbone(model.requires_grad_(False)), plugins, OBJECTIVES["logits"])
        self.parameters, self.step = list(plugins.parameters()), 0

    def loss(self, pixel_values, source_r, target_r):
        index = torch.arange(len(pixel_values))
        keys = image_keys(0, torch.full_like(index, self.step), index).to(pixel_values.device)
        self.step += 1
        return self.distiller.loss(pixel_values, source_r, target_r, keys)

    def after_step(self):
        pass


class WithoutPlugins:
    """Teacher forward, student forward, and a backward pass for the activations only."""

    def __init__(self, model):
        self.model = model.requires_grad_(False)
        self.parameters = []
        find_backbone(model).layers[0].register_forward_pre_hook(
            lambda module, args: (args[0].requires_grad_(torch.is_grad_enabled()), *args[1:])
        )

    def loss(self, pixel_values, source_r, target_r):
        with torch.no_grad():
            teacher = apply_tome(self.model, source_r)(pixel_values=pixel_values).logits.float().log_softmax(-1)
        student = apply_tome(self.model, target_r)(pixel_values=pixel_values).logits.float().log_softmax(-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def after_step(self):
        pass


VARIANTS = {
    "without plugins": WithoutPlugins,
    "tocom_hf": Ours,
    "plain, merging of tocom_hf": lambda model: Plain(model, reference_merging=False),
    "plain, merging of the ToMe release": lambda model: Plain(model, reference_merging=True),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="b")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "distillation.md")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    return parser.parse_args()


def make(name: str, args: argparse.Namespace):
    variant = VARIANTS[name](make_model(args.model, 224).to(args.device))
    variant.optimizer = torch.optim.AdamW(variant.parameters, 1e-3) if variant.parameters else None
    return variant


def train_step(variant, pixel_values: torch.Tensor, pair: tuple[int, int], dtype: str) -> None:
    device = pixel_values.device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = variant.loss(pixel_values, *pair)
    loss.backward()
    if variant.optimizer is not None:
        variant.optimizer.step()
        variant.optimizer.zero_grad()
    variant.after_step()


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """MiB at the peak of three steps at the dearest pairs, beyond what the imports take, in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", name, "--model", args.model, "--device", args.device]
    command += ["--batch_size", str(args.batch_size), "--dtype", args.dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> None:
    import resource

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # a first small step loads the libraries' code
    small = make_model("s", 224)
    small(pixel_values=torch.randn(1, 3, 224, 224)).logits.sum().backward()
    del small
    before = resident()
    variant, pixel_values = make(args.memory_of, args), torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    for pair in ((16, 0), (0, 16), (1, 0)):
        train_step(variant, pixel_values, pair, args.dtype)
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else resident() - before
    print(json.dumps(peak / 2**20))


def main() -> None:
    args = parse_args()
    if args.memory_of:
        measure_memory(args)
        return
    memory = {name: peak_memory(name, args) for name in VARIANTS}
    torch.manual_seed(0)
    pixel_values = torch.randn(args.batch_size, 3, 224, 224).to(args.device)
    variants = {name: make(name, args) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_ in range(args.rounds + 1):
        [pair] = uniform(0, round_, MAX_R)
        for name, variant in variants.items():
            synchronize(pixel_values.device)
            start = time.perf_counter()
            train_step(variant, pixel_values, pair, args.dtype)
            synchronize(pixel_values.device)
            times[name].append(time.perf_counter() - start)
    times = {name: values[1:] for name, values in times.items()}

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    lines = [
        f"# A distillation step, {datetime.date.today().isoformat()}",
        "",
        f"{describe_device(args.device)}; torch {torch.__version__}; ViT-{args.model.upper()}/16, 224 px, batch "
        f"{args.batch_size}, {args.dtype}; {args.rounds} interleaved rounds at uniform pairs of degrees in 0..{MAX_R}, "
        "medians of the ratios of each round.",
        "",
        "| | time over without plugins | speed of tocom_hf over this | peak MiB | peak of tocom_hf over this |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {ratio(name, 'without plugins'):.3f} | {ratio(name, 'tocom_hf'):.3f} | {memory[name]:.0f} | "
        f"{memory['tocom_hf'] / memory[name]:.3f} |"
        for name in VARIANTS
    ]
    args.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
