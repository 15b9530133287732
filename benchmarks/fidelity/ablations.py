# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the parts of the method contribute, on the small ViT that the repository carries.

    apt-get install dataset-fashion-mnist
    python benchmarks/fidelity/ablations.py --output_dir runs/ablations

Each row is a distillation of its own, on Fashion-MNIST training images, judged on test images by the divergence
KL(teacher at m || student at n) over that of token merging alone: below 1 the plugins help. The backbone was trained on
these images, so this compares recipes; whether plugins carry over to other tasks is what the study asks. Sets that are
there already are not distilled again.
"""

import argparse
import copy
import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from images import write_fashion_mnist
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import DistillationArguments, PluginSet, apply_tome, distill
from tocom_hf.data.images import TrainingImages, load_images, with_pixel_values
from tocom_hf.distillation.degrees import SAMPLERS
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.plugins.config import CONFIG_NAME


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "fashion_mnist" / "checkpoint"
DEGREES = (0, 4, 8)
RECIPE = {
    "max_r": 8, "per_device_train_batch_size": 64, "learning_rate": 0.064, "min_crop": 0.5, "logging_steps": 50,
}  # fmt: skip
# pairs of degrees that are always the same: plugins for one change of degree instead of a chain for all
SAMPLERS["only 0 to 8"] = lambda seed, step, max_r: [(0, 8)]
SAMPLERS["only 8 to 0"] = lambda seed, step, max_r: [(8, 0)]
ABLATIONS = {
    "default: rank 2, uniform pairs, logits": {},
    "rank 1": {"rank": 1},
    "rank 8": {"rank": 8},
    "features instead of logits": {"objective": "features"},
    "hidden states instead of logits": {"objective": "hidden_states"},
    "adjacent pairs": {"degree_sampler": "adjacent"},
    "antithetic pairs, half the steps": {"degree_sampler": "antithetic", "half": True},
    "trained on 0 to 8 only": {"degree_sampler": "only 0 to 8"},
    "trained on 8 to 0 only": {"degree_sampler": "only 8 to 0"},
    "500 images": {"images": 500},
    "no dropout": {"lora_dropout": 0.0},
    "proportional attention off": {"proportional_attention": False},
}
SCALES = (-0.1, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ABLATIONS, default=[*ABLATIONS], help="Only these distillations.")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_test_images", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "ablations.md")
    return parser.parse_args()


def make_plugins(settings: dict, data: Path, folder: Path, args: argparse.Namespace) -> PluginSet:
    settings = dict(settings)
    images, steps = settings.pop("images", None), args.max_steps // (2 if settings.pop("half", False) else 1)
    if not (folder / CONFIG_NAME).exists():
        processor = AutoImageProcessor.from_pretrained(CHECKPOINT)
        split = "train" if images is None else f"train[:{images}]"
        dataset = TrainingImages(load_images(str(data / "train.parquet"), split=split), processor, min_crop=0.5)
        arguments = DistillationArguments(**{**RECIPE, "max_steps": steps, "seed": args.seed, **settings})
        model = AutoModelForImageClassification.from_pretrained(CHECKPOINT)
        distill(model, dataset, arguments, base_model="vit-fashion-mnist").save_pretrained(folder)
    return PluginSet.from_pretrained(folder)


class Judge:
    """Divergence between the model at degree m and, with the chain from m to n, at degree n."""

    def __init__(self, data: Path, count: int, proportional_attention: bool = True):
        self.proportional_attention = proportional_attention
        self.model = AutoModelForImageClassification.from_pretrained(CHECKPOINT).eval()
        self.weights = copy.deepcopy(find_backbone(self.model).projections())
        images = load_images(str(data / "test.parquet"), split=f"test[:{count}]")
        processed = with_pixel_values(images, AutoImageProcessor.from_pretrained(CHECKPOINT))
        self.batches = [batch["pixel_values"] for batch in DataLoader(processed, batch_size=250)]
        self.teachers = {r: self.run(r) for r in DEGREES}
        pairs = [(m, n) for m in DEGREES for n in DEGREES if m != n]
        self.plain = {(m, n): self.divergence(self.teachers[m], self.teachers[n]) for m, n in pairs}

    @torch.no_grad()
    def run(self, r: int, composite=None) -> torch.Tensor:
        for path, layer in find_backbone(self.model).projections().items():
            weight = self.weights[path].weight
            layer.weight.copy_(weight if composite is None else composite.apply(path, weight))
        apply_tome(self.model, r, proportional_attention=self.proportional_attention)
        return torch.cat([self.model(pixel_values=batch).logits for batch in self.batches]).log_softmax(-1)

    @staticmethod
    def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """For each image."""
        return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)

    def row(self, name: str, plugins: PluginSet, scale: float | None = None) -> str:
        """Divergence with plugins over that without, of each pair of degrees."""
        cells = []
        for (m, n), plain in self.plain.items():
            fitted = self.divergence(self.teachers[m], self.run(n, plugins.compose(m, n, scale)))
            ratio = fitted.mean() / plain.mean()
            # of a ratio of means over the same images
            error = (fitted - ratio * plain).std() / plain.mean() / len(plain) ** 0.5
            cells.append(f"{ratio:.2f} ± {error:.2f}")
        return f"| {name} | {' | '.join(cells)} |"

    def plain_row(self, name: str) -> str:
        """Divergence of token merging alone."""
        return f"| {name} | {' | '.join(f'{value.mean():.4f}' for value in self.plain.values())} |"


def main() -> None:
    args = parse_args()
    data = args.output_dir / "data"
    if not (data / "test.parquet").exists():
        write_fashion_mnist(data)
    judge = Judge(data, args.num_test_images)
    pairs = [f"{m} to {n}" for m, n in judge.plain]
    lines = [
        f"# Ablations, {datetime.date.today().isoformat()}",
        "",
        f"The embedded ViT (12 layers, 50 tokens), Fashion-MNIST; {args.max_steps} steps of "
        f"{RECIPE['per_device_train_batch_size']} images, seed {args.seed}; {args.num_test_images} test images, which "
        f"the standard errors are over. CPU, torch {torch.__version__}. `python benchmarks/fidelity/ablations.py`",
        "",
        "Divergence of student and teacher over that of token merging alone, from the teacher's degree to the "
        "student's. The rows called KL are the divergence itself.",
        "",
        f"| | {' | '.join(pairs)} |",
        "|---" * (len(pairs) + 1) + "|",
        judge.plain_row("token merging alone, KL"),
    ]
    for name in args.rows:
        settings = ABLATIONS[name]
        folder = args.output_dir / f"{name.replace(' ', '_').replace(':', '').replace(',', '')}-seed{args.seed}"
        plugins = make_plugins(settings, data, folder, args)
        if plugins.config.merging["proportional_attention"]:
            lines.append(judge.row(name, plugins))
        else:
            other = Judge(data, args.num_test_images, proportional_attention=False)
            lines += [other.plain_row(f"{name}, token merging alone, KL"), other.row(name, plugins)]
        print(lines[-1], flush=True)
        if not settings:
            lines += [judge.row(f"default, at scale {scale}", plugins, scale) for scale in SCALES if scale != 0.1]
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
