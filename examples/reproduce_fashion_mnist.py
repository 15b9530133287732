# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Make the embedded Fashion-MNIST default (checkpoint, plugin set, test images) from the raw data.

Training and distillation skip what is there and resume where they were stopped, so the commands can be repeated. The
first makes the drawings, letters and strokes that every second view of the shipped set shows:

    apt-get install tuxpaint-stamps-default openclipart-png dataset-fashion-mnist \\
        fonts-dejavu-extra fonts-freefont-ttf fonts-urw-base35
    python benchmarks/fidelity/run.py --config benchmarks/fidelity/study_a.json --stages data \\
        --set 'style="plain-no-clothing"' distillation_images=13400 --output_dir runs/more-images
    python examples/reproduce_fashion_mnist.py --more_images runs/more-images/data/distil.parquet \\
        --output_dir runs/fashion-mnist

With `--checkpoint examples/fashion_mnist/checkpoint` it makes the plugin set alone, for the checkpoint that is there.
`examples/push_to_hub.py --card_only` writes its card.
"""

import argparse
import copy
import gzip
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, get_cosine_schedule_with_warmup

from tocom_hf import PluginSet, TocomModel
from tocom_hf.cli.endings import CommandParser, extras_or_exit, run_command
from tocom_hf.cli.loading import load_config, load_model
from tocom_hf.plugins.config import CONFIG_NAME


COMMAND = "reproduce_fashion_mnist.py"

with extras_or_exit(COMMAND):
    import datasets
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from PIL import Image

    from tocom_hf.data.images import TrainingImages, load_images
    from tocom_hf.distillation.distill import DistillationArguments, distill


LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]
VALIDATION = 2_000  # the last images of the training file, used to pick the scale and never trained on
TEST_IMAGES = 800  # the first images of the test file, which the repository carries
DEGREES = (0, 2, 4, 6, 8)
SCALES = (0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
FILES = [f"{split}-{name}-ubyte.gz" for split in ("train", "t10k") for name in ("images-idx3", "labels-idx1")]
PROCESSOR = ViTImageProcessorPil(size={"height": 28, "width": 28})


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="Folder of the four idx files (default: where Debian's dataset-fashion-mnist puts them).",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8, help="Epochs of training.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument(
        "--checkpoint", type=Path, help="Folder of a checkpoint to make plugins for, instead of training one."
    )
    parser.add_argument(
        "--more_images",
        type=Path,
        help="Parquet file of drawings, letters and strokes; every second view is a random part of one.",
    )
    parser.add_argument("--plugin_steps", type=int, default=4000, help="Steps of distillation, of 64 views.")
    parser.add_argument("--plugin_lr", type=float, default=3.2e-2, help="Learning rate at a batch of 512.")
    args = parser.parse_args(argv)
    problem = wrong_input(args) or other_settings(args)
    if problem:
        parser.error(problem)
    return args


def wrong_input(args: argparse.Namespace) -> str | None:
    """What would stop the run hours later."""
    for path in (*(args.data_dir / name for name in FILES), args.more_images):
        if path is not None and not path.is_file():
            return f"There is no file {path}."
    if args.checkpoint is not None:
        if not (args.checkpoint / "config.json").is_file():
            return f"There is no checkpoint in {args.checkpoint}: it has no config.json."
        config = load_config(args.checkpoint)
        if not (config.model_type == "vit" and config.image_size == 28 and config.num_labels == len(LABELS)):
            return f"{args.checkpoint} is no ViT for the 28 px and the ten classes of Fashion-MNIST."
        if getattr(config, "tocom", {"source_r": 0})["source_r"] != 0:
            return f"{args.checkpoint} was trained while merging tokens; the figures recorded are those of r = 0."
    return None


def other_settings(args: argparse.Namespace) -> str | None:
    """What differs from the run that is to go on, whose stages are not done anew. Notes the settings of a new one."""
    names = ("seed", "epochs", "batch_size", "checkpoint", "more_images", "plugin_steps", "plugin_lr")
    settings = {name: getattr(args, name) for name in names}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    noted = args.output_dir / "settings.json"
    if noted.is_file():
        before = json.loads(noted.read_text(encoding="utf-8"))
        changed = [f"--{name} {before.get(name)}" for name in names if before.get(name) != settings[name]]
        if changed:
            return f"{args.output_dir} was begun with {', '.join(changed)}. Use that, or another output_dir."
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return None


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes, the format of MNIST and its relatives."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def load_split(data_dir: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as uint8 `(n, 28, 28)` and labels as int64 `(n,)`."""
    images = torch.from_numpy(read_idx(data_dir / f"{prefix}-images-idx3-ubyte.gz"))
    labels = torch.from_numpy(read_idx(data_dir / f"{prefix}-labels-idx1-ubyte.gz"))
    return images, labels.long()


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """What the checkpoint's image processor does: three channels in [-1, 1]."""
    return (images.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random horizontal flip and a random shift of up to two pixels for each image."""
    count = len(images)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None], images.flip(-1), images)
    shift = torch.randint(0, 5, (2, count, 1), generator=generator) + torch.arange(28)
    padded = F.pad(images, (2, 2, 2, 2))
    return padded[torch.arange(count)[:, None, None], shift[0][:, :, None], shift[1][:, None, :]]


def make_model() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=256,
        image_size=28, patch_size=4, num_channels=3, initializer_range=0.08,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def accuracy(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        hits = sum(
            (model(pixel_values=to_pixel_values(x)).logits.argmax(-1) == y).sum().item()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return hits / len(labels)


def train(model, images, labels, args: argparse.Namespace) -> ViTForImageClassification:
    """Train with a cosine schedule; the state after every epoch is on disk, written atomically."""
    state_file, epochs, lr = args.output_dir / "train.pt", args.epochs, 1e-3
    train_x, train_y = images[:-VALIDATION], labels[:-VALIDATION]
    steps = len(train_x) // args.batch_size
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim != 2]
    # Muon for the matrices of the layers: it reaches after one epoch what AdamW reaches after several
    optimizers = [torch.optim.Muon(matrices, 20 * lr, weight_decay=0.05), torch.optim.AdamW(rest, lr)]
    schedulers = [get_cosine_schedule_with_warmup(o, steps // 4, steps * epochs) for o in optimizers]
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["epoch"]
        for part, part_state in zip((model, *optimizers, *schedulers), state["parts"], strict=True):
            part.load_state_dict(part_state)
    for epoch in range(start, epochs):
        model.train()
        generator = torch.Generator().manual_seed(1_000 * args.seed + epoch)
        total = 0.0
        for batch in torch.randperm(len(train_x), generator=generator).split(args.batch_size)[:steps]:
            pixel_values = to_pixel_values(augment(train_x[batch], generator))
            logits = model(pixel_values=pixel_values).logits
            loss = F.cross_entropy(logits, train_y[batch], label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            total += loss.item()
        state = {"epoch": epoch + 1, "parts": [p.state_dict() for p in (model, *optimizers, *schedulers)]}
        torch.save(state, state_file.with_suffix(".part"))
        os.replace(state_file.with_suffix(".part"), state_file)
        held_out = accuracy(model, images[-VALIDATION:], labels[-VALIDATION:])
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f} held-out {held_out:.4f}", flush=True)
    return model


class Views(Dataset):
    """Random variants of unlabelled images, which depend on the seed alone.

    Args:
        images: Fashion-MNIST, uint8 `(n, 28, 28)`, flipped and shifted as in training.
        more: Other images, of which every second view shows a random part; or none.
        count: Views to make.
        seed: Decides them.
    """

    def __init__(self, images: torch.Tensor, more: TrainingImages | None, count: int, seed: int):
        self.images, self.more, self.count, self.seed = images, more, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        values = np.random.default_rng((self.seed, index))
        if self.more is not None and index % 2:
            return {"pixel_values": self.more.view(index // 2 % len(self.more), values).float() / 127.5 - 1}
        generator = torch.Generator().manual_seed(int(values.integers(2**63)))
        chosen = int(values.integers(len(self.images)))
        return {"pixel_values": to_pixel_values(augment(self.images[chosen][None], generator))[0]}


def grid(model, plugins: PluginSet, images, labels, scale: float, degrees=DEGREES) -> dict[str, float]:
    """Accuracy at several degrees of the checkpoint trained at r = 0, composed with the given scale."""
    composed = TocomModel.from_pretrained(copy.deepcopy(model), plugins=plugins, source_r=0, scale=scale)
    results = {}
    for degree in degrees:
        with composed.at(degree):
            results[str(degree)] = round(accuracy(composed, images, labels), 4)
    return results


def pick_scale(model, plugins: PluginSet, images, labels) -> tuple[float, dict[str, float]]:
    """The scale with the best mean accuracy over the degrees on held-out images, and that mean for every scale."""
    means = {s: sum(grid(model, plugins, images, labels, s, DEGREES[1:]).values()) / 4 for s in SCALES}
    for scale, mean in means.items():
        print(f"scale {scale}: held-out mean accuracy {mean:.4f}", flush=True)
    return max(means, key=means.__getitem__), {str(scale): round(mean, 4) for scale, mean in means.items()}


def export(model, plugins: PluginSet, args: argparse.Namespace) -> None:
    """Write what the repository carries, with the figures on all 10,000 test images."""
    images, labels = load_split(args.data_dir, "train")
    scale, means = pick_scale(model, plugins, images[-VALIDATION:], labels[-VALIDATION:])
    test_images, test_labels = load_split(args.data_dir, "t10k")
    plain, tocom, flipped = (grid(model, plugins, test_images, test_labels, s) for s in (0.0, scale, -scale))
    plugins.config.recommended_scale = scale
    plugins.config.license = "apache-2.0"
    plugins.config.evaluation = [
        {
            "dataset": "Fashion-MNIST", "dataset_id": "zalando-datasets/fashion_mnist", "split": "test",
            "checkpoint": "vit-fashion-mnist", "source_r": 0, "target_r": degree, "scale": scale,
            "plain": plain[str(degree)], "tocom": tocom[str(degree)],
            "standard_error": round(math.sqrt(plain[str(degree)] * (1 - plain[str(degree)]) / len(test_labels)), 4),
        }
        for degree in DEGREES
    ]  # fmt: skip
    plugins.config.training |= {
        "dataset_id": "zalando-datasets/fashion_mnist",
        "held_out_mean_accuracy_by_scale": means,
        "test_accuracy": {"plain": plain, "tocom": tocom, "tocom_sign_flipped": flipped},
    }
    print(json.dumps(plugins.config.training, indent=2))
    plugins.save_pretrained(args.output_dir / "tocom-vit-fashion-mnist")
    if args.checkpoint is not None:
        return
    TocomModel.from_pretrained(model, source_r=0).save_pretrained(args.output_dir / "checkpoint")
    PROCESSOR.save_pretrained(args.output_dir / "checkpoint")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    chosen = {
        "image": [Image.fromarray(image.numpy()) for image in test_images[:TEST_IMAGES]],
        "label": test_labels[:TEST_IMAGES].tolist(),
    }
    part = args.output_dir / "test.parquet.part"
    datasets.Dataset.from_dict(chosen, features=features).to_parquet(part)
    os.replace(part, args.output_dir / "test.parquet")


def make_plugins(
    model: ViTForImageClassification, images: torch.Tensor, folder: Path, args: argparse.Namespace
) -> None:
    """Distil on features: they serve other tasks better than the logits of this one."""
    settings = DistillationArguments(
        output_dir=str(folder),
        objective="features",
        max_r=DEGREES[-1],
        lora_dropout=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=64,
        learning_rate=args.plugin_lr,
        ema_decay=0.99,
        min_crop=0.25,
        save_steps=500,
        resume_from_checkpoint="latest",
        seed=args.seed,
    )
    more, count, dataset = None, len(images), f"{len(images):,} training images of Fashion-MNIST, flipped and shifted"
    if args.more_images is not None:
        found = load_images(str(args.more_images))
        more = TrainingImages(found, PROCESSOR, min_crop=settings.min_crop, flip=settings.flip)
        dataset += f", and random parts of {len(more):,} drawings, letters and strokes, half of the views each"
        count += len(more)
    views = Views(images, more, args.plugin_steps * settings.per_device_train_batch_size, args.seed)
    facts = {"dataset": dataset, "num_images": count, "num_views": len(views)}
    plugins = distill(
        model, views, settings, Accelerator(cpu=True), base_model="vit-fashion-mnist", training_facts=facts
    )
    plugins.save_pretrained(folder)


def reproduce(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    images, labels = load_split(args.data_dir, "train")
    if args.checkpoint is None:
        model = train(make_model(), images, labels, args)
    else:
        model = load_model(ViTForImageClassification, args.checkpoint)
    folder = args.output_dir / "distilled"
    if not (folder / CONFIG_NAME).exists():
        make_plugins(model, images[:-VALIDATION], folder, args)
    export(model, PluginSet.from_pretrained(folder), args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, reproduce, argv)


if __name__ == "__main__":
    sys.exit(main())
