# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A Gradio demo: move the degree, and see what merges, what the model says with and without ToCom, and what it costs.

    pip install -r examples/space/requirements.txt
    python examples/space/app.py

Runs offline on the embedded Fashion-MNIST model. The environment variables TOCOM_MODEL and TOCOM_PLUGINS name others,
TOCOM_SOURCE_R the degree of a checkpoint that does not record it.
"""

import os
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import TocomModel, apply_tome, calibrate, paint_groups, trace_tokens


HERE = Path(__file__).resolve().parent
STAGED = HERE / "assets"  # made by stage.py
CHECKPOINT = STAGED / "checkpoint" if STAGED.exists() else HERE.parent / "fashion_mnist" / "checkpoint"
PLUGINS = STAGED / "plugins" if STAGED.exists() else HERE.parents[1] / "hub_cards" / "tocom-vit-fashion-mnist"
SAMPLES = sorted((HERE / "samples").glob("*.png"))
SIZE = 336  # pixels of the pictures
BATCH = 64
CSS = """
.pictures img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.gallery .container {width: 3.2rem !important; height: 3.2rem !important}
.costs table {width: 100%} .costs td, .costs th {padding: 0.4rem !important}
.costs td:not(:first-child), .costs th:not(:first-child) {text-align: right; white-space: nowrap}
@media (max-width: 600px) {.tops .confidence-set * {font-size: 0.72rem}}
"""


class Demo:
    """The model with plugins, the same checkpoint without, and what every degree costs on this machine."""

    def __init__(self, checkpoint: str, plugins: str, source_r: int | None = None):
        self.model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=source_r)
        self.plain = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        # a single small image keeps no machine busy: only a batch shows what merging saves
        self.single = calibrate(self.model, seconds=2, progress=False)
        self.batch = calibrate(self.model, batch_size=BATCH, seconds=4, progress=False)
        self.max_r = self.model.plugins.config.max_r

    @torch.inference_mode()
    def run(self, image: Image.Image | None, r: float, layer: float):
        """The picture, its merged tokens, both lists of labels and the costs of one image at a degree."""
        if image is None:
            raise gr.Error("Choose or upload an image first.")
        r = int(r)
        pixel_values = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        self.model.set_target_r(r)
        apply_tome(self.plain, r)
        with trace_tokens(self.model) as trace:
            scores = self.model(pixel_values=pixel_values).logits.softmax(-1)[0]
        plain = self.plain(pixel_values=pixel_values).logits.softmax(-1)[0]
        seen = to_picture(pixel_values[0])
        patch = self.model.config.patch_size
        grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
        groups = paint_groups(seen, trace.positions[int(layer) - 1][0, trace.protected :], grid, size=SIZE, border=2)
        enlarged = seen.resize(groups.size, Image.Resampling.NEAREST)
        return enlarged, groups, self.labels(plain), self.labels(scores), self.costs(r)

    def labels(self, scores: torch.Tensor) -> dict[str, float]:
        return {self.model.config.id2label[index]: score for index, score in enumerate(scores.tolist())}

    def costs(self, r: int) -> str:
        rows = [("GFLOPs an image", *(f"{self.single[degree].gflops:.2g}" for degree in (0, r)))]
        rows += [("tokens left", *(f"{self.single[degree].tokens[-1]}" for degree in (0, r)))]
        for calibration, name in ((self.single, "one image"), (self.batch, f"batch of {BATCH}")):
            rows.append((name, *(f"{calibration[degree].latency_ms:.3g} ms" for degree in (0, r))))
        gains = [
            f"{self.single[0].gflops / self.single[r].gflops:.1f}x", "", f"{self.single[r].speedup:.1f}x",
            f"{self.batch[r].speedup:.1f}x",
        ]  # fmt: skip
        lines = [f"| cost | r = 0 | r = {r} | gain |", "|---|---|---|---|"]
        lines += ["| " + " | ".join([*row, gain]) + " |" for row, gain in zip(rows, gains, strict=True)]
        note = f"Times were measured when the demo started, on {self.single.device}."
        return "\n".join([*lines, "", note])


def to_picture(pixel_values: torch.Tensor) -> Image.Image:
    """What the model sees: `(3, height, width)`, brought back to 8 bits."""
    low, high = pixel_values.min(), pixel_values.max()
    scaled = (pixel_values - low) / (high - low).clamp(min=1e-6) * 255
    return Image.fromarray(scaled.byte().permute(1, 2, 0).numpy())


def build(demo: Demo) -> gr.Blocks:
    with gr.Blocks(title="Token Compensator") as page:
        gr.Markdown(
            "# Change the cost of a Vision Transformer without re-training\n"
            "Token merging joins `r` pairs of similar tokens in every layer. "
            "ToCom plugins compensate for what that changes. "
            f"The weights were trained at r = {demo.model.source_r}."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    str(SAMPLES[6]), type="pil", label="Image", height=220, sources=["upload"], elem_classes="pictures"
                )
                gr.Examples([str(path) for path in SAMPLES], image, examples_per_page=len(SAMPLES), label="Samples")
                degree = gr.Slider(0, demo.max_r, value=demo.max_r, step=1, label="Tokens merged per layer, r")
                layers = demo.model.config.num_hidden_layers
                layer = gr.Slider(1, layers, value=max(1, layers // 4), step=1, label="Show merged tokens after layer")
                costs = gr.Markdown(elem_classes="costs")
            with gr.Column():
                with gr.Row(elem_classes="pictures"):
                    seen = gr.Image(label="What the model sees", height=220, buttons=[], min_width=140)
                    groups = gr.Image(label="Merged tokens", height=220, buttons=[], min_width=140)
                with gr.Row():
                    plain = gr.Label(label="Merging alone", num_top_classes=5, min_width=140, elem_classes="tops")
                    compensated = gr.Label(label="With ToCom", num_top_classes=5, min_width=140, elem_classes="tops")
        inputs, outputs = [image, degree, layer], [seen, groups, plain, compensated, costs]
        gr.on([page.load, image.change, degree.change, layer.change], demo.run, inputs, outputs, show_progress="hidden")
    return page


def main() -> None:
    degree = os.environ.get("TOCOM_SOURCE_R")
    demo = Demo(
        os.environ.get("TOCOM_MODEL", str(CHECKPOINT)),
        os.environ.get("TOCOM_PLUGINS", str(PLUGINS)),
        None if degree is None else int(degree),
    )
    build(demo).launch(css=CSS)


if __name__ == "__main__":
    main()
