#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# peft 0.21.2, transformers 5.23.0: a LoRA adapter that was trained on a ViTModel is put onto a
# ViTForImageClassification with the same backbone by `PeftModel.from_pretrained`. The layers are found, LoRA layers are
# made in them, but no weight is loaded, as the names lack the "vit." in front: the model computes what it did without
# an adapter. A warning about missing keys is all. The other way round, from head to backbone, it is the same.
# `model.load_adapter` of transformers matches the names by itself and loads the very same files right. So an adapter
# that was trained on the backbone, as in self-supervised training or distillation, is lost when a classifier is built
# on it.
# What to do: call `model.load_adapter(folder)`, or give `PeftModel.from_pretrained` the backbone, `model.vit`.
#
# Seen: "onto the head: output changed False", "onto the head, by load_adapter: output changed True"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
torch.manual_seed(0)
IMAGES = torch.randn(1, 3, 16, 16)
ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained("backbone")

adapted = get_peft_model(ViTModel.from_pretrained("backbone"), LoraConfig(target_modules=["q_proj", "v_proj"]))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:  # These are zero before the training that random numbers stand for here.
        torch.nn.init.normal_(parameter)
adapted.save_pretrained("adapter")


def by_peft(model):
    PeftModel.from_pretrained(model, "adapter")


def by_load_adapter(model):
    model.load_adapter("adapter")


def by_peft_below_the_head(model):
    PeftModel.from_pretrained(model.vit, "adapter")


@torch.no_grad()
def show(name, kind, put_adapter):
    model = kind.from_pretrained("backbone").eval()
    before = model(IMAGES)[0]
    put_adapter(model)
    print(f"{name}: output changed {not torch.equal(before, model.eval()(IMAGES)[0])}")


show("onto the backbone", ViTModel, by_peft)
show("onto the head", ViTForImageClassification, by_peft)
show("onto the head, by load_adapter", ViTForImageClassification, by_load_adapter)
show("onto the backbone of the head", ViTForImageClassification, by_peft_below_the_head)
PYTHON
diff "$folder/seen" - <<'SEEN'
onto the backbone: output changed True
onto the head: output changed False
onto the head, by load_adapter: output changed True
onto the backbone of the head: output changed True
SEEN
