# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Small random models and plugin sets."""

import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

from tocom_hf import PluginSet
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.patching import get_settings
from tocom_hf.plugins.composition import Factors
from tocom_hf.plugins.config import BackboneFacts, PluginSetConfig


# the models are tiny: more threads only wait for each other
torch.set_num_threads(1)

MODEL_CLASSES = [ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher]


def make_model(model_class=ViTForImageClassification, seed=0, **overrides):
    """A small random model with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config_class = ViTConfig if model_class.__name__.startswith("ViT") else DeiTConfig
    settings = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
    }  # fmt: skip
    model = model_class(config_class(**{**settings, **overrides}))
    for name, parameter in model.named_parameters():
        # transformers leaves some of them at zero, where mistakes would not show
        if "token" in name or "position" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_plugins(model, max_r=6, rank=2, seed=1, size=0.3, target_modules=None, **settings):
    """A random plugin set for a model; `target_modules` are names as PEFT has them, by default query and value."""
    backbone = find_backbone(model)
    shapes = None if target_modules is None else backbone.find_target_modules(target_modules)
    generator = torch.Generator().manual_seed(seed)

    joined = shapes is None and backbone.architecture.qkv is not None

    def factors(layer):
        if joined:  # a LoRA of query and one of value, of rank `rank` each
            out = layer.out_features // 3
            lora_A = size * torch.randn(2 * rank, layer.in_features, generator=generator)
            lora_B = torch.zeros(3 * out, 2 * rank)
            lora_B[:out, :rank] = size * torch.randn(out, rank, generator=generator)
            lora_B[2 * out :, rank:] = size * torch.randn(out, rank, generator=generator)
            return Factors(lora_A, lora_B)
        lora_A = size * torch.randn(rank, layer.in_features, generator=generator)
        return Factors(lora_A, size * torch.randn(layer.out_features, rank, generator=generator))

    layers = backbone.projections(shapes)
    adapters = {i: {path: factors(layer) for path, layer in layers.items()} for i in range(max_r)}
    config = PluginSetConfig(BackboneFacts.of(backbone), max_r=max_r, rank=rank, target_modules=shapes, **settings)
    return PluginSet(config, adapters)


def describe(model):
    """Everything of a model that patching could leave behind: classes, attributes and hooks of every module."""
    return [(name, type(module), set(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()]  # fmt: skip


def schedule_of(model):
    """How many tokens each layer of a model merges, or `None` where it is not patched."""
    settings = get_settings(find_backbone(model))
    return None if settings is None else settings.schedule
