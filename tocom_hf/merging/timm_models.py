# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Models of timm in the wrappers of transformers: which of them merge tokens, and what their modules tell.

A wrapper's configuration names an entry of timm's list and little else, so the modules themselves are looked at.
Classes are compared by name: timm is not a dependency, and whoever has such a model has it imported.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import UnsupportedModelError


if TYPE_CHECKING:
    from tocom_hf.merging.architectures import Architecture


MODEL_TYPE = "timm_wrapper"
_BLOCK = "timm.models.vision_transformer.Block"
_ATTENTION = "timm.layers.attention.Attention"
_MODELS = ("timm.models.vision_transformer.VisionTransformer", "timm.models.deit.VisionTransformerDistilled")
# what its layers may be called with besides
TIMM_MASKS = ("attn_mask", "is_causal")
# the classes whose forward is known, as those of transformers are
KNOWN_CLASSES = (_BLOCK, _ATTENTION, *_MODELS)
# these treat every token by itself
_MLPS = ("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU")

_PARALLEL = "attention and MLP read the same tokens, so there is no place between them to merge"
_WINDOWED = "it attends within windows of a fixed grid, which merged tokens no longer form"
_BIASED = "its attention adds a bias for every pair of grid positions, and a merged token has no single position"
_STAGED = "it pools or strides over the token grid between its stages, which merged tokens no longer form"
_GRID = "it convolves over the token grid within its layers, which merged tokens no longer form"
_CONVOLUTIONAL = "it is a convolutional network, which has no tokens"
# why, by the name of the class of the model, of a layer or of its attention
_REASONS = {
    **dict.fromkeys(
        ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM", "MaxxVit", "Hiera",
         "HieraDet", "Nest", "GlobalContextVit", "VOLO"),
        _WINDOWED,
    ),
    **dict.fromkeys(("Beit", "VisionTransformerRelPos", "Levit", "LevitDistilled", "TinyVit"), _BIASED),
    **dict.fromkeys(("PoolingVisionTransformer", "MultiScaleVit", "PyramidVisionTransformerV2", "Twins"), _STAGED),
    **dict.fromkeys(("CoaT", "Xcit"), _GRID),
    **dict.fromkeys(
        ("ResNet", "ConvNeXt", "EfficientNet", "MobileNetV3", "RegNet", "ByobNet", "DenseNet", "ResNetV2", "VGG"),
        _CONVOLUTIONAL,
    ),
    **dict.fromkeys(("ParallelScalingBlock", "DiffParallelScalingBlock"), _PARALLEL),
    "ParallelThingsBlock": "it has several attentions side by side, each of which would merge other tokens",
    "ResPostBlock": "it normalises what attention put out instead of what it takes in",
    "DiffAttention": "it subtracts one attention from another, for which merging has no form",
    "NaFlexVit": "it pads images of different shapes to one length, and merging takes no padding mask",
    "FeatureGetterNet": "it was made with features_only, which keeps maps of inner layers alone",
    "GlobalResponseNormMlp": "its MLP normalises over all tokens",
}  # fmt: skip


class Dimensions(NamedTuple):
    """The measures of a backbone that a configuration of transformers usually names, `None` where it does not.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads: Integers.
        patch_size, image_size: One integer, or height and width.
        num_channels: Channels of the images.
    """

    hidden_size: Any
    num_hidden_layers: Any
    num_attention_heads: Any
    patch_size: Any
    image_size: Any
    num_channels: Any


class TimmReader:
    """Reads a wrapper's model of timm where a row of the table says too little."""

    def resolve(self, module: PreTrainedModel, row: "Architecture") -> "Architecture":
        """The row of one model.

        Raises:
            UnsupportedModelError: if it is not a plain vision transformer.
        """
        model: Any = module.timm_model
        _require_plain(module, model)
        return replace(
            row,
            protected=model.num_prefix_tokens,
            class_token=model.cls_token is not None,
            restore=model.global_pool != "token",
        )

    def dimensions(self, module: PreTrainedModel) -> Dimensions:
        """What transformers' configurations have of other models."""
        model: Any = module.timm_model
        return Dimensions(
            hidden_size=model.embed_dim,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=model.blocks[0].attn.num_heads,
            patch_size=_as_one(model.patch_embed.feat_ratio(as_scalar=False)),
            image_size=_as_one(model.patch_embed.img_size),
            num_channels=model.in_chans,
        )


def full_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _require_plain(module: PreTrainedModel, model: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless a model is made of timm's own plain blocks, and nothing else."""
    if not _is_one_of(model, _MODELS):
        raise _refused(module, model)
    for layer in model.blocks.children():  # type: ignore[union-attr]
        if not _is_one_of(layer, (_BLOCK,)):
            raise _refused(module, layer)
        attention: Any = layer.attn
        if not _is_one_of(attention, (_ATTENTION,)):
            raise _refused(module, attention)
        if attention.gate is not None:
            raise _refused(module, attention, "it multiplies what attention puts out by a gate of its inputs")
        if not _is_one_of(layer.mlp, _MLPS):
            raise _refused(module, layer.mlp)  # type: ignore[arg-type]


def _is_one_of(part: Any, names: tuple[str, ...]) -> bool:
    """Whether a module is exactly of one of these classes, merging or not."""
    return full_name(getattr(type(part), "stock_class", type(part))) in names


def _refused(module: PreTrainedModel, part: nn.Module, reason: str | None = None) -> UnsupportedModelError:
    name = type(part).__name__
    if reason is None and getattr(part, "rope", None) is not None:
        reason = "it rotates queries and keys by the position of each token, and a merged token has no single position"
    reason = reason or _REASONS.get(name) or "it is not one of the classes that make a plain vision transformer"
    architecture = getattr(module.config, "architecture", None)
    return UnsupportedModelError(
        f"Token merging does not support {architecture!r} of timm, because of its {name}: {reason}. Of timm's models "
        "it supports the plain vision transformers: VisionTransformer with Block and Attention, and the distilled DeiT."
    )


def _as_one(pair: Any) -> Any:
    """One integer for a square, as configurations of transformers have it."""
    if isinstance(pair, tuple | list) and len(set(pair)) == 1:
        return pair[0]
    return pair
