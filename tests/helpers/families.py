# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A small random model of every supported family, and what the slow reference must know about it."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf


COMMON = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
PRE_NORM = ("layernorm_before", "attention", None, "layernorm_after", None, "o_proj")
DINO = ("norm1", "attention", "layer_scale1", "norm2", "layer_scale2", "o_proj")
CLIP = ("layer_norm1", "self_attn", None, "layer_norm2", None, "out_proj")
VIDEOMAE = (
    *("layernorm_before", "attention.attention", None, "layernorm_after", None, "attention.output.dense"),
    ("intermediate", "output.dense"),
)
VJEPA2 = ("norm1", "attention", None, "norm2", None, "proj")


@dataclass(frozen=True)
class Family:
    """One class to test: how to make it, and the names of its parts, written down independently of the package."""

    model_class: Any
    config: Any
    protected: int
    layers: str
    names: tuple
    output: str = "logits"
    audio: bool = False
    angles_of: Any = None  # of rotary positions, see `reference.rotate`
    turn: Any = None  # of rotary positions of other kinds, see `reference.hidden_states`
    pickles: bool = True  # transformers puts hooks on some models, when it makes them, that cannot be pickled
    clips: str | None = None  # what the model calls its clips, `(batch, 8, 3, 16, 16)`

    def __str__(self):
        return self.model_class.__name__

    def make(self, seed=0, layers=4):
        torch.manual_seed(seed)
        config = self.config()
        part = getattr(config, "backbone_config", None) or getattr(config, "vision_config", config)
        part.num_hidden_layers = layers
        if hasattr(config, "backbone_config"):
            part.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, layers + 1))]
            part.out_features = [f"stage{layers}"]
        model = self.model_class(config)
        # transformers starts some parameters at zero or one, where mistakes would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or any(part in name for part in ("bias", "token", "class_embedding", "lambda")):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    def inputs(self, batch=3, seed=7):
        generator = torch.Generator().manual_seed(seed)
        if self.audio:
            return {"input_values": torch.randn(batch, 32, 32, generator=generator)}
        if self.clips:
            return {self.clips: torch.randn(batch, 8, 3, 16, 16, generator=generator)}
        inputs = {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
        if self.model_class is hf.ViTMAEModel:  # which shuffles the patches by noise; ascending noise keeps their order
            inputs["noise"] = torch.linspace(0, 1, 64).repeat(batch, 1)
        return inputs

    def inputs_as(self, dtype, **arguments):
        """Inputs in another dtype; what counts stays integers."""
        inputs = self.inputs(**arguments)
        return {name: part.to(dtype) if part.is_floating_point() else part for name, part in inputs.items()}

    def result(self, model, inputs):
        """What heads see: logits, the pooled output, or the class token of the last hidden state."""
        with torch.no_grad():
            result = getattr(model(**inputs), self.output)
        return result[:, 0] if self.output == "last_hidden_state" else result


def clip_config():
    vision = {key: value for key, value in COMMON.items() if key != "num_labels"}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    return vision, text


def clip():
    vision, text = clip_config()
    return hf.CLIPConfig(vision_config=vision, text_config=text, num_labels=5, projection_dim=8)


def siglip():
    vision, text = clip_config()
    return hf.SiglipConfig(vision_config=vision, text_config=text, num_labels=5)


def ast():
    settings = {key: value for key, value in COMMON.items() if key != "image_size"}
    return hf.ASTConfig(**settings, num_mel_bins=32, max_length=32, frequency_stride=4, time_stride=4)


def dino(config_class, **settings):
    common = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
    return config_class(**common, mlp_ratio=2, layerscale_value=0.5, **settings)


def dinov3(**settings):
    settings = {**COMMON, "num_register_tokens": 2, "layerscale_value": 0.5, **settings}
    return hf.DINOv3ViTConfig(**{key: value for key, value in settings.items() if key != "num_labels"})


def dinov3_angles(position):
    """Patch centres from -1 to 1 on an 8 x 8 grid, heads of 8 channels: frequencies 1 and 1 / sqrt(100)."""
    if position < 3:
        return None
    row, column = divmod(position - 3, 8)
    centres = [(2 * place + 1) / 8 - 1 for place in (row, column)]
    return torch.tensor([2 * math.pi * c * f for c in centres for f in (1, 0.1)], dtype=torch.float64)


@functools.cache
def _mlcd_class_angles():
    """What the class token of the tested MLCD turns by, which is learned."""
    family = next(family for family in SIMILAR if family.model_class is hf.MLCDVisionModel)
    return family.make().class_pos_emb.detach()[0].double()


def mlcd_angles(position):
    """Rows and columns from 0 on a 8 x 8 grid, heads of 8 channels: frequencies 1 and 1 / sqrt(10,000)."""
    if position == 0:
        return _mlcd_class_angles()
    return torch.tensor([place * f for place in divmod(position - 1, 8) for f in (1, 0.01)], dtype=torch.float64)


CLIP_SIZES = {**COMMON, "image_size": 16, "num_frames": 8}  # 4 x 4 x 4 tokens


def videomae(**settings):
    return hf.VideoMAEConfig(**{**CLIP_SIZES, "tubelet_size": 2, **settings})


def vivit(**settings):
    settings = {**CLIP_SIZES, "tubelet_size": [2, 4, 4], **settings}
    return hf.VivitConfig(**{key: value for key, value in settings.items() if key != "patch_size"})


def vjepa2(**settings):
    common = {key: value for key, value in COMMON.items() if key not in ("image_size", "intermediate_size")}
    sizes = {"crop_size": 16, "frames_per_clip": 8, "tubelet_size": 2, "mlp_ratio": 2, "num_attention_heads": 2}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return hf.VJEPA2Config(**{**common, **sizes, **predictor, "num_pooler_layers": 1, **settings})


def vjepa2_turn(heads, groups, grid=4):
    """Four channels for each of frame, row and column on a grid of `grid` x `grid`; the last four do not turn.

    Channel `i` of an axis turns against its neighbour, by the angle that stands at `i` when all angles are written
    twice in a row: 1, 0.01, 1, 0.01 times the coordinate.
    """
    turned = heads.clone()
    for token, group in enumerate(groups):
        places = [(p // grid**2, p // grid % grid, p % grid) for p in group]
        mean = [sum(place[axis] for place in places) / len(places) for axis in range(3)]
        for axis in range(3):
            for i in range(4):
                angle = mean[axis] * (1.0, 0.01)[i % 2]
                channel = 4 * axis + i
                partner = heads[token, :, channel - 1] if i % 2 else -heads[token, :, channel + 1]
                turned[token, :, channel] = heads[token, :, channel] * math.cos(angle) + partner * math.sin(angle)
    return turned


def encoder_decoder(encoder=None):
    """A model that describes images: it wants tokens of text beside them."""
    encoder = encoder or hf.ViTConfig(**COMMON)
    decoder = hf.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=20, bos_token_id=0, eos_token_id=0
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    return hf.VisionEncoderDecoderModel(config).eval()


def video_llava():
    """A model with two towers that could merge tokens."""
    text = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    config = hf.VideoLlavaConfig(
        vision_config=clip().vision_config, text_config=text, image_token_index=98, video_token_index=99
    )
    torch.manual_seed(0)
    return hf.VideoLlavaForConditionalGeneration(config).eval()


# --- block styles: one projection for queries, keys and values ---
BLIP = ("layer_norm1", "self_attn", None, "layer_norm2", None, "projection")
MGP_STR = ("norm1", "attn", None, "norm2", None, "proj")


def blip(config_class):
    return config_class(**{key: value for key, value in COMMON.items() if key != "num_labels"}, qkv_bias=True)


def mgp_str():
    sizes = {key: value for key, value in COMMON.items() if key not in ("intermediate_size", "image_size")}
    return hf.MgpstrConfig(**sizes, image_size=[32, 32], mlp_ratio=2)


def of_fused_projections():
    def like_blip(model_class, config_class):
        return Family(model_class, lambda: blip(config_class), 1, "encoder.layers", BLIP, "pooler_output")

    return [
        Family(hf.MgpstrModel, mgp_str, 1, "encoder.blocks", MGP_STR, "last_hidden_state"),
        like_blip(hf.Blip2VisionModel, hf.Blip2VisionConfig),
        like_blip(hf.InstructBlipVisionModel, hf.InstructBlipVisionConfig),
        like_blip(hf.InstructBlipVideoVisionModel, hf.InstructBlipVideoVisionConfig),
    ]


def dpt():
    return hf.DPTConfig(
        **COMMON, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8
    )


def vitpose():
    settings = {key: value for key, value in COMMON.items() if key not in ("num_labels", "intermediate_size")}
    backbone = hf.VitPoseBackboneConfig(**{**settings, "image_size": [32, 32], "patch_size": [8, 8]}, mlp_ratio=2)
    return hf.VitPoseConfig(backbone_config=backbone, num_labels=5)


VITPOSE = (
    *("layernorm_before", "attention.attention", None, "layernorm_after", None, "attention.output.dense"),
    ("mlp",),
)
NESTED = (
    *("layernorm_before", "attention.attention", None, "layernorm_after", None, "attention.output.dense"),
    ("intermediate", "output.dense"),
)
# --- towers of language models, and those of contrastive models and detectors ---


@dataclass(frozen=True)
class NaflexFamily(Family):
    """SigLIP 2 that takes images of any shape, as sequences of patches."""

    def inputs(self, batch=3, seed=7):
        patches = torch.randn(batch, 64, 48, generator=torch.Generator().manual_seed(seed))
        ones = torch.ones(batch, 64, dtype=torch.int64)
        return {"pixel_values": patches, "pixel_attention_mask": ones, "spatial_shapes": torch.tensor([[8, 8]] * batch)}


def tower(config_class, **settings):
    """The configuration of a vision tower, with those of the common settings that it has."""
    common = {**COMMON, "mlp_ratio": 2, "projection_dim": 8, **settings}
    known = config_class().to_dict()
    return config_class(**{name: value for name, value in common.items() if name in known})


def vision_part(config_class, vision_class, **settings):
    """The configuration of a model with a vision tower and a small text model."""
    text = clip_config()[1]
    return config_class(vision_config=tower(vision_class).to_dict(), text_config=text, projection_dim=8, **settings)


def internvl_tower(**settings):
    return tower(
        hf.InternVLVisionConfig, image_size=[32, 32], patch_size=[4, 4], layer_scale_init_value=0.5, **settings
    )


def radio():
    sizes = {"num_cls_tokens": 2, "num_registers": 1, "summary_idxs": [0, 1], "patch_dim": 48, "max_img_size": 64}
    return tower(hf.RadioConfig, mlp_ratio=2.0, layerscale_value=0.5, **sizes)


def tower_families():
    """Rows that are like CLIP or DINOv2 but for names, class tokens, and how the state reaches the layers."""
    aimv2 = ("rms_norm1", "attention", None, "rms_norm2", None, "out_proj")
    internvl = ("layernorm_before", "attention", "lambda_1", "layernorm_after", "lambda_2", "projection_layer")
    layers, last = "encoder.layers", "last_hidden_state"
    idefics3 = hf.models.idefics3.modeling_idefics3.Idefics3VisionTransformer
    smolvlm = hf.models.smolvlm.modeling_smolvlm.SmolVLMVisionTransformer
    idefics2 = hf.models.idefics2.modeling_idefics2.Idefics2VisionTransformer
    ovis2 = hf.models.ovis2.modeling_ovis2.Ovis2VisionModel
    kosmos2 = hf.models.kosmos2.modeling_kosmos2.Kosmos2VisionModel
    return [
        Family(
            hf.MetaClip2ForImageClassification,
            lambda: vision_part(hf.MetaClip2Config, hf.MetaClip2VisionConfig, num_labels=5),
            1,
            "vision_model.encoder.layers",
            CLIP,
        ),
        Family(idefics3, lambda: tower(hf.models.idefics3.Idefics3VisionConfig), 0, layers, CLIP, last),
        Family(smolvlm, lambda: tower(hf.models.smolvlm.SmolVLMVisionConfig), 0, layers, CLIP, last),
        Family(
            hf.InternVLVisionModel,
            lambda: internvl_tower(use_qk_norm=True, norm_type="rms_norm"),
            1,
            "encoder.layer",
            internvl,
            last,
        ),
        NaflexFamily(
            hf.Siglip2VisionModel,
            lambda: tower(hf.Siglip2VisionConfig, num_patches=64),
            0,
            layers,
            CLIP,
            "pooler_output",
        ),
        Family(
            idefics2,
            lambda: tower(hf.models.idefics2.configuration_idefics2.Idefics2VisionConfig),
            0,
            layers,
            CLIP,
            last,
        ),
        Family(
            hf.MLCDVisionModel,
            lambda: tower(hf.MLCDVisionConfig),
            1,
            layers,
            CLIP,
            "pooler_output",
            angles_of=mlcd_angles,
        ),
        Family(hf.AltCLIPVisionModel, lambda: tower(hf.AltCLIPVisionConfig), 1, layers, CLIP, "pooler_output"),
        Family(hf.ChineseCLIPVisionModel, lambda: tower(hf.ChineseCLIPVisionConfig), 1, layers, CLIP, "pooler_output"),
        Family(
            hf.CLIPSegVisionModel,
            lambda: tower(hf.CLIPSegVisionConfig),
            1,
            layers,
            CLIP,
            "pooler_output",
        ),
        Family(hf.OwlViTVisionModel, lambda: tower(hf.OwlViTVisionConfig), 1, f"vision_model.{layers}", CLIP, last),
        Family(hf.Owlv2VisionModel, lambda: tower(hf.Owlv2VisionConfig), 1, f"vision_model.{layers}", CLIP, last),
        Family(hf.GitVisionModel, lambda: tower(hf.GitVisionConfig), 1, f"vision_model.{layers}", CLIP, last),
        Family(
            kosmos2,
            lambda: tower(hf.models.kosmos2.configuration_kosmos2.Kosmos2VisionConfig),
            1,
            f"model.{layers}",
            CLIP,
            "pooler_output",
        ),
        Family(hf.PixioModel, lambda: tower(hf.PixioConfig, n_cls_tokens=3), 3, "layers", PRE_NORM, "pooler_output"),
        Family(hf.RadioModel, radio, 3, "encoder.layer", DINO, "summary"),
        Family(
            hf.Tipsv2VisionModel,
            lambda: tower(hf.Tipsv2VisionConfig, num_register_tokens=2, layerscale_value=0.5),
            3,
            "encoder.layer",
            DINO,
            "pooler_output",
        ),
        Family(hf.Aimv2VisionModel, lambda: tower(hf.Aimv2VisionConfig), 0, layers, aimv2, "pooler_output"),
        Family(
            ovis2,
            lambda: tower(hf.models.ovis2.Ovis2VisionConfig, vocab_size=20),
            0,
            f"transformer.{layers}",
            aimv2,
            "pooler_output",
        ),
        Family(
            hf.JanusVisionModel,
            lambda: tower(hf.JanusVisionConfig),
            0,
            layers,
            ("layer_norm1", "self_attn", None, "layer_norm2", None, "projection_layer"),
            last,
        ),
    ]


FAMILIES = [
    Family(hf.ViTForImageClassification, lambda: hf.ViTConfig(**COMMON), 1, "vit.layers", PRE_NORM),
    Family(hf.ViTModel, lambda: hf.ViTConfig(**COMMON), 1, "layers", PRE_NORM, "pooler_output"),
    Family(hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**COMMON), 2, "deit.layers", PRE_NORM),
    Family(hf.DeiTForImageClassificationWithTeacher, lambda: hf.DeiTConfig(**COMMON), 2, "deit.layers", PRE_NORM),
    Family(hf.ViTMSNForImageClassification, lambda: hf.ViTMSNConfig(**COMMON), 1, "vit.layers", PRE_NORM),
    Family(
        hf.ViTMAEModel, lambda: hf.ViTMAEConfig(**COMMON, mask_ratio=0.0), 1, "layers", PRE_NORM, "last_hidden_state"
    ),
    Family(hf.IJepaForImageClassification, lambda: hf.IJepaConfig(**COMMON), 0, "ijepa.layers", PRE_NORM),
    Family(hf.ASTForAudioClassification, ast, 2, "audio_spectrogram_transformer.layers", PRE_NORM, audio=True),
    Family(hf.Dinov2ForImageClassification, lambda: dino(hf.Dinov2Config), 1, "dinov2.encoder.layer", DINO),
    Family(
        hf.Dinov2ForImageClassification,
        lambda: dino(hf.Dinov2Config, use_swiglu_ffn=True),
        1,
        "dinov2.encoder.layer",
        DINO,
    ),
    Family(
        hf.Dinov2WithRegistersForImageClassification,
        lambda: dino(hf.Dinov2WithRegistersConfig, num_register_tokens=3),
        4,
        "dinov2_with_registers.encoder.layer",
        DINO,
    ),
    Family(hf.DINOv3ViTModel, dinov3, 3, "model.layer", DINO, "pooler_output", angles_of=dinov3_angles),
    Family(hf.CLIPForImageClassification, clip, 1, "vision_model.encoder.layers", CLIP),
    Family(hf.SiglipForImageClassification, siglip, 0, "vision_model.encoder.layers", CLIP),
    Family(hf.SiglipVisionModel, lambda: siglip().vision_config, 0, "encoder.layers", CLIP, "pooler_output"),
    Family(hf.BlipVisionModel, lambda: blip(hf.BlipVisionConfig), 1, "encoder.layers", BLIP, "pooler_output"),
    Family(hf.VideoMAEForVideoClassification, videomae, 0, "videomae.encoder.layer", VIDEOMAE, clips="pixel_values"),
]

# like one of the above in all that merging does: tested in full by the slow tests, in the others for what decides
SIMILAR: list[Family] = [
    *of_fused_projections(),
    *tower_families(),
    # video
    Family(
        hf.VJEPA2ForVideoClassification,
        vjepa2,
        0,
        "vjepa2.encoder.layer",
        VJEPA2,
        turn=vjepa2_turn,
        clips="pixel_values_videos",
    ),
    Family(hf.VivitForVideoClassification, vivit, 1, "vivit.layers", PRE_NORM, clips="pixel_values"),
    Family(hf.VitPoseForPoseEstimation, vitpose, 0, "backbone.encoder.layer", VITPOSE, "heatmaps", pickles=False),
    Family(hf.DPTModel, dpt, 1, "encoder.layer", NESTED, "pooler_output"),
]
