# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the embedded model itself says about images at every degree, for benchmarks that check each answer."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from http_load import CHECKPOINT, PLUGINS, ROOT, make_request
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import TocomModel
from tocom_hf.data.images import load_images


SECOND = "second "
MARGIN, TOLERANCE = 0.05, 0.01


@dataclass
class Example:
    """An image, and what each checkpoint says about it: label and score by degree."""

    data: bytes
    request: bytes
    expected: list[dict[int, tuple[str, float]]]

    def check(self, content: dict) -> tuple[int, bool]:
        """Which checkpoint has answered, as its labels tell, and whether it has answered wrongly."""
        best = content["predictions"][0][0]
        version = int(best["label"].startswith(SECOND))
        label, score = self.expected[version][content["target_r"]]
        return version, best["label"] != label or abs(best["score"] - score) > TOLERANCE


def write_second_checkpoint(folder: Path) -> Path:
    """The embedded model with its classes in another order, and names that tell it from the first."""
    model = AutoModelForImageClassification.from_pretrained(CHECKPOINT)
    config = model.config
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(0.8 * parameter)  # other scores than the first
    config.id2label = {index: SECOND + name for index, name in config.id2label.items()}
    config.label2id = {name: index for index, name in config.id2label.items()}
    model.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


@torch.inference_mode()
def make_examples(checkpoints: list[Path], count: int = 200) -> list[Example]:
    """Images whose best label is ahead by a margin at every degree, whatever images share their batch."""
    dataset = load_images(str(ROOT / "examples/fashion_mnist/test.parquet"), split="test", label_column="label")
    images = [dataset[index]["image"].convert("RGB") for index in range(count)]
    pixel_values = AutoImageProcessor.from_pretrained(CHECKPOINT)(images, return_tensors="pt")["pixel_values"]
    clear = torch.ones(count, dtype=torch.bool)
    expected: list[list[dict[int, tuple[str, float]]]] = [[{} for _ in checkpoints] for _ in images]
    for version, checkpoint in enumerate(checkpoints):
        model = TocomModel.from_pretrained(checkpoint, plugins=PLUGINS, source_r=0)
        for degree in range(model.plugins.config.min_r, model.plugins.config.max_r + 1):
            model.set_target_r(degree)
            scores = _scores(model, pixel_values, 50)
            others = _scores(model, pixel_values.flip(0), 11).flip(0)
            clear &= (scores - others).abs().amax(1) < TOLERANCE / 10
            best, ranks = scores.topk(2)
            clear &= best[:, 0] - best[:, 1] > MARGIN
            for index in range(count):
                label = model.config.id2label[int(ranks[index, 0])]
                expected[index][version][degree] = (label, float(best[index, 0]))
    examples = []
    for image, known, use in zip(images, expected, clear.tolist(), strict=True):
        if use:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            examples.append(Example(buffer.getvalue(), make_request(buffer.getvalue(), "image/png"), known))
    print(f"{len(examples)} of {count} images have a clear label at every degree", flush=True)
    return examples


def _scores(model: TocomModel, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([model(pixel_values=batch).logits.softmax(-1) for batch in pixel_values.split(batch_size)])
