# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The supported model families, one table row each: which submodules play which part in token merging."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.positions import AxialRotary, ClipRotary, Positions
from tocom_hf.merging.refusals import explain, parts_of
from tocom_hf.merging.timm_models import MODEL_TYPE, TimmReader


@dataclass(frozen=True)
class Architecture:
    """Where token merging finds the parts of one family's transformer layer.

    A part of a layer is named by its path in the layer (`attention.output.dense`).

    Attributes:
        layers: Path from the backbone to the `ModuleList` of its layers.
        attention: The part of a layer that projects to queries, keys and values.
        norm_before: The layer norm in front of attention.
        attention_branch: What the result of attention passes, in this order, before it joins the residual stream: layer
            scale, dropout or drop path. A parameter is a scale.
        mlp_branch: What makes the second branch, in this order: layer norm, MLP, layer scale, dropout or drop path.
        query, key, value, output: Names of the projections in the attention block. `output` is `None` where it stands
            in `attention_branch`.
        qkv: Name of the one projection, in the attention block, whose outputs are query, key and value, a third each in
            this order, in place of the three; `None` where they are three.
        query_norm, key_norm: Names of the norms of queries and keys, or `None`.
        norms_heads: Whether these norm every head by itself, and not all heads at once.
        dropout, scaling, head_dim: Names of its attention dropout (a probability, or a module), of its logit scale, and
            of the number of channels of a head.
        num_heads: Name of the number of its heads, where it keeps that and not `head_dim`.
        positions: How attention rotates queries and keys by position, or `None` where it does not.
        eager_adds_mask: Whether the family's own eager attention adds a mask to its logits.
        returns_weights: Whether a layer returns its attention weights beside its hidden states.
        layer_arguments: Names of what the backbone hands its layers by position, behind the hidden states.
        passes_kwargs: Whether keyword arguments of the backbone's forward reach its layers.
        protected: Number of class and distillation tokens at the front, which never merge.
        class_token: Whether the first of these is a class token, where there are any.
        registers: Configuration attribute that counts further tokens behind those, or `None`: registers, or a number of
            class tokens that models choose. They never merge either.
        restore: Whether heads of this family read patch tokens, so that merged tokens must be copied back to the
            positions that they came from.
        restores_always: Whether the backbone itself reads tokens by their numbers, so that it cannot run without that.
        token_mask: The argument of the backbone's forward that drops tokens, beside `attention_mask`, if it has one.
        shuffles_patches: Whether every call puts the patches in a random order, as masked autoencoders do.
        inputs: What the model takes: images; spectrograms, `(batch, frames, mel bins)`; clips,
            `(batch, frames, channels, height, width)`; or images as sequences of patches, `(batch, patches, values)`.
        input_name: What the backbone's forward calls them.
        clip_sizes: Configuration attributes with the frames, the channels, and the height and width of a clip.
        reader: What looks at a model whose configuration says too little: it completes the row, or refuses the model
            with the reason. `None` where the row says all.
        intermediates: Path, in the backbone, of a module of timm that recomputes its layers and makes maps of inner
            ones itself, or `None`.
        fine_tuned_as: Model type that checkpoints become when they are fine-tuned, with the same layers; by default
            their own. Plugins of the one fit the other.
    """

    layers: str = "layers"
    attention: str = "attention"
    norm_before: str = "layernorm_before"
    attention_branch: tuple[str, ...] = ("dropout",)
    mlp_branch: tuple[str, ...] = ("layernorm_after", "mlp", "dropout")
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str | None = "o_proj"
    qkv: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norms_heads: bool = False
    dropout: str = "attention_dropout"
    scaling: str = "scaling"
    head_dim: str = "head_dim"
    num_heads: str | None = None
    positions: Positions | None = None
    eager_adds_mask: bool = True
    returns_weights: bool = False
    layer_arguments: tuple[str, ...] = ("attention_mask",)
    passes_kwargs: bool = True
    protected: int = 1
    class_token: bool = True
    registers: str | None = None
    restore: bool = False
    restores_always: bool = False
    token_mask: str | None = None
    shuffles_patches: bool = False
    inputs: Literal["images", "spectrograms", "clips", "patch sequences"] = "images"
    input_name: str = "pixel_values"
    clip_sizes: tuple[str, str, str] = ("num_frames", "num_channels", "image_size")
    reader: TimmReader | None = None
    intermediates: str | None = None
    fine_tuned_as: str | None = None

    @property
    def query_and_value(self) -> tuple[str, ...]:
        """Names, in a transformer layer, of the projections that the paper's plugins apply to.

        One where query, key and value are one projection: plugins change its rows of query and value alone.
        """
        if self.qkv is not None:
            return (f"{self.attention}.{self.qkv}",)
        return f"{self.attention}.{self.query}", f"{self.attention}.{self.value}"

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """Names, in a transformer layer, of the projections that read the normalised input of attention."""
        if self.qkv is not None:
            return (f"{self.attention}.{self.qkv}",)
        return tuple(f"{self.attention}.{name}" for name in (self.query, self.key, self.value))


