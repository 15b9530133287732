# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Where a merged token of a model with rotary positions stands, and by which keys tokens are matched.

    python benchmarks/rotary.py --output_dir runs/rotary --output benchmarks/rotary

trains small DINOv3 models on scenes that it draws itself, a digit and a bar on coloured noise, and compares six ways to
merge their tokens by how well features agree with those without merging. It takes ten minutes of one core for each
model. Stopped or killed, it goes on where the last state was saved.
"""

import argparse
import copy
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sessions import Results, versions
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, get_cosine_schedule_with_warmup

from tocom_hf import apply_tome
from tocom_hf.merging.tokens import follow_tokens, match_tokens, merge_tokens, restore_tokens


sys.path.append(str(Path(__file__).parent / "fidelity"))
from images import STYLES, affine


SIZE, PATCH, REGISTERS = 64, 8, 4  # pixels, pixels, tokens
CLASSES = {"digit": 10, "direction": 8, "side": 4}  # what the class token tells: which digit, which bar, where
KINDS = 3  # what a patch tells: whether it shows ground, bar or digit
POOL, BATCH = 12_000, 32  # images to train on, and of a step
SAVE_STEPS = 100
POSITIONS = {
    "mean of coordinates": "coordinates",
    "mean of cos and sin": "cos_sin",
    "that of the B token": "kept",
}
MEASURES = {
    "class": "class feature",
    "mean": "mean of patches",
    "patch": "patches",
    "top1": "top-1, class",
    "dense": "top-1, patches",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the models go.")
    parser.add_argument("--output", type=Path, required=True, help="The table, without its ending.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="One model for each.")
    parser.add_argument("--max_steps", type=int, default=1200, help="Steps of 32 images.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Of AdamW; that of Muon is 20 times as high.")
    parser.add_argument("--r", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--images", type=int, default=500, help="Unseen images to compare on.")
    return parser.parse_args()


class Scenes(nn.Module):
    """A DINOv3 with a head for the class token and one for every patch."""

    def __init__(self) -> None:
        super().__init__()
        config = DINOv3ViTConfig(
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=288,
            image_size=SIZE,
            patch_size=PATCH,
            num_register_tokens=REGISTERS,
        )
        self.backbone = DINOv3ViTModel(config)
        self.classes = nn.Linear(config.hidden_size, sum(CLASSES.values()))
        self.kinds = nn.Linear(config.hidden_size, KINDS)

    def heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the class token, `(batch, classes)`, and of the patches, `(batch, patches, kinds)`."""
        return self.classes(hidden_states[:, 0]), self.kinds(hidden_states[:, 1 + REGISTERS :])


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes, float32 `(count, 3, size, size)`, with their classes `(count, 3)` and the kinds of their patches."""
    generator = random.Random(seed)
    scenes = [_scene(generator) for _ in range(count)]
    pixels, classes, kinds = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(), classes, kinds


def _scene(generator: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    style = STYLES["cluttered"]
    canvas = style.smooth(SIZE, generator)
    while True:
        (x, y), (u, v) = [[generator.uniform(12, SIZE - 12) for _ in range(2)] for _ in range(2)]
        if math.hypot(x - u, y - v) > 24:
            break
    angle = generator.uniform(0, math.pi)
    reach = [generator.uniform(9, 12) * part for part in (math.cos(angle), math.sin(angle))]
    bar = Image.new("L", (SIZE, SIZE))
    ends = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
    ImageDraw.Draw(bar).line(ends, fill=255, width=generator.randint(3, 5))

    digit = generator.randrange(10)
    font = ImageFont.load_default(generator.uniform(22, 30))
    glyph = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(glyph).text((SIZE / 2, SIZE / 2), str(digit), fill=255, font=font, anchor="mm")
    glyph = glyph.transform(glyph.size, Image.AFFINE, affine(SIZE // 4, random.Random(0)), Image.BICUBIC)
    glyph = glyph.rotate(generator.uniform(-15, 15), Image.BICUBIC)
    box = glyph.getbbox()
    shift = round(u - (box[0] + box[2]) / 2), round(v - (box[1] + box[3]) / 2)
    moved = Image.new("L", (SIZE, SIZE))
    moved.paste(glyph, shift)

    for mask in (bar, moved):
        canvas.paste(style.colour(canvas, generator), (0, 0), mask)
    side = int(math.atan2(v - y, u - x) / (math.pi / 2) + 0.5 + 4) % 4
    classes = np.array([digit, int(8 * angle / math.pi), side])
    cells = [np.asarray(mask.reduce(PATCH), dtype=float).flatten() for mask in (bar, moved)]
    kinds = np.argmax([np.full(len(cells[0]), 20.0), *cells], axis=0)
    return np.asarray(canvas), classes, kinds


def train(seed: int, folder: Path, max_steps: int, learning_rate: float) -> Scenes:
    """Train a model, or load what is there of it."""
    torch.manual_seed(seed)
    model = Scenes()
    matrices = [weight for name, weight in model.named_parameters() if ".layer." in name and weight.ndim == 2]
    rest = [weight for name, weight in model.named_parameters() if ".layer." not in name or weight.ndim != 2]
    optimizers = [
        torch.optim.Muon(matrices, 20 * learning_rate, weight_decay=0.05),
        torch.optim.AdamW(rest, learning_rate),
    ]
    schedulers = [get_cosine_schedule_with_warmup(optimizer, 50, max_steps) for optimizer in optimizers]
    parts, start = (model, *optimizers, *schedulers), 0
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"seed_{seed}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["step"]
        for part, part_state in zip(parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
    if start >= max_steps:
        return model.eval()
    began = time.monotonic()
    pool = draw(POOL, seed=100 + seed)
    for step in range(start + 1, max_steps + 1):
        # every step chooses images and jitter by its number, so that a run that goes on does as one that never stopped
        torch.manual_seed(1_000_000 * (seed + 1) + step)
        chosen = torch.randint(POOL, (BATCH,))
        pixels, classes, kinds = (part[chosen] for part in pool)
        model.train()
        whole, dense = model.heads(model.backbone(pixels).last_hidden_state)
        loss = F.cross_entropy(dense.flatten(0, 1), kinds.flatten())
        for logits, wanted in zip(whole.split(list(CLASSES.values()), dim=1), classes.unbind(1), strict=True):
            loss = loss + F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % SAVE_STEPS == 0 or step == max_steps:
            state = {"step": step, "parts": [part.state_dict() for part in parts]}
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
            accuracy = " ".join(f"{part:.3f}" for part in accuracies(model.eval(), *draw(500, seed=1)))
            print(f"seed {seed} step {step}, {time.monotonic() - began:.0f} s: loss {loss:.3f}, {accuracy}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracies(model: Scenes, pixels: torch.Tensor, classes: torch.Tensor, kinds: torch.Tensor) -> list[float]:
    """Share of images of which each class is right, and of patches."""
    whole, dense = model.heads(model.backbone(pixels).last_hidden_state)
    found = torch.stack([part.argmax(1) for part in whole.split(list(CLASSES.values()), dim=1)], dim=1)
    return [*(found == classes).float().mean(0).tolist(), (dense.argmax(-1) == kinds).float().mean().item()]


@torch.no_grad()
def merged(model: DINOv3ViTModel, pixels: torch.Tensor, r: int, position: str, after_rotation: bool) -> torch.Tensor:
    """The last hidden state with merged tokens at the places that they came from, `(batch, tokens, hidden)`.

    Written out here for all six variants; `check` compares the one that the package has with the package.

    Args:
        model: The model without merging.
        pixels: Images.
        r: How many tokens each layer merges.
        position: One of the values of `POSITIONS`.
        after_rotation: Whether tokens are matched by their rotated keys.
    """
    protected = 1 + REGISTERS
    hidden_states = model.embeddings(pixels)
    batch = hidden_states.shape[0]
    frequencies = 2 * math.pi * model.rope_embeddings.inv_freq
    cells = (torch.arange(SIZE // PATCH) + 0.5) / (SIZE // PATCH) * 2 - 1
    centres = torch.cartesian_prod(cells, cells)  # (patches, 2)
    centres = torch.cat([torch.zeros(protected, 2), centres]).expand(batch, -1, -1)
    # what a token knows of its place: coordinates, or cosine and sine
    places = torch.cat(_cos_sin(centres, frequencies), dim=-1) if position == "cos_sin" else centres
    sizes, plans = None, []
    for layer in model.model.layer:
        attention = layer.attention
        cos, sin = places.chunk(2, dim=-1) if position == "cos_sin" else _cos_sin(places, frequencies)
        normed = layer.norm1(hidden_states)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (
            part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in projections
        )
        turned = [_turn(part, cos, sin, protected) for part in (query, key)]
        bias = None if sizes is None else sizes.log()[:, None, None].to(query.dtype)
        output = F.scaled_dot_product_attention(*turned, value, attn_mask=bias)
        branch = attention.o_proj(output.transpose(1, 2).flatten(2))
        hidden_states = hidden_states + layer.layer_scale1(branch)
        metric = (turned[1] if after_rotation else key).mean(1)
        plan = match_tokens(metric, min(r, (normed.shape[1] - protected) // 2), protected)
        if position == "kept":
            places = places.reshape(-1, 2)[plan.kept]
        else:
            places, _ = merge_tokens(places, sizes, plan)
        hidden_states, sizes = merge_tokens(hidden_states, sizes, plan)
        plans.append(plan)
        hidden_states = hidden_states + layer.layer_scale2(layer.mlp(layer.norm2(hidden_states)))
    return model.norm(restore_tokens(hidden_states, follow_tokens(plans)))


def _cos_sin(coordinates: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (coordinates.unsqueeze(-1) * frequencies).flatten(2).tile(2)  # (batch, tokens, head_dim)
    return angles.cos(), angles.sin()


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, protected: int) -> torch.Tensor:
    first, behind = heads[:, :, :protected], heads[:, :, protected:]
    cos, sin = cos[:, None, protected:], sin[:, None, protected:]
    half = behind.shape[-1] // 2
    other = torch.cat([-behind[..., half:], behind[..., :half]], dim=-1)
    return torch.cat([first, behind * cos + other * sin], dim=2)


@torch.no_grad()
def check(model: DINOv3ViTModel, pixels: torch.Tensor, r: int) -> None:
    """Compare the package with the variant that it has, in float64.

    The images get noise: on plain ground, neighbours to the left and to the right are equally similar, and rounding
    decides between them.
    """
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    model, pixels = copy.deepcopy(model).double(), (pixels + noise).double()
    own = merged(model, pixels, r, "cos_sin", after_rotation=True)
    package = apply_tome(model, r)(pixels).last_hidden_state
    difference = (own - package).abs().max().item()
    if difference > 1e-5:
        raise SystemExit(f"The package merges otherwise than this script: features differ by up to {difference:.1e}.")


@torch.no_grad()
def compare(model: Scenes, pixels: torch.Tensor, r: int, position: str, after_rotation: bool) -> dict[str, list[float]]:
    """For every image, how well merged features agree with those without merging."""
    figures: dict[str, list[float]] = {}
    for part in pixels.split(250):
        dense = model.backbone(part).last_hidden_state
        other = merged(model.backbone, part, r, position, after_rotation)
        patches = [states[:, 1 + REGISTERS :] for states in (dense, other)]
        before, after = model.heads(dense), model.heads(other)
        sizes = list(CLASSES.values())
        same = [
            (a.argmax(1) == b.argmax(1)).float()
            for a, b in zip(*(h[0].split(sizes, 1) for h in (before, after)), strict=True)
        ]
        found = {
            "class": F.cosine_similarity(dense[:, 0], other[:, 0]),
            "mean": F.cosine_similarity(*(states.mean(1) for states in patches)),
            "patch": F.cosine_similarity(*patches, dim=-1).mean(1),
            "top1": torch.stack(same).mean(0),
            "dense": (before[1].argmax(-1) == after[1].argmax(-1)).float().mean(1),
        }
        for name, values in found.items():
            figures.setdefault(name, []).extend(values.tolist())
    return figures


def summary(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    models = {seed: train(seed, args.output_dir, args.max_steps, args.learning_rate) for seed in args.seeds}
    scenes = draw(args.images, seed=2)
    shares = [f"seed {seed}: " + ", ".join(f"{x:.2f}" for x in accuracies(m, *scenes)) for seed, m in models.items()]
    results = Results(
        args.output,
        "Where a merged token of a DINOv3 stands",
        {"r": "r", "position": "position of a merged token", "matching": "matched by keys", **MEASURES},
        [
            f"Six layers of 64 patches and 5 other tokens, {args.images} unseen images. Accuracy without merging of "
            f"{', '.join(CLASSES)} and patches (chance 0.10, 0.12, 0.25): {'; '.join(shares)}.",
            "Agreement with r = 0. Cosines of the class feature, of the mean of the patches, and of each patch, "
            "restored; top-1 of the heads of the class token and of the patches.",
            "Every cell: mean, and behind it the difference to the first row of this r with its standard error, over "
            "the same images, in units of the last digit.",
            "The package has the mean of cos and sin, and matches by keys after rotation.",
        ],
        versions("torch", "transformers"),
        resume=True,
    )
    for r in args.r:
        for model in models.values():
            check(model.backbone, scenes[0][:32], r)
        reference: dict[str, list[float]] = {}
        for after_rotation in (False, True):
            for name, position in POSITIONS.items():
                row = {"r": r, "position": name, "matching": "after rotation" if after_rotation else "before rotation"}
                if reference and results.has(**row):
                    continue
                figures: dict[str, list[float]] = {}
                for model in models.values():
                    for measure, values in compare(model, scenes[0], r, position, after_rotation).items():
                        figures.setdefault(measure, []).extend(values)
                reference = reference or figures
                if not results.has(**row):
                    results.add([row | {name: cell(values, reference[name]) for name, values in figures.items()}])
    results.add([])  # the table is written anew, whatever was there


def cell(values: list[float], reference: list[float]) -> str:
    """The mean of a measure, and its difference to the reference on the same images."""
    mean, _ = summary(values)
    if values is reference:
        return f"{mean:.4f}"
    difference, error = summary([a - b for a, b in zip(values, reference, strict=True)])
    return f"{mean:.4f} ({1e4 * difference:+.0f} ± {1e4 * error:.0f})"


if __name__ == "__main__":
    main()
