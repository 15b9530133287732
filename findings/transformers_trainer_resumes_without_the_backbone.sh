#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0: one expects that `Trainer.train(resume_from_checkpoint=...)` goes on from the saved weights, and
# that `load_best_model_at_end=True` ends with those of the best step. For a ViT neither holds: `save_pretrained` writes
# the names of transformers 4 (vit.encoder.layer.0.attention.attention.query), the modules have new ones
# (vit.layers.0.attention.q_proj), and the Trainer loads the file by plain name. Embeddings and head come back, no block
# does. Two warnings about keys are all that is said, and training goes on, from a random encoder after a restart. DeiT
# and BEiT are hit alike, DINOv2 in its attention; CLIP and SigLIP, whose names did not change, are not.
# What to do: `from_pretrained(checkpoint)` converts the names. Build the model with it before the resumed run, and load
# the best checkpoint with it after a run.
#
# Seen: a resumed ViT has 8 of its 40 tensors and none of its blocks, a resumed CLIP all 41. At the end of a run whose
# best step was the first, the ViT's blocks are those of the last step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import CLIPConfig, CLIPForImageClassification, PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
DATA = [{"pixel_values": torch.full((3, 16, 16), float(image)), "labels": image % 2} for image in range(4)]
EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


class KeepWeights(TrainerCallback):
    """Keeps copies of the weights that a run begins with and of those after each step."""

    def keep(self, state, model):
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = {}
        self.keep(state, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.keep(state, model)


def run(model, folder, steps, resume=None, **settings):
    kept = KeepWeights()
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=0.1, metric_for_best_model="score", **EACH_STEP, **QUIET, **settings
    )
    # The score falls from step to step, so that the first step is the best one.
    scores = iter([4.0, 3.0, 2.0, 1.0])
    trainer = Trainer(
        model,
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[kept],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return kept.weights


def compared(saved, found):
    equal = [name for name in saved if torch.equal(saved[name], found[name])]
    return f"{len(equal)} of {len(saved)} tensors equal, {sum('layers.' in name for name in equal)} of them in blocks"


def make_vit():
    return ViTForImageClassification(ViTConfig(**VISION))


def make_clip():
    return CLIPForImageClassification(CLIPConfig(vision_config=VISION))


torch.manual_seed(0)
for name, make in {"ViT": make_vit, "CLIP": make_clip}.items():
    saved = run(make(), name, steps=1)[1]
    print(f"{name}, saved and resumed:", compared(saved, run(make(), name, steps=2, resume=f"{name}/checkpoint-1")[1]))

saved = run(make_vit(), "remedy", steps=1)[1]
model = ViTForImageClassification.from_pretrained("remedy/checkpoint-1")
print("ViT, from_pretrained first:", compared(saved, run(model, "remedy", steps=2, resume="remedy/checkpoint-1")[1]))

model = make_vit()
weights = run(model, "best", steps=4, load_best_model_at_end=True)
print("ViT, best step and end:", compared(weights[1], model.state_dict()))
print("ViT, last step and end:", compared(weights[4], model.state_dict()))
PYTHON
diff "$folder/seen" - <<'SEEN'
ViT, saved and resumed: 8 of 40 tensors equal, 0 of them in blocks
CLIP, saved and resumed: 41 of 41 tensors equal, 32 of them in blocks
ViT, from_pretrained first: 40 of 40 tensors equal, 32 of them in blocks
ViT, best step and end: 8 of 40 tensors equal, 0 of them in blocks
ViT, last step and end: 32 of 40 tensors equal, 32 of them in blocks
SEEN
