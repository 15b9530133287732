#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# torch 2.13.0, transformers 5.23.0: under `torch.autocast("cpu", torch.bfloat16)` a linear layer with float16 weights
# computes, as autocast promises, in bfloat16. `torch.cat` raises where a float16 tensor comes before any float32 one,
# even where all are float16, with a message about a "ScalarType" that names neither tensor nor dtype; with float32 in
# front it works, and without autocast so do all of these calls. transformers 5 loads weights in the dtype that they were
# saved in, and a ViT joins its class token to the patches by `torch.cat`. So a checkpoint that was saved in float16
# cannot run under bfloat16 autocast on a CPU, which is what Accelerate's `mixed_precision="bf16"` is there.
# What to do: load with dtype=torch.float32 (or torch.bfloat16) where autocast to bfloat16 follows.
#
# Seen: "linear: torch.bfloat16", then "Unexpected floating ScalarType" where float16 comes first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import Dinov2Config, Dinov2Model

half = torch.zeros(1, 2, 4, dtype=torch.float16)
brain = torch.zeros(1, 2, 4, dtype=torch.bfloat16)


def show(name, call):
    try:
        print(f"{name}: {call().dtype}")
    except RuntimeError as error:
        print(f"{name}: {str(error).split(' in ')[0]}")


config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
Dinov2Model(config).half().save_pretrained("saved-in-float16")
model = Dinov2Model.from_pretrained("saved-in-float16").eval()
linear = torch.nn.Linear(4, 4).half()
show("without autocast, float16 and bfloat16", lambda: torch.cat([half, brain]))
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    show("linear", lambda: linear(half))
    show("float32 and float16", lambda: torch.cat([half.float(), half]))
    show("float16 and float32", lambda: torch.cat([half, half.float()]))
    show("float16 and bfloat16", lambda: torch.cat([half, brain]))
    show("float16 and float16", lambda: torch.cat([half, half]))
    show("DINOv2 as it was saved", lambda: model(torch.zeros(1, 3, 32, 32)).last_hidden_state)
    show("DINOv2 in float32", lambda: model.float()(torch.zeros(1, 3, 32, 32)).last_hidden_state)
PYTHON
diff "$folder/seen" - <<'SEEN'
without autocast, float16 and bfloat16: torch.float32
linear: torch.bfloat16
float32 and float16: torch.float32
float16 and float32: Unexpected floating ScalarType
float16 and bfloat16: Unexpected floating ScalarType
float16 and float16: Unexpected floating ScalarType
DINOv2 as it was saved: Unexpected floating ScalarType
DINOv2 in float32: torch.float32
SEEN
