# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Train the small ViT that the repository carries further, on the wider mix of `mix.py`.

    python benchmarks/fidelity/pretrain.py --output_dir runs/mix

takes half an hour on two cores and writes the backbone to runs/mix/backbone: what the repository carries as
examples/digits/backbone. The head has the classes of all four groups, and the loss of an image is over those of its
own; those that stand for a single drawing are left out at the end. Stopped or killed, it goes on where the last state
was saved.

    python benchmarks/fidelity/pretrain.py --model examples/digits/backbone --pose_weight 1 --output_dir runs/pose

teaches that backbone the pose of what an image shows, too.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from mix import Group, make_mix
from transformers import AutoImageProcessor, ViTForImageClassification, get_cosine_schedule_with_warmup


BATCH = {"clothing": 32, "letter": 44, "shape": 16, "drawing": 36}  # images of each group in a step
MIRRORED = ("clothing", "drawing")  # the others mean something else in a mirror
HELD_OUT = 1000  # images of each group
SAVE_STEPS = 400


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/fashion_mnist/checkpoint", help="A ViT of 28 px to start from.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=6000, help="Steps of 128 images.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Of AdamW; that of Muon is 20 times as high.")
    parser.add_argument(
        "--pose_weight",
        type=float,
        default=0.0,
        help="Weight of a second loss, of the pose.",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, mirrored: bool, generator: torch.Generator) -> torch.Tensor:
    """A random shift of up to two pixels, and a mirror for every second image where that is allowed."""
    count, size = len(images), images.shape[-1]
    if mirrored:
        flip = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flip[:, None, None], images.flip(-1), images)
    rows, columns = torch.randint(0, 5, (2, count, 1), generator=generator) + torch.arange(size)
    return F.pad(images, (2, 2, 2, 2))[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def pose_of(images: torch.Tensor) -> torch.Tensor:
    """Where what an image shows is, how large, and which way it is elongated, by the moments of its brightness.

    Args:
        images: uint8 `(n, size, size)`, dark where nothing is.

    Returns:
        float32 `(n, 5)`: horizontal and vertical place, log of the spread, and the elongation times cosine and sine of
        twice its direction, which are the same for a direction and its opposite.
    """
    mass = images.float() + 1e-3  # of an empty image, the middle
    mass = mass / mass.sum((1, 2), keepdim=True)
    place = torch.linspace(-1, 1, images.shape[-1])
    x, y = mass.sum(1) @ place, mass.sum(2) @ place
    across, down = place - x[:, None], place - y[:, None]
    xx, yy = (mass.sum(1) * across**2).sum(1), (mass.sum(2) * down**2).sum(1)
    xy = torch.einsum("nij,ni,nj->n", mass, down, across)
    spread = xx + yy
    return torch.stack([x, y, spread.log(), (xx - yy) / spread, 2 * xy / spread], 1)


def split_mix(mix: dict[str, Group]) -> tuple[dict, dict]:
    """Training and held-out images and labels of every group."""
    train, held_out = {}, {}
    for name, group in mix.items():
        order = torch.randperm(len(group.images), generator=torch.Generator().manual_seed(1))
        images, labels = torch.from_numpy(group.images)[order], torch.from_numpy(group.labels)[order]
        held_out[name] = images[:HELD_OUT], labels[:HELD_OUT]
        train[name] = images[HELD_OUT:], labels[HELD_OUT:]
    return train, held_out


def make_model(source: str, mix: dict[str, Group]) -> ViTForImageClassification:
    names = [f"{name}: {label}" for name, group in mix.items() for label in group.names]
    model = ViTForImageClassification.from_pretrained(
        source,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    model.config.__dict__.pop("tocom", None)  # what the start was trained at
    return model


def without_drawings(model: ViTForImageClassification) -> ViTForImageClassification:
    """The same model, its head without the classes that stand for one drawing each."""
    kept = [index for index, name in model.config.id2label.items() if not name.startswith("drawing: ")]
    names = [model.config.id2label[index] for index in kept]
    head = torch.nn.Linear(model.config.hidden_size, len(kept))
    head.load_state_dict({name: value[kept] for name, value in model.classifier.state_dict().items()})
    model.classifier, model.num_labels = head, len(kept)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def accuracies(model: ViTForImageClassification, held_out: dict, sizes: list[int]) -> str:
    """Accuracy within each group."""
    model.eval()
    texts = []
    for index, (name, (images, labels)) in enumerate(held_out.items()):
        with torch.no_grad():
            logits = torch.cat([model(pixel_values=to_pixel_values(part)).logits for part in images.split(500)])
        found = logits.split(sizes, 1)[index].argmax(1)
        texts.append(f"{name} {(found == labels).float().mean():.3f}")
    model.train()
    return ", ".join(texts)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    mix = make_mix()
    sizes = [len(group.names) for group in mix.values()]
    train, held_out = split_mix(mix)
    model = make_model(args.model, mix)
    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    rest = [weight for name, weight in model.named_parameters() if ".layers." not in name or weight.ndim != 2]
    to_pose, features = torch.nn.Linear(model.config.hidden_size, 5), {}
    model.classifier.register_forward_pre_hook(lambda module, inputs: features.update(seen=inputs[0]))
    optimizers = [
        torch.optim.Muon(matrices, 20 * args.learning_rate, weight_decay=0.05),
        torch.optim.AdamW([*rest, *to_pose.parameters()], args.learning_rate),
    ]
    schedulers = [get_cosine_schedule_with_warmup(optimizer, 200, args.max_steps) for optimizer in optimizers]
    parts, generator, start = (model, to_pose, *optimizers, *schedulers), torch.Generator().manual_seed(args.seed), 0
    state_file = args.output_dir / "train.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["step"]
        generator.set_state(state["generator"])
        for part, part_state in zip(parts, state["parts"], strict=True):
            part.load_state_dict(part_state)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.train()
    began, total = time.monotonic(), 0.0
    for step in range(start + 1, args.max_steps + 1):
        images, labels = [], []
        for name, count in BATCH.items():
            chosen = torch.randint(len(train[name][0]), (count,), generator=generator)
            images.append(augment(train[name][0][chosen], name in MIRRORED, generator))
            labels.append(train[name][1][chosen])
        images = torch.cat(images)
        logits = model(pixel_values=to_pixel_values(images)).logits
        loss, row = torch.zeros(()), 0
        for group, wanted in zip(logits.split(sizes, 1), labels, strict=True):
            rows = group[row : row + len(wanted)]
            loss = loss + F.cross_entropy(rows, wanted, label_smoothing=0.1, reduction="sum")
            row += len(wanted)
        loss = loss / row
        if args.pose_weight:
            pose = pose_of(images)
            errors = F.mse_loss(to_pose(features["seen"]), pose, reduction="none").mean(0)
            loss = loss + args.pose_weight * (errors / pose.var(0)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        total += loss.item()
        if step % SAVE_STEPS == 0 or step == args.max_steps:
            state = {"step": step, "generator": generator.get_state(), "parts": [part.state_dict() for part in parts]}
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
            average = total / ((step - 1) % SAVE_STEPS + 1)
            print(f"step {step}, {time.monotonic() - began:.0f} s, loss {average:.3f}, held out: ", end="")
            print(accuracies(model, held_out, sizes), flush=True)
            total = 0.0
    part_folder = args.output_dir / "backbone.part"
    without_drawings(model).save_pretrained(part_folder)
    AutoImageProcessor.from_pretrained(args.model).save_pretrained(part_folder)
    shutil.rmtree(args.output_dir / "backbone", ignore_errors=True)
    part_folder.rename(args.output_dir / "backbone")


if __name__ == "__main__":
    main()
