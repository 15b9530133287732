# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Token merging inside transformers models: `apply_tome` patches one in place, `remove_tome` undoes it.

Nothing that a forward call computes is kept on the model. A pre-hook on the backbone hands every
call its own `TokenState` as the keyword argument `tome`; the layers, whose classes are replaced by subclasses, read it.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import ArgumentError, DegreeError, UnsupportedInputError, UnsupportedModelError
from tocom_hf.merging.architectures import Backbone, find_backbone
from tocom_hf.merging.inputs import ascending_noise
from tocom_hf.merging.layers import (
    LayerPart,
    MergeSettings,
    Merging,
    MergingAttention,
    MergingLayer,
    TokenState,
    merging_class,
)
from tocom_hf.merging.schedule import Schedule, resolve_schedule
from tocom_hf.merging.tokens import output_positions


def apply_tome(
    model: PreTrainedModel,
    r: Schedule,
    *,
    proportional_attention: bool | None = None,
    restore: bool | None = None,
    class_tokens_only: bool | None = None,
) -> PreTrainedModel:
    """Make a transformers model merge tokens in every layer (ToMe, arXiv 2210.09461). Weights are not touched.

    A model that merges already just changes its degree, which costs nothing and is safe while other threads run the
    model: a forward call keeps the degree that it started with.

    Args:
        model: A model of a supported architecture, with or without a head. It is patched in place.
        r: How many tokens each layer merges: an int, a list with one int per layer, or `(r, inflection)` with
            inflection in [-1, 1]. A layer merges at most half of its unprotected tokens.
        proportional_attention: Add the log of each key's token size to the attention logits (ToMe, eq. 1). On by
            default; a model that merges already keeps what it has.
        restore: Copy merged tokens back to the positions that they came from after the last layer, so that
            `last_hidden_state` keeps its shape and means over tokens weigh by size; inner `hidden_states` stay merged.
            By default on for families whose heads read patch tokens (DINOv2, CLIP, SigLIP, I-JEPA, masked image
            modelling), off where they read the class token only; a model that merges already keeps what it has.
        class_tokens_only: Let only the class (and distillation) tokens leave the last layer, which then computes
            nothing for the others but their keys and values: the same logits, at most a twelfth cheaper for twelve
            layers. `last_hidden_state` holds these tokens only. Off by default; a model that merges already keeps what
            it has.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the architecture is not supported.
        DegreeError: if `r` is not a degree, or another one than that of a `TocomModel`, whose weights belong to it.
        ArgumentError: if `class_tokens_only` contradicts `restore`, or the family has no class token.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import apply_tome
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> apply_tome(model, r=3)(torch.rand(1, 3, 64, 64)).last_hidden_state.shape  # 17 tokens without merging
    torch.Size([1, 11, 32])

    ```
    """
    backbone = find_backbone(model)
    hook = _find_hook(backbone.module)
    if hook is not None and hook.bound and resolve_schedule(r, len(backbone.layers)) != hook.settings.schedule:
        raise DegreeError(
            "The model is a TocomModel, which changes its weights with its degree: call model.set_target_r(...) "
            "instead of apply_tome. For merging without compensation load the checkpoint with its transformers class."
        )
    return set_merging(
        model,
        r,
        proportional_attention=proportional_attention,
        restore=restore,
        class_tokens_only=class_tokens_only,
        bound=hook is not None and hook.bound,
    )


