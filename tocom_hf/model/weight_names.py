# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The names that weights have in files: transformers 5 keeps writing those of transformers 4, by tables of its own."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def with_current_names(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names that they have in the model, converted by the tables of transformers.

    This is what `from_pretrained` does with a file, and what `load_state_dict` does not do.

    Args:
        model: The model that the weights are for.
        weights: Weights under names of a file or of the model.

    Returns:
        The weights. Those that the model knows by their name are left alone, and so are those that no table makes known
        to it.
    """
    known = state_names(model)
    found = {name: weight for name, weight in weights.items() if name in known}
    foreign = sorted(weights.keys() - found.keys(), key=dot_natural_key)
    if not foreign:
        return found
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, Any] = {}
    for name in foreign:
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            # a converter collects what becomes one target, so every target has its own
            converter = collected.setdefault(target, deepcopy(by_pattern[pattern]))
            converter.add_tensor(target, name, pattern, weights[name])
        elif target in known and target not in weights:
            found[target] = weights[name]
        else:
            found[name] = weights[name]
    for target, converter in collected.items():
        converted = converter.convert(target, model=model, config=model.config)
        found |= {name: weight[0] if isinstance(weight, list) else weight for name, weight in converted.items()}
    return found


def state_names(model: nn.Module) -> set[str]:
    """The keys of `model.state_dict()`, without the collective calls that it makes where a model is sharded."""
    names = set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        names |= {prefix + name for name, value in module._parameters.items() if value is not None}
        names |= {prefix + name for name in buffers if module._buffers[name] is not None}
    return names
