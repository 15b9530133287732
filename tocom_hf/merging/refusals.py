# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Why token merging does not support a model type: for those that people try most, and for whatever reads text."""

import inspect

from transformers import MODEL_MAPPING, PreTrainedConfig


_WINDOWED = "it attends within windows of a fixed grid, which merged tokens no longer form"
_GRID = (
    "its layers keep the tokens in a grid of height by width, which they cut into windows, and merged tokens no longer "
    "form one"
)
_POOLED_WINDOWS = "its layers attend within windows and pool the grid of tokens, which merged tokens no longer form"
_BIASED = "its attention is built to add a bias for every pair of grid positions, and a merged token has no single one"
_TABLE = "it rotates queries and keys by a table that is made once for the whole grid, with the class token at its end"
_CAUSAL_UNMASKED = (
    "its attention is causal where no mask is given, and a merged token has no single place in that order"
)
_HIERARCHICAL = "it pools or strides over the token grid between its stages, which merged tokens no longer form"
_PACKED = (
    "it packs the tokens of all images into one sequence without a batch, and joins neighbours of the grid behind its "
    "layers (patch merger)"
)
_PACKED_WINDOWS = f"{_PACKED}; most of its layers attend within windows of the grid"
_PACKED_DEPTHS = f"{_PACKED} and between them (deepstack)"
_JOINED = "it joins all images into one sequence, with a mask that keeps them apart"
_POOLED_BY_POSITION = (
    "it pools its tokens by the positions that came with them, and norms what its branches put out, too"
)
_DETECTION_TOKENS = (
    "its detection tokens stand behind the patches, and by default it adds an embedding to every grid position again "
    "behind its layers (use_mid_position_embeddings)"
)
_TWO_FORMS = "its layers return attention weights beside hidden states only when asked, which the table cannot say yet"
_UNEVEN_HEADS = (
    "its heads share keys and values in some layers and not in others (num_key_value_heads_per_layer), and plugins are "
    "made for layers of one shape"
)
_TIME_AND_SPACE = "it sorts its tokens by frame, row and column in every layer, to attend over time and space in turn"
_GROUPS = "it merges tokens itself: between its stages, learned group tokens gather the patches"
_LATE_QUERIES = "its queries join the sequence in its last layers, with masks over the grid of patches"
_WORDS_AND_PATCHES = (
    "its sequence holds words beside patches, and its attention adds a bias for every pair of positions"
)
_CONVOLUTIONS = "it is made of convolutions or pooling and has no attention between tokens that could merge"
_CHANNELS = (
    "it attends within windows of a fixed grid and over channels in turn, with convolutions over the grid between"
)
_FEATURE_MAP = (
    "it reads the feature map of its backbone, and adds the positions of the map's cells to queries and keys in every "
    "layer; merging can only apply to the backbone, where that is of a supported type"
)
_SAMPLED = (
    "it samples the feature maps of its backbone at points of the grid; merging can only apply to the backbone, where "
    "that is of a supported type"
)
_CAUSAL = "it is causal: every token sees only those in front of it, and a merged token has no single place"
_POST_NORM = (
    "its base models norm the sums behind attention and MLP, and merging is made for layers that norm in front of them"
)
_DISTANCES = (
    "its attention adds a bias for the distance of every pair of tokens, and a merged token has no single place"
)

