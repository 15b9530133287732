# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Small random models of timm in the wrappers of transformers, and what the slow reference must know of them."""

import importlib.util
from types import SimpleNamespace

import torch
import torch.nn.functional as F


SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
NAMES = ("norm1", "attn", "ls1", "norm2", "ls2", "proj")


def is_timm_installed():
    """Whether timm and torchvision, which it needs, are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("timm", "torchvision"))


def make_timm(architecture="vit_base_patch16_224", *, head=True, seed=0, num_labels=5, **model_args):
    """A wrapper with a small model of timm in it; `model_args` are timm's, on top of `SMALL`."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    torch.manual_seed(seed)
    model_class = TimmWrapperForImageClassification if head else TimmWrapperModel
    config = TimmWrapperConfig(architecture=architecture, num_labels=num_labels, model_args={**SMALL, **model_args})
    model = model_class(config)
    # timm starts some parameters at zero or one, where mistakes would not show
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or any(part in name for part in ("bias", "gamma")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def split_layers(model):
    """The layers of a timm model, their parts named as the slow reference has them, the fused projection in three."""
    return [_split(layer) for layer in model.timm_model.blocks]


def _split(layer):
    attention = layer.attn
    weights = attention.qkv.weight.chunk(3)
    biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    norms = attention.q_norm, attention.k_norm, torch.nn.Identity()

    def projection(weight, bias, norm):
        def project(tokens):
            heads = F.linear(tokens, weight, bias).view(len(tokens), -1, attention.head_dim)
            return norm(heads).flatten(1)

        return project

    query, key, value = (projection(*parts) for parts in zip(weights, biases, norms, strict=True))
    attn = SimpleNamespace(
        head_dim=attention.head_dim,
        q_proj=query,
        k_proj=key,
        v_proj=value,
        proj=lambda mixed: attention.proj(attention.norm(mixed)),
    )
    return SimpleNamespace(norm1=layer.norm1, norm2=layer.norm2, mlp=layer.mlp, ls1=layer.ls1, ls2=layer.ls2, attn=attn)
