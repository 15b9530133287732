#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0 on torch 2.13.0: the class token of an MLCD turns by a learned angle (`class_pos_emb`). The model
# hands cosine and sine of all tokens to its layers in a list, and reentrant checkpointing looks for tensors that need a
# gradient among the arguments themselves, not inside of lists. So a model with
# `activation_checkpointing_enable({"use_reentrant": True})` runs forward as ever, and its backward pass raises a
# RuntimeError that speaks of a second backward pass, which nobody asked for. A CLIP, whose layers get no list, trains.
# What to do: leave `use_reentrant` out, or set it to False.
#
# Seen: "MLCD, use_reentrant=True: RuntimeError, Trying to backward through the graph a second time"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MLCDVisionConfig, MLCDVisionModel

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8}


def train(name, model, use_reentrant):
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    # the images need a gradient, as reentrant checkpointing wants of one argument
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    try:
        model(pixel_values=images).pooler_output.square().mean().backward()
    except RuntimeError as error:
        outcome = f"RuntimeError, {str(error).split(' (or')[0]}"
    else:
        outcome = "trains"
    print(f"{name}, use_reentrant={use_reentrant}: {outcome}")


torch.manual_seed(0)
for use_reentrant in (False, True):
    train("CLIP", CLIPVisionModel(CLIPVisionConfig(**SIZES)), use_reentrant)
    train("MLCD", MLCDVisionModel(MLCDVisionConfig(**SIZES)), use_reentrant)
PYTHON
diff "$folder/seen" - <<'SEEN'
CLIP, use_reentrant=False: trains
MLCD, use_reentrant=False: trains
CLIP, use_reentrant=True: trains
MLCD, use_reentrant=True: RuntimeError, Trying to backward through the graph a second time
SEEN