# keyed by `config.model_type` of the part that cannot be supported; a test holds that no supported type is among them
REASONS: dict[str, str] = {
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr", "rf_detr_dinov2"), _WINDOWED),
    "lw_detr_vit": _WINDOWED,
    **dict.fromkeys(("sam_vision_model", "sam_hq_vision_model", "sam3_vit_model", "vitdet", "got_ocr2_vision"), _GRID),
    **dict.fromkeys(("deepseek_ocr2_sam_vision_model", "unlimited_ocr_sam_vision_model"), _GRID),
    **dict.fromkeys(("hiera", "sam2_hiera_det_model"), _POOLED_WINDOWS),
    **dict.fromkeys(("beit", "data2vec-vision", "levit", "seggpt"), _BIASED),
    "llama4_vision_model": _TABLE,
    "phi4_multimodal_vision": _CAUSAL_UNMASKED,
    "flava_image_model": _TWO_FORMS,
    "sapiens2": _UNEVEN_HEADS,
    **dict.fromkeys(("pvt", "pvt_v2", "cvt", "segformer", "glpn", "mobilevit"), _HIERARCHICAL),
    **dict.fromkeys(("qwen2_vl_vision", "glm4v_vision", "qwen3_5_vision"), _PACKED),
    **dict.fromkeys(("qwen2_5_vl_vision", "qwen2_5_omni_vision_encoder"), _PACKED_WINDOWS),
    **dict.fromkeys(("qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_omni_moe_vision_encoder"), _PACKED_DEPTHS),
    "pixtral": _JOINED,
    "gemma4_vision": _POOLED_BY_POSITION,
    "yolos": _DETECTION_TOKENS,
    "timesformer": _TIME_AND_SPACE,
    "groupvit_vision_model": _GROUPS,
    **dict.fromkeys(("eomt", "eomt_dinov3"), _LATE_QUERIES),
    "layoutlmv3": _WORDS_AND_PATCHES,
    "florence_vision": _CHANNELS,
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet", "bit"), _CONVOLUTIONS),
    **dict.fromkeys(("efficientnet", "align_vision_model", "mobilenet_v1", "mobilenet_v2"), _CONVOLUTIONS),
    **dict.fromkeys(("focalnet", "poolformer", "hgnet_v2", "rt_detr_resnet"), _CONVOLUTIONS),
    **dict.fromkeys(("detr", "conditional_detr", "table-transformer"), _FEATURE_MAP),
    **dict.fromkeys(("deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"), _SAMPLED),
    "imagegpt": _CAUSAL,
    **dict.fromkeys(("wav2vec2", "hubert", "data2vec-audio"), _POST_NORM),
    "wavlm": _DISTANCES,
}
_READS_TEXT = "it reads text, and merging is for the patches of images, videos and spectrograms"
_NOT_DESCRIBED = "its layers are not described in the table of architectures"


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those of its parts, of their parts too (`ColPaliConfig` > `PaliGemmaConfig` > SigLIP's)."""
    found = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            found += parts_of(part)
    return found


def explain(subject: str | PreTrainedConfig) -> str:
    """Which architecture is not supported, and why.

    Args:
        subject: A model type, or a configuration, whose parts are looked at, too.

    Returns:
        A clause: `'qwen2_vl', whose part 'qwen2_vl_vision' does not fit: it packs ...`.
    """
    if isinstance(subject, str):
        return f"{subject!r}: {REASONS.get(subject, _NOT_DESCRIBED)}"
    whole = subject.model_type
    parts = parts_of(subject)
    for part in parts:
        if part.model_type in REASONS:
            fits = "" if part is subject else f", whose part {part.model_type!r} does not fit"
            return f"{whole!r}{fits}: {REASONS[part.model_type]}"
    if len(parts) > 1:
        names = ", ".join(
            repr(name) for name in dict.fromkeys(part.model_type for part in parts[1:] if part.model_type)
        )
        return f"{whole!r}: none of its parts ({names}) is described in the table of architectures"
    return f"{whole!r}: {_READS_TEXT if _reads_text(subject) else _NOT_DESCRIBED}"


def _reads_text(config: PreTrainedConfig) -> bool:
    """Whether token ids of text are all that the model of a configuration takes."""
    try:
        model_class = MODEL_MAPPING.get(type(config), None)
    except (ImportError, ValueError):
        # The mapping of transformers 5.23 names classes that its modules do not have.
        return False
    if not isinstance(model_class, type):
        return False
    arguments = inspect.signature(model_class.forward).parameters
    others = ("pixel_values", "input_values", "input_features", "past_values")
    return "input_ids" in arguments and not any(name in arguments for name in others)