def set_merging(
    model: PreTrainedModel,
    r: Schedule,
    *,
    proportional_attention: bool | None = None,
    restore: bool | None = None,
    class_tokens_only: bool | None = None,
    bound: bool = False,
) -> PreTrainedModel:
    """What `apply_tome` does, for those who answer for the weights.

    Args:
        model, r, proportional_attention, restore, class_tokens_only: As in `apply_tome`.
        bound: Whether the weights belong to this degree, so that `apply_tome` shall not change it.
    """
    backbone = find_backbone(model)
    schedule = resolve_schedule(r, len(backbone.layers))
    hook = _find_hook(backbone.module)
    if proportional_attention is None:
        proportional_attention = hook is None or hook.settings.proportional_attention
    if class_tokens_only is None:
        class_tokens_only = hook is not None and hook.settings.class_tokens_only
    if restore is None and hook is not None:
        restore = hook.settings.restore
    elif restore is None:
        # the decoders of SimMIM-style models read the patch tokens
        restore = backbone.architecture.restore or hasattr(model, "decoder")
    if class_tokens_only and (restore or backbone.protected == 0):
        raise ArgumentError(
            f"class_tokens_only does not fit {type(model).__name__}, whose head reads patch tokens, nor restore=True."
        )
    settings = MergeSettings(schedule, backbone.protected, proportional_attention, restore, class_tokens_only)
    if hook is not None:
        hook.settings, hook.bound = settings, bound
        return model
    _refuse_wrapped_forwards(backbone)
    attentions = [getattr(layer, backbone.architecture.attention) for layer in backbone.layers]
    # name every class before the first is replaced, so that a failure leaves the model as it was
    layer_classes = [merging_class(type(layer), MergingLayer) for layer in backbone.layers]
    attention_classes = [merging_class(type(attention), MergingAttention) for attention in attentions]
    for index, (layer, attention) in enumerate(zip(backbone.layers, attentions, strict=True)):
        layer.__class__, attention.__class__ = layer_classes[index], attention_classes[index]
        layer.tome_part = LayerPart(index, backbone.architecture)  # type: ignore[assignment]
        attention.tome_part = backbone.architecture
    names = list(inspect.signature(type(backbone.module).forward).parameters)[1:]
    mask_index = names.index("attention_mask") if "attention_mask" in names else None
    backbone.module.register_forward_pre_hook(MergeHook(settings, mask_index, bound), with_kwargs=True)
    return model


