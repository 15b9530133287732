# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Merging a LoRA adapter into a model whose layers may have other names than when the adapter was trained.

transformers 5 renamed the layers of most vision transformers, and an adapter names layers in three ways: in the keys of
its weights, in its target modules, and in patterns for ranks and scales. So nothing of the adapter is renamed. A copy
of the model gets the names that the adapter knows, PEFT merges there, and the merged weights return by the tables of
transformers.
"""

import copy
import re
import warnings
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from tocom_hf.errors import ComposedWeightsError, PluginFileError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.model.lora_files import LoraFiles
from tocom_hf.model.weight_names import state_names, with_current_names


logger = logging.get_logger(f"transformers.{__name__}")


class Placement(NamedTuple):
    """How the names of an adapter relate to those of a model.

    Attributes:
        formerly: Whether it has the names of transformers 4.
        strip: The name of the backbone in the model that it was trained on, where the model is a backbone alone.
        mount: The path of the backbone in the model, where it was trained on a backbone alone.
    """

    formerly: bool
    strip: str
    mount: str

    def locate(self, path: str) -> str:
        """The path in the model of a path of the adapter."""
        path = path.removeprefix(f"{self.strip}.") if self.strip else path
        return f"{self.mount}.{path}" if self.mount else path


def merge_lora(model: PreTrainedModel, adapter: LoraFiles) -> None:
    """Merge an adapter into the weights of a model, or leave it as it was.

    Args:
        model: A model that holds ordinary weights, changed in place.
        adapter: The adapter, trained on it or on its backbone, under transformers 4 or 5.

    Raises:
        PluginFileError: if a weight of the adapter has no place in the model, or the other way round.
        UnsupportedModelError: if the model's architecture is not supported, or its weights are quantised or offloaded.
        ComposedWeightsError: if plugins are folded into its weights.
    """
    backbone = find_backbone(model)
    _require_ordinary_weights(model)
    _warn_of_another_base(model, adapter)
    twin = copy.deepcopy(model)
    former = _with_former_names(twin)
    placement = _place(adapter, backbone, former)
    tree = former if placement.formerly else twin
    part = tree.get_submodule(placement.mount)
    if placement.strip:
        part = _child(placement.strip, part)
    _merge_by_peft(part, adapter, type(model).__name__)
    _copy_back(model, with_current_names(model, tree.state_dict()))


def _require_ordinary_weights(model: PreTrainedModel) -> None:
    state = getattr(model, "_tocom", None)
    if state is not None and state.source_weights:
        raise ComposedWeightsError(
            f"Plugins are folded into the weights of this model, for target_r={state.target_r}. Call "
            f"model.set_target_r({state.source_r}) before an adapter is merged."
        )
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name} is quantised or offloaded, so no adapter can be merged into it. Load the model without "
                "quantisation and offloading."
            )


def _warn_of_another_base(model: PreTrainedModel, adapter: LoraFiles) -> None:
    """Nothing in the files tells one backbone from another of its shape but the names."""
    recorded, name = adapter.base_model, model.name_or_path
    if recorded and name and recorded != name:
        logger.warning(
            f"The adapter {adapter.name} was trained on {recorded} and is merged into {name}. Its weights mean nothing "
            "unless both hold the same model."
        )


def _with_former_names(twin: PreTrainedModel) -> nn.Module:
    """The layers of a model by the names that they had in transformers 4, as far as transformers knows them."""
    transforms = get_model_conversion_mapping(twin, add_legacy=False)
    # those of the start of a name concern whole checkpoints, not modules
    layout = [item for item in transforms if not any(pattern.startswith("^") for pattern in item.source_patterns)]
    twin.__dict__["_weight_conversions"] = layout
    current = twin.state_dict()
    names = {id(weight): name for name, weight in current.items()}
    former: dict[str, torch.Tensor] = revert_weight_conversion(twin, current)
    root = nn.Module()
    # a layer with parts of its own comes before its parts, which it brings along
    for path in sorted({name.rpartition(".")[0] for name in former}, key=lambda path: path.count(".")):
        entries = {name.removeprefix(f"{path}."): weight for name, weight in former.items() if _is_of(path, name)}
        key, weight = next(iter(entries.items()))
        name = names.get(id(weight))
        if name is not None and name.rpartition(".")[2] != key:
            continue  # a weight of its own beside the layer that has it now: VideoMAE's q_bias, of query
        if not path:
            for key, weight in entries.items():
                root.register_parameter(key, nn.Parameter(weight, requires_grad=False))
        elif name is None:  # transformers 5 has made several layers of it
            _hang(root, path, _linear(**entries))
        elif not _has(root, path):
            _hang(root, path, twin.get_submodule(name.rpartition(".")[0]))
    return root


def _is_of(path: str, name: str) -> bool:
    return name.rpartition(".")[0] == path


def _place(adapter: LoraFiles, backbone: Backbone, former: nn.Module) -> Placement:
    paths = adapter.paths()
    first = paths[0].partition(".")[0]
    shared = first if all(path.startswith(f"{first}.") for path in paths) else ""
    found: list[tuple[int, Placement]] = []
    for formerly, tree in ((False, backbone.model), (True, former)):
        names = {name for name, _ in tree.named_modules()}
        for strip in dict.fromkeys(("", shared)):
            for mount in dict.fromkeys(("", backbone.path)):
                placement = Placement(formerly, strip, mount)
                found.append((sum(placement.locate(path) in names for path in paths), placement))
    fitting, placement = max(found, key=lambda entry: entry[0])  # the first of those that fit alike
    if fitting < len(paths):
        names = {name for name, _ in (former if placement.formerly else backbone.model).named_modules()}
        lost = [path for path in paths if placement.locate(path) not in names]
        raise PluginFileError(
            f"The adapter {adapter.name} changes {len(paths)} layers, of which {type(backbone.model).__name__} lacks "
            f"{len(lost)}: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}. Its layers are named like "
            f"{next(iter(backbone.projections()))}. Pass the model that the adapter was trained on"
            + (f" ({adapter.base_class})." if adapter.base_class else ".")
        )
    return placement


def _merge_by_peft(part: nn.Module, adapter: LoraFiles, class_name: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = adapter.config()
    layers = sorted({path.rpartition(".")[2] for path in adapter.paths()})
    try:
        wrapped = PeftModel(part, config)
    except Exception as error:  # whatever PEFT makes of targets that are not there, or cannot be adapted
        raise PluginFileError(
            f"The configuration of the adapter {adapter.name} does not fit its weights, which are for the layers "
            f"{', '.join(layers)}; its target_modules must be those that it was trained with: {error!r:.300}"
        ) from error

    def state() -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            # PEFT 0.21 takes the biases of lora_bias for shards that were not gathered
            warnings.filterwarnings("ignore", message=".*LoRA tensor.* invalid shape")
            return get_peft_model_state_dict(wrapped, save_embedding_layers=False)

    _require_same(adapter, state(), class_name)
    set_peft_model_state_dict(wrapped, dict(adapter.weights))
    arrived = state()
    given = {name: weight.to(arrived[name]) for name, weight in adapter.weights.items()}
    lost = [name for name, weight in given.items() if not torch.equal(arrived[name], weight)]
    if lost:
        raise PluginFileError(f"PEFT did not load {', '.join(lost[:3])} of the adapter {adapter.name}.")
    try:
        wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise PluginFileError(f"The adapter {adapter.name} cannot be merged: {error}") from error


def _require_same(adapter: LoraFiles, expected: dict[str, torch.Tensor], class_name: str) -> None:
    """Raise `PluginFileError` unless every weight of an adapter has its place, and none is missing beside them."""
    given = adapter.weights
    problems = [f"{name} has no place in {class_name}" for name in given if name not in expected]
    problems += [
        f"{name} is missing{' (PEFT before 0.21 did not save it)' if _is_adapted_bias(adapter, name) else ''}"
        for name in expected
        if name not in given and _is_due(adapter, name)
    ]
    problems += [
        f"{name} has the shape {tuple(weight.shape)}, the model's place for it {tuple(expected[name].shape)}"
        for name, weight in given.items()
        if name in expected and expected[name].shape != weight.shape
    ]
    if problems:
        raise PluginFileError(
            f"The adapter {adapter.name} does not fit, so nothing was merged: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Pass a model of the class, and with "
            "the number of labels, that the adapter was trained on."
        )


def _is_due(adapter: LoraFiles, name: str) -> bool:
    """Whether an adapter without a weight, for which the model has a place, is damaged.

    A target such as `dense` may also stand for a layer that the model of the adapter did not have, a pooler for
    instance. That stays as it is.
    """
    if _is_adapted_bias(adapter, name):
        return True
    path, _, last = name.rpartition(".")
    trained_bias = last == "bias" and adapter.content.get("bias") != "none" and f"{path}.weight" not in adapter.weights
    if ".lora_" not in name and not trained_bias:
        return True
    layer = name.partition(".lora_")[0]
    if any(layer.endswith(f".{target}") for target in adapter.unused_targets()):
        return True
    return _kind(name) in {_kind(other) for other in adapter.weights}


def _is_adapted_bias(adapter: LoraFiles, name: str) -> bool:
    """Whether it is the bias of a layer that the adapter changes, where it trained biases too."""
    layer, _, last = name.rpartition(".base_layer.")
    trained = last == "bias" and adapter.content.get("bias") in ("all", "lora_only")
    return trained and any(other.startswith(f"{layer}.lora_") for other in adapter.weights)


def _kind(name: str) -> str:
    """A weight in any of the transformer layers, and whichever of its factors."""
    layer = re.sub(r"\.\d+\.", ".*.", name)
    return layer.partition(".lora_")[0]


@torch.no_grad()
def _copy_back(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    lost = state_names(model) ^ weights.keys()
    if lost:
        raise PluginFileError(f"The merged weights have other names than the model's: {', '.join(sorted(lost)[:3])}.")
    for name, weight in model.state_dict().items():
        weight.copy_(weights[name])


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _hang(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in a tree of modules, with what is missing on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, layer)


def _child(name: str, part: nn.Module) -> nn.Module:
    parent = nn.Module()
    parent.add_module(name, part)
    return parent
