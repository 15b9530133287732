#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# datasets 5.2.0: in a folder with one folder of images per class, `imagefolder` looks for the names of splits as whole
# words ANYWHERE in the paths. One picture called "train-station.png", "eye_test.png" or "the train to Bern.png", or one
# class called "train", makes a split of its own of the files with that word; all others are left out, without an error
# or a warning. As the rest of the classes is gone, the labels may be gone, too: the column "label" is dropped. A class
# of vehicles, as in many sets of photographs, is enough.
# What to do: put the classes into a folder "train", give `data_files={"train": "**"}`, and count the rows.
#
# Seen: 4 images and 2 classes without such a word, 1 image and no label column with one image renamed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
from pathlib import Path

from datasets import load_dataset
from PIL import Image


def show(name, files, **settings):
    for file in files:
        path = Path(name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    splits = load_dataset("imagefolder", data_dir=name, **settings)
    for split, rows in splits.items():
        classes = rows.features["label"].names if "label" in rows.features else "no labels"
        print(f"{name}: {len(files)} files, split {split} has {len(rows)}, {classes}")


show("plain", ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"])
show("one image", ["cat/a.png", "cat/b.png", "dog/c.png", "dog/the train to Bern.png"])
show("one class", ["bus/a.png", "bus/b.png", "car/c.png", "train/d.png", "train/e.png"])
show("remedy", ["bus/a.png", "bus/b.png", "car/c.png", "train/d.png", "train/e.png"], data_files={"train": "**"})
PYTHON
diff "$folder/seen" - <<'SEEN'
plain: 4 files, split train has 4, ['cat', 'dog']
one image: 4 files, split train has 1, no labels
one class: 5 files, split train has 2, no labels
remedy: 5 files, split train has 5, ['bus', 'car', 'train']
SEEN
