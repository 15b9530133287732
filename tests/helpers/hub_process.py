# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What one process pushes and another one pulls: the fork server calls `push` and `pull`."""

import hashlib

import torch
from huggingface_hub import constants

from helpers.models import make_model, make_plugins
from tocom_hf import TocomModel


def use_hub(cache):
    """Ask the Hub of the tests, whose address is in the environment, and keep what it sends in a folder."""
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = cache


def print_model(model):
    """The logits of one image, and the weights bit by bit: where they lie may move the last bit of a logit."""
    pixel_values = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits[0]
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    print("logits", *(f"{logit:.5f}" for logit in logits))
    print("weights", digest.hexdigest())


def push(cache):
    use_hub(cache)
    plugins = make_plugins(make_model(), max_r=16)
    plugins.push_to_hub("user/tocom-tiny", token="token")
    model = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=4, target_r=16)
    model.push_to_hub("user/vit-tiny", token="token")
    print_model(model)


def pull(cache):
    use_hub(cache)
    print_model(TocomModel.from_pretrained("user/vit-tiny", plugins="user/tocom-tiny", source_r=4, target_r=16))
