# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The part of a model that token merging applies to, and how it is found."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import ArgumentError, UnsupportedModelError
from tocom_hf.merging.architectures import ARCHITECTURES, Architecture, projection_paths, unsupported
from tocom_hf.merging.timm_models import Dimensions


class Backbone(NamedTuple):
    """The part of a model that token merging applies to.

    `find_backbone` looks for it once, at the door of a public function; what lies behind the door is handed the result.

    Attributes:
        model: The model that was looked at.
        path: Name of the backbone in the model; empty where the model is the backbone itself.
        module: The backbone, what `AutoModel` would load.
        architecture: Its entry in the table.
    """

    model: PreTrainedModel
    path: str
    module: PreTrainedModel
    architecture: Architecture

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.architecture.layers))

    @property
    def dimensions(self) -> Dimensions:
        """Measures that configurations of transformers name."""
        if self.architecture.reader is not None:
            return self.architecture.reader.dimensions(self.module)
        return Dimensions(*(getattr(self.module.config, name, None) for name in Dimensions._fields))

    @property
    def is_patched(self) -> bool:
        """Whether the layers merge tokens."""
        return hasattr(self.layers[0], "tome_index")

    @property
    def protected(self) -> int:
        """Number of tokens at the front that never merge."""
        registers = self.architecture.registers
        return self.architecture.protected + (getattr(self.module.config, registers) if registers else 0)

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return self.protected > 0 and self.architecture.class_token

    def projections(self, target_modules: Iterable[str] | None = None) -> dict[str, nn.Module]:
        """The linear layers that plugins apply to, by their path in the backbone; takes what `projection_paths` takes.

        Raises:
            AttributeError: if the backbone has no module of such a name.
        """
        paths = projection_paths(self.module.config.model_type, len(self.layers), target_modules)
        return {path: self.module.get_submodule(path) for path in paths}

    def find_target_modules(self, names: Iterable[str]) -> dict[str, tuple[int, int]] | None:
        """The linear layers that names stand for.

        Args:
            names: As PEFT has them: the last part of a name in the transformer layer (`fc1`), all of it (`mlp.fc1`), or
                `all-linear`.

        Returns:
            The shapes of their weights, `(out, in)`, by name in the layer, in the order of the layer. `None` where they
            are query and value, which is what plugins apply to by default.

        Raises:
            ArgumentError: if a name stands for nothing.
        """
        wanted = list(names)
        if not wanted:
            raise ArgumentError("target_modules is empty. Name linear layers, or leave it out for query and value.")
        linear = {name: part for name, part in self.layers[0].named_modules() if isinstance(part, nn.Linear)}
        found: set[str] = set()
        for name in wanted:
            matches = {path for path in linear if name == "all-linear" or f".{path}".endswith(f".{name}")}
            if not name or not matches:
                raise ArgumentError(
                    f"target_modules has {name!r}, but the linear layers of a transformer layer of this model are "
                    f"{', '.join(linear)}. Name some of these, or all-linear."
                )
            found |= matches
        # a fused projection that is named is meant with the rows of the key
        if self.architecture.qkv is None and found == {*self.architecture.query_and_value}:
            return None
        return {path: (part.out_features, part.in_features) for path, part in linear.items() if path in found}


def find_backbone(model: nn.Module, name: str | None = None) -> Backbone:
    """Find the supported backbone in `model`: the innermost module of a listed model type that holds the layers.

    Args:
        model: A transformers model.
        name: Which backbone, for models with several: its path in the model, or a part of the path that only one of
            them has (`vision_tower`). Where none is named, the one that merges already is meant.

    Raises:
        UnsupportedModelError: if there is none, or if it is used in a way that merging breaks.
        ArgumentError: if there are several and none is named, or if not one goes by that name.
    """
    if hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a model of PEFT whose adapters are not merged. Merge them into the weights "
            "first, then merge tokens or compose: model = model.merge_and_unload()."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"The {type(model).__name__} has adapters of its own (add_adapter, load_adapter), which are not merged. "
            "Load them with PEFT and merge them first: PeftModel.from_pretrained(base, adapter).merge_and_unload()."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers model (PreTrainedModel), got {type(model).__name__}. "
            "Load it with an Auto class of transformers, or pass the transformers model inside your wrapper."
        )
    found = backbones_in(model)
    if not found:
        _refuse_read_modules(model)
        raise unsupported(model.config)
    backbone = found[0] if name is None and len(found) == 1 else _chosen(found, name)
    _refuse_unsound_use(backbone)
    return backbone


def backbones_in(model: PreTrainedModel) -> list[Backbone]:
    """All supported backbones of a model, in the order of its modules."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            architecture = ARCHITECTURES.get(module.config.model_type)
            if architecture is None:
                continue
            if architecture.reader is not None:
                with contextlib.suppress(UnsupportedModelError):
                    found.append(Backbone(model, path, module, architecture.reader.resolve(module, architecture)))
            elif _has(module, architecture.layers):
                found.append(Backbone(model, path, module, architecture))
    return found


def _refuse_read_modules(model: PreTrainedModel) -> None:
    """Raise the reason why a part of a model is not supported, where the part itself tells it and not its type."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            architecture = ARCHITECTURES.get(module.config.model_type)
            if architecture is not None and architecture.reader is not None:
                architecture.reader.resolve(module, architecture)


def _chosen(found: list[Backbone], name: str | None) -> Backbone:
    """The one of several backbones that a caller means."""
    paths = ", ".join(repr(backbone.path) for backbone in found)
    if name is None:
        merging = [backbone for backbone in found if backbone.is_patched]
        if len(merging) == 1:
            return merging[0]
        raise ArgumentError(
            f"{type(found[0].model).__name__} has {len(found)} backbones that could merge tokens: {paths}. Name one, "
            f"backbone={found[0].path!r}, or pass that part of the model alone, model.get_submodule({found[0].path!r})."
        )
    exact = [backbone for backbone in found if backbone.path == name]
    named = exact or [backbone for backbone in found if f".{name}." in f".{backbone.path}."]
    if len(named) != 1:
        number = "more than one of them" if named else "none of them"
        raise ArgumentError(
            f"backbone={name!r} stands for {number}: the backbones of {type(found[0].model).__name__} that could merge "
            f"tokens are {paths}."
        )
    return named[0]


def _refuse_unsound_use(backbone: Backbone) -> None:
    if getattr(backbone.module.config, "num_experts", 1) > 1:
        raise UnsupportedModelError(
            f"Token merging does not support {type(backbone.module).__name__} with several experts (num_experts="
            f"{backbone.module.config.num_experts}): its MLPs are told which expert to use. A single expert is "
            "supported."
        )
    masked = backbone.architecture.shuffles_patches and backbone.module.config.mask_ratio > 0
    if masked or (backbone.architecture.shuffles_patches and hasattr(backbone.model, "decoder")):
        raise UnsupportedModelError(
            "Token merging supports the encoder of ViT-MAE without random masking. "
            "Load ViTMAEModel with config.mask_ratio = 0; the pre-training decoder needs every token."
        )
    # Both parts of a model for pre-training are of one type; the decoder of another model is a model of text.
    one_type = backbone.model.config.model_type == backbone.module.config.model_type
    if backbone.architecture.token_mask is not None and one_type and hasattr(backbone.model, "decoder"):
        raise UnsupportedModelError(
            f"Token merging does not support {type(backbone.model).__name__}: its decoder needs every token that "
            f"{backbone.architecture.token_mask} leaves over. Load the model with its classifier, or its encoder alone "
            "(AutoModel)."
        )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
