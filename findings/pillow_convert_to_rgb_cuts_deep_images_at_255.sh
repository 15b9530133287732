#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# pillow 13.0.0: `image.convert("RGB")`, which is how nearly every pipeline begins, does not scale images that have more
# than 8 bits per pixel. Of a 16-bit greyscale PNG or TIFF, such as X-rays and microscopes give, every value above 255
# becomes 255, so that most of the picture is plain white; a floating-point TIFF from 0 to 1 becomes black. Neither is
# an error or a warning, and `load_image` of transformers does the same. A 16-bit COLOUR PNG, on the other hand, is
# scaled.
# What to do: look at `image.mode`, and scale "I;16", "I" and "F" to 0..255 before the call.
#
# Seen: 16-bit values 0, 200, 1000, 40000 become 0, 200, 255, 255; floats 0, 0.25, 0.5, 1 become 0, 0, 0, 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON' | tee "$folder/seen"
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def show(name, path):
    with Image.open(path) as image:
        red = np.asarray(image.convert("RGB"))[0, :, 0]
        print(f"{name}: mode {image.mode}, {red.tolist()}")


def write_colour_png(path, values):
    """Writes one row of 16-bit colours, which Pillow itself does not."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    row = b"\0" + np.repeat(np.array(values, dtype=">u2"), 3).tobytes()
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


VALUES = [0, 200, 1000, 40000]
Image.fromarray(np.array([VALUES], dtype=np.uint16)).save("grey.png")
Image.fromarray(np.array([VALUES], dtype=np.int32)).save("grey32.tif")
Image.fromarray(np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)).save("float.tif")
write_colour_png("colour.png", VALUES)
show("16-bit grey", "grey.png")
show("32-bit grey", "grey32.tif")
show("floats from 0 to 1", "float.tif")
show("16-bit colour", "colour.png")
PYTHON
diff "$folder/seen" - <<'SEEN'
16-bit grey: mode I;16, [0, 200, 255, 255]
32-bit grey: mode I, [0, 200, 255, 255]
floats from 0 to 1: mode F, [0, 0, 0, 1]
16-bit colour: mode RGB, [0, 0, 3, 156]
SEEN
