# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is read of the layers in the middle: hidden states that are asked for come back at the places of all tokens."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import UnsupportedInputError
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.state import TokenState, running_call
from tocom_hf.merging.tokens import follow_tokens, restore_tokens


# these hook layers for purposes of their own: transformers records the hidden states that are restored here, the others
# gather and move weights
_KNOWN_HOOKS = ("transformers.", "torch.", "deepspeed.", "accelerate.")


class RestoreHook:
    """Forward hook that copies merged tokens of recorded hidden states back to the positions that they came from.

    It acts where the settings of the call ask for `restore`: dense heads (depth, segmentation, language models) read
    layers in the middle too. Entry `i` of the hidden states is what layer `i - 1` put out.

    Args:
        num_layers: Number of transformer layers.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        tome = running_call()
        if tome is None or not tome.settings.restore or not tome.plans:
            return None
        if isinstance(output, tuple):
            return tuple(self._restored(part, tome) if self._is_recorded(part) else part for part in output)
        recorded = getattr(output, "hidden_states", None)
        if recorded is not None:
            output.hidden_states = self._restored(recorded, tome)
        return output

    def _is_recorded(self, part: Any) -> bool:
        """Whether a part of a model's output is the tuple of its hidden states; that of its attentions is shorter."""
        return isinstance(part, tuple) and len(part) == self.num_layers + 1

    def _restored(self, hidden_states: tuple, tome: TokenState) -> tuple:
        restored = []
        for index, recorded in enumerate(hidden_states):
            plans = [tome.plans[layer] for layer in sorted(tome.plans) if layer < index]
            positions = follow_tokens(plans)  # (batch, input tokens)
            # entries that were not asked for are None, and the last layer has restored its own
            missing = recorded is None or positions is None
            if missing or recorded.shape[1] == cast(torch.Tensor, positions).shape[1]:
                restored.append(recorded)
            else:
                restored.append(restore_tokens(recorded, cast(torch.Tensor, positions)))
        return tuple(restored)


def recording_modules(backbone: Backbone) -> list[nn.Module]:
    """The modules whose forward may return hidden states: the backbone, and its encoder where that is a model too."""
    if backbone.architecture.intermediates is not None:
        return []  # that module restores what it records
    encoder = backbone.module.get_submodule(backbone.architecture.layers.rpartition(".")[0])
    if encoder is not backbone.module and isinstance(encoder, PreTrainedModel):
        return [backbone.module, encoder]
    return [backbone.module]


def refuse_hooked_layers(layers: nn.ModuleList) -> None:
    """Refuse forward hooks that somebody else put on layers in the middle: they would see merged tokens.

    Raises:
        UnsupportedInputError: if there is such a hook.
    """
    for index, layer in enumerate(list(layers)[:-1]):
        for hook in layer._forward_hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS):
                raise UnsupportedInputError(
                    f"Layer {index} has a forward hook, which would see merged tokens instead of the token of every "
                    "patch. Remove the hook and pass output_hidden_states=True to the model, whose hidden states come "
                    "back at the places of all tokens; or call apply_tome(model, r, restore=False) to see merged ones."
                )
