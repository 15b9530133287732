#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0: `AutoModelForImageClassification.from_pretrained` gives a model whose forward takes `labels` and
# returns a loss, for nearly all checkpoints. One saved as DeiTForImageClassificationWithTeacher, as the distilled DeiT
# are, gives a class that takes no labels. The Trainer then drops the column "labels" as unused, and raises "The model
# did not return a loss from the inputs" only in the first step, after the data were loaded. The same class of Auto
# model, the same config and the other entry of `architectures` trains.
# What to do: load such a checkpoint with DeiTForImageClassification. The distillation head is left out, and the head of
# the class token, of another name in the file (cls_classifier), starts anew.
#
# Seen: with "architectures": DeiTForImageClassification a loss, with ...WithTeacher a ValueError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import inspect

import torch
import transformers
from transformers import AutoModelForImageClassification, PrinterCallback, Trainer, TrainingArguments

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DATA = [{"pixel_values": torch.full((3, 16, 16), float(image)), "labels": image % 2} for image in range(4)]

for name in ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"):
    getattr(transformers, name)(transformers.DeiTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(name)
    model = AutoModelForImageClassification.from_pretrained(name)
    print(f"{type(model).__name__}: takes labels {'labels' in inspect.signature(model.forward).parameters}")
    arguments = TrainingArguments("run", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except ValueError as error:
        print("ValueError:", str(error).partition(", only")[0])
    else:
        print("trained")

model, report = transformers.DeiTForImageClassification.from_pretrained(name, output_loading_info=True)
print("as DeiTForImageClassification, missing:", sorted(report["missing_keys"]))
PYTHON
diff "$folder/seen" - <<'SEEN'
DeiTForImageClassification: takes labels True
trained
DeiTForImageClassificationWithTeacher: takes labels False
ValueError: The model did not return a loss from the inputs
as DeiTForImageClassification, missing: ['classifier.bias', 'classifier.weight']
SEEN
