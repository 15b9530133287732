#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0: `image_mean` and `image_std` of a VivitImageProcessor look like those of a ViT, and mean something
# else. With its default `offset=True` it brings pixels to [-1, 1] first and normalises what comes out, so that a mean and
# a standard deviation of 0.5 give values from -3 to 1. A VideoMAE and a ViT with the same two settings give -1 to 1.
# Whoever prepares clips by the settings in preprocessor_config.json, or augments them in that range, feeds a ViViT other
# values than it was trained on, without an error.
# What to do: run the processor itself, or read the range off a black and a white clip.
#
# Seen: "ViT: black -1, white 1", "VideoMAE: black -1, white 1", "ViViT: black -3, white 1"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6 pillow==12.3.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import numpy as np
from transformers import VideoMAEImageProcessorPil, ViTImageProcessorPil, VivitImageProcessor

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": False}


def show(name, processor, frames):
    values = []
    for level in (0, 255):
        frame = np.full((16, 16, 3), level, dtype=np.uint8)
        batch = processor([frame] * frames, return_tensors="np")["pixel_values"]
        values.append(round(float(np.asarray(batch).mean())))
    print(f"{name}: black {values[0]}, white {values[1]}")


show("ViT", ViTImageProcessorPil(**HALF), 1)
show("VideoMAE", VideoMAEImageProcessorPil(**HALF, do_center_crop=False), 4)
show("ViViT", VivitImageProcessor(**HALF, do_center_crop=False), 4)
PYTHON
diff "$folder/seen" - <<'SEEN'
ViT: black -1, white 1
VideoMAE: black -1, white 1
ViViT: black -3, white 1
SEEN