_DINOV2 = Architecture(
    layers="encoder.layer",
    norm_before="norm1",
    attention_branch=("layer_scale1", "drop_path"),
    mlp_branch=("norm2", "mlp", "layer_scale2", "drop_path"),
    restore=True,
)
_CLIP = Architecture(
    layers="encoder.layers",
    attention="self_attn",
    norm_before="layer_norm1",
    attention_branch=(),
    mlp_branch=("layer_norm2", "mlp"),
    output="out_proj",
    dropout="dropout",
    scaling="scale",
    restore=True,
)
_BLIP = replace(_CLIP, qkv="qkv", output="projection")
_BLIP_2 = replace(_BLIP, dropout="attention_dropout")
# attention in a block of its own within that of attention and its output
_NESTED = Architecture(
    layers="encoder.layer",
    attention="attention.attention",
    attention_branch=("attention.output.dense", "attention.output.dropout"),
    mlp_branch=("layernorm_after", "intermediate", "output.dense", "output.dropout"),
    query="query",
    key="key",
    value="value",
    output=None,
    dropout="dropout_prob",
    head_dim="attention_head_size",
    restore=True,
)
_SIGLIP = replace(_CLIP, protected=0)
_AIMV2 = replace(_SIGLIP, attention="attention", norm_before="rms_norm1", mlp_branch=("rms_norm2", "ffn"))

