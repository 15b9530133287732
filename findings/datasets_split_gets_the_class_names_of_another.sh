#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# datasets 5.2.0: each parquet file carries the names of its classes. Where the train file orders them cat, dog and the
# test file dog, cat, `load_dataset` of the folder gives both splits the names of the train file and keeps the numbers:
# in the test split every cat is now a dog. There is no error and no warning, though the same file loaded alone is
# right, and though `concatenate_datasets` refuses two sets whose names differ. An image classifier is then scored on
# wrong labels.
# What to do: load each file by itself, compare the names, and call `cast_column` or `align_labels_with_mapping`.
#
# Seen: "folder, test: cat is called dog, dog is called cat", "alone, test: cat is called cat, dog is called dog"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
HF_HOME="$folder/home" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets, load_dataset


def write(split, names):
    features = Features({"animal": Value("string"), "label": ClassLabel(names=names)})
    rows = {"animal": ["cat", "dog"], "label": [names.index("cat"), names.index("dog")]}
    Dataset.from_dict(rows, features=features).to_parquet(f"data/{split}.parquet")


def show(name, rows):
    label = rows.features["label"]
    print(f"{name}:", ", ".join(f"{row['animal']} is called {label.int2str(row['label'])}" for row in rows))


write("train", ["cat", "dog"])
write("test", ["dog", "cat"])
splits = load_dataset("data")
show("folder, train", splits["train"])
show("folder, test", splits["test"])
alone = {split: Dataset.from_parquet(f"data/{split}.parquet") for split in ("train", "test")}
show("alone, train", alone["train"])
show("alone, test", alone["test"])
try:
    concatenate_datasets(list(alone.values()))
except ValueError as error:
    print("concatenate_datasets: ValueError")
else:
    print("concatenate_datasets: no error")
PYTHON
diff "$folder/seen" - <<'SEEN'
folder, train: cat is called cat, dog is called dog
folder, test: cat is called dog, dog is called cat
alone, train: cat is called cat, dog is called dog
alone, test: cat is called cat, dog is called dog
concatenate_datasets: ValueError
SEEN