def remove_tome(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `apply_tome`: classes, hooks and attributes are again those of the untouched model.

    Args:
        model: The patched model. A model that is not patched is left alone.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model is a `TocomModel`, whose weights belong to its degree.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import apply_tome, remove_tome
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> remove_tome(apply_tome(model, r=3))(torch.rand(1, 3, 64, 64)).last_hidden_state.shape
    torch.Size([1, 17, 32])

    ```
    """
    hook = _find_hook(find_backbone(model).module)
    if hook is not None and hook.bound:
        raise UnsupportedModelError(
            "The model is a TocomModel, whose weights are those of its degree. model.set_target_r(model.source_r) puts "
            "back the weights of the checkpoint; for a model that does not merge at all load the checkpoint with its "
            "transformers class."
        )
    return unset_merging(model)


def unset_merging(model: PreTrainedModel) -> PreTrainedModel:
    """What `remove_tome` does, for those who answer for the weights."""
    backbone = find_backbone(model)
    hooks = backbone.module._forward_pre_hooks
    if _find_hook(backbone.module) is not None:
        _refuse_wrapped_forwards(backbone)
    for key in [key for key, hook in hooks.items() if isinstance(hook, MergeHook)]:
        del hooks[key]
        del backbone.module._forward_pre_hooks_with_kwargs[key]
    for module in backbone.layers.modules():
        if isinstance(module, Merging):
            module.__class__ = module.stock_class  # type: ignore[assignment]
            del module.tome_part
    return model


def get_schedule(model: PreTrainedModel) -> tuple[int, ...] | None:
    """The degrees per layer that a model merges at, or `None` where it is not patched."""
    settings = get_settings(model)
    return None if settings is None else settings.schedule


def get_settings(model: PreTrainedModel) -> MergeSettings | None:
    """How a model merges, or `None` where it is not patched."""
    hook = _find_hook(find_backbone(model).module)
    return None if hook is None else hook.settings


@contextlib.contextmanager
def merging_at(model: PreTrainedModel, r: Schedule) -> Iterator[PreTrainedModel]:
    """Merge at another degree within a `with` block, with the weights as they are; afterwards the model is as before.

    Args:
        model: A model of a supported architecture, patched or not.
        r: As in `apply_tome`.
    """
    hook = _find_hook(find_backbone(model).module)
    before = None if hook is None else hook.settings
    set_merging(model, r, bound=hook is not None and hook.bound)
    try:
        yield model
    finally:
        if hook is None:
            unset_merging(model)
        else:
            hook.settings = cast(MergeSettings, before)


@dataclass
class TokenTrace:
    """Where the tokens of the last forward call went.

    Attributes:
        protected: Tokens at the front that never merge; the others are patches in the order of the grid.
        positions: For every layer, the position after it of each token that entered the first layer: int64
            `(batch, input tokens)`. Tokens with the same position were merged.
    """

    protected: int = 0
    positions: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def trace_tokens(model: PreTrainedModel) -> Iterator[TokenTrace]:
    """Record which input tokens went into which output token, for each forward call within the `with` block.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import apply_tome, trace_tokens
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> with trace_tokens(apply_tome(model, r=3)) as trace:
    ...     output = model(torch.rand(1, 3, 64, 64))
    >>> trace.positions[-1].shape  # where each of the 17 input tokens is after the last layer
    torch.Size([1, 17])
    >>> trace.positions[-1].unique().numel()
    11

    ```

    Args:
        model: A model that `apply_tome` patched.

    Yields:
        The trace of the last call; empty before the first.

    Raises:
        UnsupportedModelError: if the model is not patched.
    """
    backbone = find_backbone(model)
    hook = _find_hook(backbone.module)
    if hook is None:
        raise UnsupportedModelError("The model does not merge tokens, so there is nothing to trace. Call apply_tome.")
    trace = TokenTrace(hook.settings.protected)
    entering: list[torch.Tensor] = []

    def before(layer: nn.Module, args: tuple) -> None:
        entering[:] = [args[0]]

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        batch, tokens, _ = entering[0].shape
        positions = torch.arange(tokens, device=entering[0].device).expand(batch, -1)
        trace.positions = []
        for index in range(len(backbone.layers)):
            plan = kwargs["tome"].plans.get(index)
            positions = positions if plan is None else output_positions(plan).gather(1, positions)
            trace.positions.append(positions)

    handles = (
        backbone.layers[0].register_forward_pre_hook(before),
        backbone.module.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


class MergeHook:
    """Forward pre-hook that gives every call of a backbone its own `TokenState`.

    Args:
        settings: How to merge.
        mask_index: Position of `attention_mask` among the arguments of the backbone's forward, or `None`.
        bound: Whether the weights belong to the degree, as those of a `TocomModel` do.
    """

    def __init__(self, settings: MergeSettings, mask_index: int | None, bound: bool):
        self.settings, self.mask_index, self.bound = settings, mask_index, bound

    def __call__(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positional = self.mask_index is not None and len(args) > self.mask_index and args[self.mask_index] is not None
        if positional or kwargs.get("attention_mask") is not None:
            raise UnsupportedInputError(
                "Token merging does not take an attention mask: merged tokens have no single position to mask. "
                "Call the model without attention_mask, or undo apply_tome first with remove_tome(model)."
            )
        if module.config.model_type == "vit_mae" and len(args) < 2 and kwargs.get("noise") is None:
            # which tokens may merge depends on their order, and the model shuffles them anew in every call
            pixel_values = args[0] if args else kwargs["pixel_values"]
            kwargs = {**kwargs, "noise": ascending_noise(pixel_values, module.config.patch_size)}
        return args, {**kwargs, "tome": TokenState(self.settings)}


def _refuse_wrapped_forwards(backbone: Backbone) -> None:
    for name, module in backbone.layers.named_modules():
        if "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"The forward of layer module {name!r} is wrapped, as Accelerate does when it spreads or offloads a "
                "model (device_map). Load the model on one device, call apply_tome or TocomModel.from_pretrained, and "
                "dispatch it afterwards; to undo, remove the hooks first (remove_hook_from_submodules)."
            )


def _find_hook(backbone: nn.Module) -> MergeHook | None:
    return next((hook for hook in backbone._forward_pre_hooks.values() if isinstance(hook, MergeHook)), None)
