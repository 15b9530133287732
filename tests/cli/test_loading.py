# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the commands say of checkpoints of other libraries, which transformers would answer with advice of its own."""

import json

import pytest


COMMANDS = {
    "evaluate": ("--dataset_name", "images", "--target_r", 0, "--output_dir", "results", "--checkpoints"),
    "finetune": ("--dataset_name", "images", "--output_dir", "tuned", "--report_to", "none", "--model_name_or_path"),
    "distill": (
        "--dataset_name", "images", "--output_dir", "set", "--max_r", 2, "--max_steps", 1, "--model_name_or_path",
    ),
    "visualize": ("--images", "picture.png", "--model_name_or_path"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"architecture": "vit_base_patch16_224", "num_classes": 10, "pretrained_cfg": {"num_classes": 10}},
            "It is a checkpoint of timm, which transformers runs where timm and torchvision are installed: "
            "pip install 'tocom-hf[timm]'. Of its DeiT and ViT `tocom convert --weights` makes checkpoints that need "
            "neither.",
        ),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}},
            "Its class is code of the repository, which is not run; only classes of transformers are supported.",
        ),
        ({"model_type": "mine"}, "Its config.json names no model type that this version of transformers knows."),
    ],
)
def test_checkpoints_of_other_libraries_are_refused_with_the_way_out(refused, tmp_path, name, content, reason):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    error = refused(name, *COMMANDS[name], tmp_path / "model")
    assert error.endswith(f"UnsupportedModelError: The model '{tmp_path / 'model'}' cannot be loaded. {reason}")
