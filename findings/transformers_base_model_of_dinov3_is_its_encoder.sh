#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0, peft 0.21.2: `model.base_model` is the model without its head, and for a model that has none the
# model itself: that is how one hands the backbone of any checkpoint to PEFT. DINOv3ViTModel has no head, but its
# base_model_prefix is "model", which is also the name of the encoder in it: its base_model is the encoder, which takes
# no images. An adapter that was saved of a DINOv3ViTModel and is put onto `model.base_model` by
# `PeftModel.from_pretrained` loads no weight, as its names have a "model." more, with a warning only.
# What to do: give PEFT the DINOv3ViTModel itself.
#
# Seen: "base_model: DINOv3ViTEncoder", "onto its base_model: output changed False"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
IMAGES = torch.ones(1, 3, 16, 16)


@torch.no_grad()
def show(kind, config):
    torch.manual_seed(0)
    plain = kind(config)
    print(f"{kind.__name__}, base_model: {type(plain.base_model).__name__}")
    plain.save_pretrained("model")
    adapted = get_peft_model(plain, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # These are zero before the training that random numbers stand for here.
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained("adapter")
    for place in ("the model", "its base_model"):
        model = kind.from_pretrained("model").eval()
        before = model(IMAGES)[0]
        PeftModel.from_pretrained(model if place == "the model" else model.base_model, "adapter")
        print(f"onto {place}: output changed {not torch.equal(before, model.eval()(IMAGES)[0])}")


show(Dinov2Model, Dinov2Config(**SIZES))
show(DINOv3ViTModel, DINOv3ViTConfig(**SIZES))
PYTHON
diff "$folder/seen" - <<'SEEN'
Dinov2Model, base_model: Dinov2Model
onto the model: output changed True
onto its base_model: output changed True
DINOv3ViTModel, base_model: DINOv3ViTEncoder
onto the model: output changed True
onto its base_model: output changed False
SEEN
