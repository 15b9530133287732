# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The supported model families, one table row each: which submodules play which part in token merging."""

from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Architecture:
    """Where token merging finds the parts of one family's transformer layer.

    Attributes:
        layers: Path from the backbone to the `ModuleList` of its layers.
        attention: Name of the attention block in a layer.
        norm_before, norm_after: Names of the layer norms in front of attention and in front of the MLP.
        scale_attention, scale_mlp: Names of the layer scales behind the two, or `None`.
        drop: Name of the dropout or drop-path module behind both, or `None`.
        mlp: Name of the MLP.
        query, key, value, output: Names of the projections in the attention block.
        dropout, scaling: Names of its attention dropout probability and of its logit scale.
        protected: Number of class and distillation tokens at the front, which never merge.
    """

    layers: str = "layers"
    attention: str = "attention"
    norm_before: str = "layernorm_before"
    norm_after: str = "layernorm_after"
    scale_attention: str | None = None
    scale_mlp: str | None = None
    drop: str | None = "dropout"
    mlp: str = "mlp"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    dropout: str = "attention_dropout"
    scaling: str = "scaling"
    protected: int = 1


# keyed by `config.model_type` of the backbone
ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture(),
    "deit": Architecture(protected=2),  # class and distillation token
}


class Backbone(NamedTuple):
    """The part of a model that token merging applies to.

    Attributes:
        path: Its name in the model; empty where the model is the backbone itself.
        module: The backbone, what `AutoModel` would load.
        architecture: Its table row.
    """

    path: str
    module: PreTrainedModel
    architecture: Architecture

    @property
    def stack(self) -> nn.Module:
        """The module whose forward runs the layers one after the other."""
        return self.module.get_submodule(self.architecture.layers.rpartition(".")[0])

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.architecture.layers))

    def projections(self) -> dict[str, nn.Module]:
        """The query and value projections of every layer, by their path in the backbone."""
        paths = projection_paths(self.module.config.model_type, len(self.layers))
        return {path: self.module.get_submodule(path) for path in paths}


def projection_paths(model_type: str, num_layers: int) -> list[str]:
    """Paths, in a backbone of this type, of the linear layers that plugins apply to: query and value of every layer.

    Raises:
        UnsupportedModelError: if the model type is not in the table.
    """
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise unsupported(model_type)
    attentions = [f"{row.layers}.{i}.{row.attention}" for i in range(num_layers)]
    return [f"{attention}.{projection}" for attention in attentions for projection in (row.query, row.value)]


def find_backbone(model: nn.Module) -> Backbone:
    """Find the supported backbone in `model`: the innermost module of a listed model type that holds the layers.

    Raises:
        UnsupportedModelError: if there is none.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers model (PreTrainedModel), got {type(model).__name__}. "
            "Load it with an Auto class of transformers, or pass the transformers model inside your wrapper."
        )
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            row = ARCHITECTURES.get(module.config.model_type)
            if row is not None and _has(module, row.layers):
                return Backbone(path, module, row)
    raise unsupported(model.config.model_type)


def unsupported(model_type: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Token merging does not support the architecture {model_type!r}. "
        f"Supported model types: {', '.join(sorted(ARCHITECTURES))}."
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
