# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""As which class of transformers a checkpoint is fine-tuned, and how its weights get there.

Most have a class for image classification that loads them. The vision towers, masked autoencoders and DeiT with two
heads have none, or one that cannot be trained. These are loaded as what they are, and their weights are copied into a
class that trains: from_pretrained of that class leaves weights of a tower at random values, with a report only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.loading import load_model, refused_input
from tocom_hf.errors import ArgumentError, DegreeError, UnsupportedModelError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TEACHER = "DeiTForImageClassificationWithTeacher"


@dataclass(frozen=True)
class Classifier:
    """How a checkpoint becomes a classifier.

    Attributes:
        model_class: A class of transformers with a head that can be trained, or an Auto class that finds it.
        part: Name of its part that gets the weights of the checkpoint; `None` where it loads the checkpoint itself.
    """

    model_class: Any
    part: str | None = None


def find_classifier(config: "PreTrainedConfig", name: str) -> Classifier:
    """The class that a checkpoint is fine-tuned as.

    Args:
        config: Of the checkpoint.
        name: What to call it in a message.

    Raises:
        UnsupportedModelError: if token merging does not support it, or there is no class for its images.
    """
    import transformers

    from tocom_hf.merging.architectures import ARCHITECTURES, supported_types, unsupported

    towers = {
        "vit_mae": Classifier(transformers.ViTForImageClassification, "vit"),
        "clip_vision_model": Classifier(transformers.CLIPForImageClassification, "vision_model"),
        "siglip_vision_model": Classifier(transformers.SiglipForImageClassification, "vision_model"),
    }
    found = supported_types(config)
    if not found:
        raise unsupported(config)
    kinds = {ARCHITECTURES[model_type].inputs for model_type in found}
    if "images" not in kinds:
        raise UnsupportedModelError(
            f"{name} takes {' and '.join(kinds)} ({config.model_type}), and this command fine-tunes on images. "
            "Train it with transformers' Trainer after apply_tome(model, r), and pass source_r=r to "
            "TocomModel.from_pretrained."
        )
    if config.model_type in towers:
        return towers[config.model_type]
    if TEACHER in (config.architectures or ()):
        return Classifier(transformers.DeiTForImageClassification, "deit")
    if type(config) not in transformers.AutoModelForImageClassification._model_mapping:
        raise UnsupportedModelError(
            f"{name} is of the type {config.model_type!r}, for which transformers has no class for image "
            f"classification. Fine-tune its vision part ({', '.join(sorted(found))}) by itself: save that with "
            "save_pretrained in a folder of its own, with the image processor."
        )
    return Classifier(transformers.AutoModelForImageClassification)


def require_mergeable(config: "PreTrainedConfig", source_r: int) -> None:
    """Refuse a degree that the first layer cannot merge, which would be recorded and mean less.

    Raises:
        DegreeError: if it is negative, or more than half of the patches.
    """
    from tocom_hf.merging.inputs import as_pair
    from tocom_hf.merging.schedule import require_degree

    require_degree(source_r, "source_r")
    vision: Any = getattr(config, "vision_config", config)
    if not hasattr(vision, "image_size"):
        vision = _measures_of_model(vision)
    height, width = as_pair(vision.image_size)
    patch_height, patch_width = as_pair(vision.patch_size)
    patches = (height // patch_height) * (width // patch_width)
    most = patches // 2
    if source_r > most:
        raise DegreeError(
            f"source_r={source_r} is more than any layer can merge: an image of {height} x {width} pixels has "
            f"{patches} patches, of which a layer merges at most {most}. Pass a --source_r up to that."
        )


def _measures_of_model(config: "PreTrainedConfig") -> Any:
    """The sizes of images and patches where the configuration does not tell them: those of timm's models."""
    import torch
    from transformers import AutoModel

    from tocom_hf.merging.backbones import find_backbone

    with torch.device("meta"):
        return find_backbone(AutoModel.from_config(config)).dimensions


def classifier_config(config: "PreTrainedConfig", classifier: Classifier) -> "PreTrainedConfig":
    """The configuration of the class that a checkpoint is fine-tuned as."""
    from transformers import ViTConfig

    config_class = classifier.model_class.config_class if classifier.part else None
    if config_class is None or isinstance(config, config_class):
        return config
    # A part is built in the precision that its configuration records, which need not be that of the head.
    own = {name: value for name, value in config.to_dict().items() if name != "dtype"}
    if config_class is ViTConfig:
        known = ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        made = ViTConfig(**{name: value for name, value in own.items() if name in known})
    else:
        # Without special tokens: those of the default are not in its vocabulary, which transformers warns of.
        text = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        made = config_class(vision_config=own, text_config=text)
    made.name_or_path = config.name_or_path
    return made


def load_classifier(classifier: Classifier, name: str, config: "PreTrainedConfig") -> "PreTrainedModel":
    """A classifier in full precision with the weights of a checkpoint.

    Args:
        classifier: What `find_classifier` found.
        name: Hub id or folder of the checkpoint.
        config: Of the classifier. A head for as many classes keeps its weights, another is new.

    Raises:
        ArgumentError: if it cannot be loaded, or lacks weights of the backbone.
    """
    import torch
    import transformers

    if classifier.part is None:
        model, report = load_model(
            classifier.model_class,
            name,
            config=config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        _require_backbone(report, name)
        return model
    with refused_input(f"No classifier can be built from the config.json of {name!r}"):
        model = classifier.model_class(config).float()
    two_heads = classifier.part == "deit"
    own_class = getattr(transformers, TEACHER) if two_heads else transformers.AutoModel
    source, report = load_model(own_class, name, dtype=torch.float32, output_loading_info=True)
    _require_backbone(report, name)
    backbone = getattr(source, classifier.part) if two_heads else source
    model.get_submodule(classifier.part).load_state_dict(backbone.state_dict())
    if two_heads and source.num_labels == model.num_labels:
        # The class reads the class token alone, and this is the head that was trained on it.
        model.classifier.load_state_dict(source.cls_classifier.state_dict())
    return model


def _require_backbone(report: dict[str, Any], name: str) -> None:
    """Refuse weights that transformers would make up, apart from those of the head."""
    mismatched: Iterable[Any] = report.get("mismatched_keys", ())
    made_up = {*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in mismatched)}
    needed = sorted(key for key in made_up if "layer." in key or "layers." in key or "embedding" in key)
    needed = [key for key in needed if "mask_token" not in key]
    if needed:
        raise ArgumentError(
            f"The weights of {name!r} do not fit its config.json: {len(needed)} of the backbone are missing or of "
            f"another size, such as {needed[0]}, and would start at random. Save the model anew with save_pretrained."
        )
