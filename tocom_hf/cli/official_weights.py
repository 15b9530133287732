# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the authors' repository as plugin sets, and timm's DeiT and ViT weights as transformers'.

A checkpoint of plugins holds, for every block, `attn.q_tocom` and `attn.v_tocom`: adapters of 16 * h rows, of which
the last r * h are active at degree r. So the rows of `P_i_i+1` are the h before the last i * h. timm is not needed.
"""

import argparse
import math
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from tocom_hf.errors import PluginFileError
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.plugins.composition import Factors, require_scale
from tocom_hf.plugins.config import BackboneFacts, PluginSetConfig
from tocom_hf.plugins.plugin_set import PluginSet


ADAPTER = re.compile(r"(?:module\.)?blocks\.(\d+)\.attn\.([qv])_tocom\.adapter_(down|up)\.weight")
# timm's names of what is not in a block; the prefix of the backbone is left out
STEM = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without running any code that it may hold."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # training scripts of DeiT and timm keep their arguments beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PluginFileError(
            f"{path} cannot be read as weights, without running code that it may hold: {reason}. Expected tensors by "
            "name, as torch.save and safetensors write them."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise PluginFileError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors by name.")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def convert_plugins(
    tensors: dict[str, torch.Tensor], model: PreTrainedModel, max_r: int, scale: float, base_model: str | None = None
) -> PluginSet:
    """Adapters of all blocks, of which degrees pick rows, as a plugin set.

    Args:
        tensors: The checkpoint's.
        model: The backbone in transformers.
        max_r: Plugins in the checkpoint.
        scale: The scale that they were trained with.
        base_model: Hub id or path of the backbone.

    Raises:
        PluginFileError: if adapters are missing or do not fit the backbone.
        DegreeError: if the scale is not a finite number.
    """
    require_scale(scale)
    backbone = find_backbone(model)
    found = {match.groups(): tensors[name].float() for name in tensors if (match := ADAPTER.fullmatch(name))}
    adapters: dict[int, dict[str, Factors]] = {i: {} for i in range(max_r)}
    rank = 0
    for position, (path, layer) in enumerate(backbone.projections().items()):
        block, projection = str(position // 2), "qv"[position % 2]
        try:
            down, up = found[block, projection, "down"], found[block, projection, "up"]
        except KeyError:
            raise PluginFileError(
                f"The checkpoint lacks blocks.{block}.attn.{projection}_tocom: it has {len(found)} matrices of "
                f"adapters, the backbone's {len(backbone.layers)} blocks need {4 * len(backbone.layers)}. Expected a "
                "checkpoint of the authors' repository, trained without --r_src."
            ) from None
        rows = down.shape[0]
        expected = (rows, layer.in_features), (layer.out_features, rows)
        if rows % max_r or (tuple(down.shape), tuple(up.shape)) != expected:
            raise PluginFileError(
                f"blocks.{block}.attn.{projection}_tocom has shapes {tuple(down.shape)}, {tuple(up.shape)}; expected "
                f"{expected[0]} and {expected[1]} with rows that {max_r} degrees share."
            )
        rank = rows // max_r
        for i in range(max_r):
            active = slice(rows - rank * (i + 1), rows - rank * i)
            adapters[i][path] = Factors(down[active].clone(), up[:, active].contiguous())
    config = PluginSetConfig(
        backbone=BackboneFacts.of(backbone),
        base_model=base_model,
        max_r=max_r,
        rank=rank,
        trained_scale=scale,
        recommended_scale=scale,
        training={"converted_from": "a checkpoint of the authors' repository"},
    )
    return PluginSet(config, adapters)


def convert_weights(tensors: dict[str, torch.Tensor], head_dim: int = 64) -> PreTrainedModel:
    """A DeiT or ViT classifier of timm as that of transformers: `ViTForImageClassification`, or with a distillation
    token `DeiTForImageClassificationWithTeacher`.

    Args:
        tensors: timm's state dict.
        head_dim: Width of an attention head, which the weights do not tell.

    Raises:
        PluginFileError: if a weight is missing, unknown or of another shape than those of such a classifier.
    """
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    distilled = "dist_token" in tensors
    prefix = "deit." if distilled else "vit."
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in STEM:
            renamed[prefix + STEM[name]] = value
        elif block and block[2] == "attn.qkv":
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefix}layers.{block[1]}.attention.{projection}_proj.{block[3]}"] = part.clone()
        elif block and block[2] in BLOCK:
            renamed[f"{prefix}layers.{block[1]}.{BLOCK[block[2]]}.{block[3]}"] = value
        elif name.startswith(("head.", "head_dist.")):
            head, _, kind = name.partition(".")
            renamed[f"{_head_name(head, distilled)}.{kind}"] = value
        else:
            raise PluginFileError(f"{name} is no weight of a timm DeiT or ViT classifier that transformers has.")
    try:
        patches, patch = tensors["pos_embed"].shape[1] - 1 - distilled, tensors["patch_embed.proj.weight"]
        if math.isqrt(patches) ** 2 != patches:
            raise PluginFileError(f"The weights have positions for {patches} patches, which form no square.")
        if patch.shape[0] % head_dim:
            raise PluginFileError(
                f"The weights are {patch.shape[0]} wide, which heads of {head_dim} do not divide. Give their width "
                "(--head_dim)."
            )
        blocks = [int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)]
        settings = {
            "hidden_size": patch.shape[0], "num_attention_heads": patch.shape[0] // head_dim,
            "num_hidden_layers": 1 + max(blocks, default=0),
            "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0], "patch_size": patch.shape[-1],
            "num_channels": patch.shape[1], "image_size": patch.shape[-1] * round(patches**0.5),
            "num_labels": tensors["head.weight"].shape[0], "layer_norm_eps": 1e-6,
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        }  # fmt: skip
    except KeyError as error:
        raise PluginFileError(f"The weights lack {error}. Expected a timm DeiT or ViT classifier.") from None
    model: PreTrainedModel
    if distilled:
        model = DeiTForImageClassificationWithTeacher(DeiTConfig(**settings))
    else:
        model = ViTForImageClassification(ViTConfig(**settings))
    try:
        wrong = model.load_state_dict(renamed, strict=False)
    except RuntimeError as error:  # names every shape that differs
        raise PluginFileError(f"The weights do not fit a {type(model).__name__}: {error}") from error
    if wrong.missing_keys or wrong.unexpected_keys:
        raise PluginFileError(f"Weights are missing ({wrong.missing_keys}) or unknown ({wrong.unexpected_keys}).")
    return model.eval()


def _head_name(head: str, distilled: bool) -> str:
    if not distilled:
        return "classifier"
    return "cls_classifier" if head == "head" else "distillation_classifier"
