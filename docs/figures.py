# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Draw the pictures of the README from the embedded model: the idea, and accuracy against throughput.

python docs/figures.py
"""

from pathlib import Path

import matplotlib
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from tocom_hf import TocomModel, apply_tome, calibrate, paint_groups, trace_tokens


matplotlib.use("Agg")
from matplotlib import pyplot as plt


HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
FASHION = EXAMPLES / "fashion_mnist" / "checkpoint"
PLUGINS = HERE.parent / "hub_cards" / "tocom-vit-mix"
SAMPLE = EXAMPLES / "space" / "samples" / "2-pullover.png"
BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.45"


@torch.no_grad()
def merged_pictures(degrees: list[int], layer: int) -> list[tuple[Image.Image, int]]:
    """The sample with its merged tokens after a layer, and how many tokens there are."""
    model = AutoModel.from_pretrained(FASHION, add_pooling_layer=False).eval()
    image = Image.open(SAMPLE).convert("RGB")
    pixel_values = AutoImageProcessor.from_pretrained(FASHION)(image, return_tensors="pt")["pixel_values"]
    pictures = []
    for r in degrees:
        with trace_tokens(apply_tome(model, r)) as trace:
            model(pixel_values)
        positions = trace.positions[layer][0, trace.protected :]
        pictures.append((paint_groups(image, positions, (7, 7), size=210, border=1), positions.unique().numel()))
    return pictures


def draw_idea(path: Path) -> None:
    """A degree axis with the plugins between the degrees, and what merging does to an image at each."""
    degrees = [0, 2, 4, 6, 8]
    figure = plt.figure(figsize=(9, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.9, 8.9), ylim=(-0.2, 5.0))
    axes.axis("off")
    for (picture, tokens), r in zip(merged_pictures(degrees, layer=3), degrees, strict=True):
        axes.imshow(picture, extent=(r - 0.72, r + 0.72, 3.15, 4.63), aspect="auto", zorder=2)
        axes.text(r, 4.74, f"{tokens} patch tokens after 4 layers", ha="center", fontsize=7.5, color=GREY)
    for r in range(8):
        axes.annotate(
            "", (r + 0.82, 2.35), (r + 0.18, 2.35), arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.3}
        )
        axes.text(r + 0.5, 2.5, f"$P_{{{r}\\to {r + 1}}}$", ha="center", fontsize=10)
    for r in range(9):
        axes.plot(r, 2.35, "o", color="0.3", markersize=5)
        axes.text(r, 1.98, f"r = {r}", ha="center", fontsize=9)
    axes.text(-0.8, 2.83, "dearer", fontsize=9, color=GREY)
    axes.text(8.8, 2.83, "cheaper", fontsize=9, color=GREY, ha="right")
    for y, source, target, color, sign in ((1.3, 0, 6, BLUE, "+"), (0.25, 8, 4, ORANGE, "-")):
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (target, y), (source, y), arrowprops=arrow)
        axes.plot(source, y, "o", color=color)
        sums = f"\\sum_{{i={min(source, target)}}}^{{{max(source, target) - 1}}} B_i A_i"
        axes.text((source + target) / 2, y + 0.24, f"$W' = W {sign} s\\,{sums}$", ha="center",
                  color=color, fontsize=10.5)  # fmt: skip
        ends = (source, "trained here"), (target, "run here")
        for x, words in ends:
            axes.text(x, y - 0.3, words, ha="center", fontsize=9, color=color)
    figure.savefig(path, dpi=110)


def draw_accuracy(path: Path) -> None:
    """Accuracy on the test images, as the plugin set records it, against throughput measured now."""
    model = TocomModel.from_pretrained(EXAMPLES / "digits" / "checkpoint", plugins=PLUGINS)
    entries = [e for e in model.plugins.config.evaluation if e["dataset"] == "digits" and e["source_r"] == 0]
    degrees = [entry["target_r"] for entry in entries]
    calibration = calibrate(model, batch_size=64, degrees=degrees, seconds=15)
    rates = [calibration[r].images_per_second for r in degrees]
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for key, style, color, label in (
        ("plain", "o--", "0.5", "token merging alone"), ("tocom", "o-", BLUE, "with ToCom"),
    ):  # fmt: skip
        axes.plot(rates, [100 * entry[key] for entry in entries], style, color=color, label=label)
    for index, (entry, rate) in enumerate(zip(entries, rates, strict=True)):
        text, height = f"r = {entry['target_r']}", 100 * max(entry["plain"], entry["tocom"])
        # above and below in turn: the first degrees are about as fast as each other
        place = {"xytext": (0, -14), "ha": "right"} if index % 2 else {"xytext": (0, 6), "ha": "center"}
        axes.annotate(text, (rate, height), textcoords="offset points", fontsize=9, **place)
    axes.set_title(f"One checkpoint, 2,000 test images\n{calibration.device}, batch 64", fontsize=9)
    axes.set(xlabel="images/s", ylabel="accuracy (%)")
    axes.margins(y=0.18)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    pictures = {folder / "idea.png": draw_idea, folder / "accuracy_throughput.png": draw_accuracy}
    for path, draw in pictures.items():
        draw(path)
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