# keyed by `config.model_type` of the backbone
ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture(),
    "deit": Architecture(protected=2),  # class and distillation token
    "vit_msn": Architecture(),
    "vit_mae": Architecture(shuffles_patches=True, fine_tuned_as="vit"),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(_DINOV2, registers="num_register_tokens"),
    "dinov3_vit": replace(
        _DINOV2,
        layers="model.layer",
        dropout="dropout",
        registers="num_register_tokens",
        positions=AxialRotary(),
    ),
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "ijepa": Architecture(protected=0, restore=True),
    "audio-spectrogram-transformer": Architecture(protected=2, inputs="spectrograms", input_name="input_values"),
    "mlcd_vision_model": replace(
        _CLIP, positions=AxialRotary(), layer_arguments=("position_embeddings", "attention_mask")
    ),
    # video
    "videomae": replace(
        _NESTED,  # restored, because classifiers read the mean of all tokens
        passes_kwargs=False,
        protected=0,
        token_mask="bool_masked_pos",
        inputs="clips",
    ),
    "vivit": Architecture(inputs="clips"),
    "vjepa2": replace(
        _NESTED,
        attention="attention",
        norm_before="norm1",
        attention_branch=("drop_path",),
        mlp_branch=("norm2", "mlp", "drop_path"),
        output="proj",
        positions=ClipRotary(),
        eager_adds_mask=False,
        returns_weights=True,
        protected=0,
        restores_always=True,  # its predictor takes tokens by their numbers
        inputs="clips",
        input_name="pixel_values_videos",
        clip_sizes=("frames_per_clip", "in_chans", "crop_size"),
    ),
    # query, key and value from one projection
    "blip_vision_model": _BLIP,
    "blip_2_vision_model": _BLIP_2,
    "instructblip_vision_model": _BLIP_2,
    "instructblipvideo_vision_model": _BLIP_2,
    "mgp-str": Architecture(
        layers="encoder.blocks",
        attention="attn",
        norm_before="norm1",
        attention_branch=("attn.proj_drop", "drop_path"),
        mlp_branch=("norm2", "mlp", "drop_path"),
        qkv="qkv",
        output="proj",
        dropout="attn_drop",
        scaling="scale",
        num_heads="num_heads",
        returns_weights=True,
        passes_kwargs=False,
        restore=True,
    ),
    # dense heads
    "dpt": replace(_NESTED, passes_kwargs=False),
    "vitpose_backbone": replace(_NESTED, mlp_branch=("layernorm_after", "mlp"), protected=0),
    # towers of language models, and those of contrastive models and detectors
    "metaclip_2_vision_model": _CLIP,
    "idefics3_vision": replace(_SIGLIP, passes_kwargs=False),
    "smolvlm_vision": replace(_SIGLIP, passes_kwargs=False),
    "internvl_vision": Architecture(
        layers="encoder.layer",
        attention_branch=("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
        mlp_branch=("layernorm_after", "mlp", "dropout", "lambda_2"),
        output=None,
        query_norm="q_norm",
        key_norm="k_norm",
        scaling="scale",
        restore=True,
        passes_kwargs=False,
    ),
    "siglip2_vision_model": replace(_SIGLIP, inputs="patch sequences"),
    "idefics2_vision": _SIGLIP,
    "altclip_vision_model": _CLIP,
    "chinese_clip_vision_model": _CLIP,
    "clipseg_vision_model": _CLIP,
    "owlvit_vision_model": _CLIP,
    "owlv2_vision_model": _CLIP,
    "git_vision_model": replace(_CLIP, layers="vision_model.encoder.layers"),
    "kosmos_2_vision_model": _CLIP,
    "pixio": Architecture(
        attention_branch=("dropout", "drop_path"),
        mlp_branch=("layernorm_after", "mlp", "dropout", "drop_path"),
        protected=0,
        registers="n_cls_tokens",
        restore=True,
    ),
    "radio": replace(_DINOV2, protected=0, registers="num_summary_tokens"),
    "tipsv2_vision_model": replace(_DINOV2, registers="num_register_tokens"),
    "aimv2_vision_model": _AIMV2,
    "ovis2_vision": replace(_AIMV2, layers="transformer.encoder.layers"),
    "janus_vision_model": replace(
        _SIGLIP,
        attention_branch=("self_attn.projection_layer", "self_attn.projection_dropout"),
        output=None,
        query_norm="q_norm",
        key_norm="k_norm",
        dropout="attention_dropout",
    ),
    # protected tokens, and whether tokens are restored, are read from the model
    MODEL_TYPE: Architecture(
        layers="timm_model.blocks",
        attention="attn",
        norm_before="norm1",
        attention_branch=("attn.norm", "attn.proj", "attn.proj_drop", "ls1", "drop_path1"),
        mlp_branch=("norm2", "mlp", "ls2", "drop_path2"),
        output=None,
        qkv="qkv",
        query_norm="q_norm",
        key_norm="k_norm",
        norms_heads=True,
        dropout="attn_drop",
        scaling="scale",
        passes_kwargs=False,
        reader=TimmReader(),
        intermediates="timm_model",
    ),
}


def find_part(layer: nn.Module, path: str) -> Any:
    """The part of a layer that stands at a path: a module, or a parameter."""
    return functools.reduce(getattr, path.split("."), layer)


def projection_paths(model_type: str, num_layers: int, target_modules: Iterable[str] | None = None) -> list[str]:
    """Paths, in a backbone of this type, of the linear layers that plugins apply to, layer by layer.

    Args:
        model_type: Of the backbone's configuration.
        num_layers: How many transformer layers it has.
        target_modules: Names in a transformer layer; by default query and value, as in the paper.

    Raises:
        UnsupportedModelError: if the model type is not in the table.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise unsupported(model_type)
    names = architecture.query_and_value if target_modules is None else tuple(target_modules)
    return [f"{architecture.layers}.{index}.{name}" for index in range(num_layers) for name in names]


def supported_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Those of a supported type among a configuration and its parts (`CLIPConfig` has a vision and a text part)."""
    return [part for part in parts_of(config) if part.model_type in ARCHITECTURES]


def supported_types(config: PreTrainedConfig) -> set[str]:
    """The model types of `supported_parts`."""
    return {part.model_type for part in supported_parts(config)}


def unsupported(subject: str | PreTrainedConfig) -> UnsupportedModelError:
    """The error for a model type that is not in the table, or for a configuration without a part that is."""
    return UnsupportedModelError(
        f"Token merging does not support the architecture {explain(subject)}. "
        f"Supported model types: {', '.join(sorted(ARCHITECTURES))}."
    )
