#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# datasets 5.2.0: `cast_column("image", Image(decode=False))` changes what a column of images gives and touches no data,
# which is the documented way to look at the files before decoding them. The same cast of a column of lists of images,
# as clips have it, runs `map` over the whole data set: every row is read and written to a new file in the cache, as
# large as the data, though the stored values are the same. For video data that is many gigabytes and hours.
# What to do: read the Arrow table (`dataset.data.column(...)`, or `with_format("arrow")`), which decodes nothing.
#
# Seen: "one image: 0 new bytes", "a list of images: all bytes new"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==12.3.0 numpy==2.4.6
cd "$folder"
HF_HOME="$folder/home" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, load_dataset
from PIL import Image as Pictures

cache = Path("home")


def written():
    return sum(path.stat().st_size for path in cache.rglob("*.arrow"))


noise = np.random.default_rng(0)
pictures = [Pictures.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(40)]
columns = {
    "one image": (pictures, Image(), Image(decode=False)),
    "a list of images": ([pictures[i : i + 4] for i in range(0, 40, 4)], List(Image()), List(Image(decode=False))),
}
for name, (rows, feature, undecoded) in columns.items():
    file = f"{name}.parquet"
    Dataset.from_dict({"column": rows}, features=Features({"column": feature})).to_parquet(file)
    data = load_dataset("parquet", data_files=file, split="train")
    before = written()
    data.cast_column("column", undecoded)
    new = written() - before
    print(f"{name}:", "0 new bytes" if new == 0 else f"{'all' if new > 0.9 * before / 2 else 'some'} bytes new")
PYTHON
diff "$folder/seen" - <<'SEEN'
one image: 0 new bytes
a list of images: all bytes new
SEEN
