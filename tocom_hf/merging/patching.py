# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Token merging inside transformers models: `apply_tome` patches one in place, `remove_tome` undoes it.

Nothing that a forward call computes is kept on the model. Hooks of the backbone begin and end every call, which has its
own `TokenState`; the layers, whose classes are replaced by subclasses, read it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import ArgumentError, DegreeError, UnsupportedInputError, UnsupportedModelError
from tocom_hf.merging.architectures import find_part
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.inner_layers import RestoreHook, recording_modules, refuse_hooked_layers
from tocom_hf.merging.inputs import ascending_noise
from tocom_hf.merging.layers import Merging, MergingAttention, MergingLayer, merging_class
from tocom_hf.merging.masks import argument_names, refuse_hidden_tokens
from tocom_hf.merging.recipes import MergeRecipe
from tocom_hf.merging.schedule import Schedule
from tocom_hf.merging.state import MergeSettings, begin_call, end_call
from tocom_hf.merging.timm_layers import MergingVisionTransformer


def apply_tome(
    model: PreTrainedModel,
    r: Schedule,
    *,
    proportional_attention: bool | None = None,
    restore: bool | None = None,
    class_tokens_only: bool | None = None,
    recipe: MergeRecipe | None = None,
    backbone: str | None = None,
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
            `last_hidden_state` keeps its shape and means over tokens weigh by size; and in every entry of
            `hidden_states` that the model is asked for, so that dense heads may read inner layers. By default on for
            families whose heads read patch tokens (DINOv2, CLIP, SigLIP, I-JEPA, masked image modelling), off where
            they read the class token only; a model that merges already keeps what it has.
        class_tokens_only: Let only the class (and distillation) tokens leave the last layer, which then computes
            nothing for the others but their keys and values: the same logits, at most a twelfth cheaper for twelve
            layers. `last_hidden_state` holds these tokens only. Off by default; a model that merges already keeps what
            it has.
        recipe: What tokens are matched by, with which penalties, and how many merge in which layer at a degree. ToMe's
            rule by default; a model that merges already keeps what it has.
        backbone: Which part merges, for models with several that could (`vision_tower`): its path in the model, or a
            part of the path that only one of them has. The others are left alone.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the architecture is not supported.
        DegreeError: if `r` is not a degree, or another one than that of a `TocomModel`, whose weights belong to it.
        ArgumentError: if `class_tokens_only` contradicts `restore`, or the family has no class token; if `restore`
            is False for a family that must be restored (V-JEPA 2); if several parts could merge and `backbone` does not
            name one; if the recipe was made for a model with another number of layers, or has an `attention_penalty`
            where there is no class token.

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
    found = find_backbone(model, backbone)
    hook = _find_hook(found)
    bound = hook is not None and hook.bound
    if hook is not None and bound:
        known = hook.settings
        if recipe not in (None, known.recipe) or known.recipe.schedule(r, len(found.layers)) != known.schedule:
            raise DegreeError(
                "The model is a TocomModel, which changes its weights with its degree: call model.set_target_r(...) "
                "instead of apply_tome. For merging without compensation load the checkpoint with its transformers "
                "class."
            )
    set_merging(
        found,
        r,
        proportional_attention=proportional_attention,
        restore=restore,
        class_tokens_only=class_tokens_only,
        recipe=recipe,
        bound=bound,
    )
    return model


def set_merging(
    backbone: Backbone,
    r: Schedule,
    *,
    proportional_attention: bool | None = None,
    restore: bool | None = None,
    class_tokens_only: bool | None = None,
    recipe: MergeRecipe | None = None,
    bound: bool = False,
) -> None:
    """What `apply_tome` does, for those who answer for the weights.

    Args:
        backbone: Of the model to patch.
        r, proportional_attention, restore, class_tokens_only, recipe: As in `apply_tome`.
        bound: Whether the weights belong to this degree, so that `apply_tome` shall not change it.
    """
    hook = _find_hook(backbone)
    known = _default_settings(backbone) if hook is None else hook.settings
    recipe = known.recipe if recipe is None else recipe
    settings = MergeSettings(
        schedule=recipe.schedule(r, len(backbone.layers)),
        protected=backbone.protected,
        proportional_attention=_given_or(proportional_attention, known.proportional_attention),
        restore=_given_or(restore, known.restore),
        class_tokens_only=_given_or(class_tokens_only, known.class_tokens_only),
        recipe=recipe,
    )
    if settings.class_tokens_only and (settings.restore or backbone.protected == 0):
        raise ArgumentError(
            f"class_tokens_only does not fit {type(backbone.model).__name__}, whose head reads patch tokens, nor "
            "restore=True."
        )
    if recipe.reads_attention and not backbone.has_class_token:
        raise ArgumentError(
            f"The recipe goes by the attention of the class token, and {type(backbone.module).__name__} has none. Use "
            "one without attention_penalty."
        )
    if backbone.architecture.restores_always and not settings.restore:
        raise ArgumentError(
            f"{type(backbone.module).__name__} takes tokens by their numbers behind its last layer, so merged tokens "
            "must be restored. Leave out restore=False."
        )
    if hook is None:
        _patch(backbone, MergeHook(settings, backbone, bound))
    else:
        hook.settings = settings
        hook.bound = bound


def remove_tome(model: PreTrainedModel, *, backbone: str | None = None) -> PreTrainedModel:
    """Undo `apply_tome`: classes, hooks and attributes are again those of the untouched model.

    Args:
        model: The patched model. A model that is not patched is left alone.
        backbone: Which part stops merging, where several merge; as in `apply_tome`.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model is a `TocomModel`, whose weights belong to its degree.
        ArgumentError: if `backbone` names no part that could merge.

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
    found = find_backbone(model, backbone)
    hook = _find_hook(found)
    if hook is not None and hook.bound:
        raise UnsupportedModelError(
            "The model is a TocomModel, whose weights are those of its degree. model.set_target_r(model.source_r) puts "
            "back the weights of the checkpoint; for a model that does not merge at all load the checkpoint with its "
            "transformers class."
        )
    unset_merging(found)
    return model


def unset_merging(backbone: Backbone) -> None:
    """What `remove_tome` does, for those who answer for the weights."""
    hooks = backbone.module._forward_pre_hooks
    keys = [key for key, hook in hooks.items() if isinstance(hook, MergeHook)]
    if keys:
        _refuse_wrapped_forwards(backbone)
    for key in keys:
        del hooks[key]
        del backbone.module._forward_pre_hooks_with_kwargs[key]
    for module in {backbone.module, *recording_modules(backbone)}:
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, RestoreHook | EndHook)]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    for part in [*backbone.layers.modules(), *_recomputing_module(backbone)]:
        if isinstance(part, MergingLayer):
            del part.tome_index
        if isinstance(part, Merging):
            del part.tome_architecture
            part.__class__ = part.stock_class  # type: ignore[assignment]


def get_settings(backbone: Backbone) -> MergeSettings | None:
    """How a model merges, or `None` where it is not patched."""
    hook = _find_hook(backbone)
    return None if hook is None else hook.settings


@contextlib.contextmanager
def merging_at(backbone: Backbone, r: Schedule, *, recipe: MergeRecipe | None = None) -> Iterator[None]:
    """Merge at another degree within a `with` block, with the weights as they are; afterwards the model is as before.

    Args:
        backbone: Of a model that is patched or not.
        r, recipe: As in `apply_tome`.
    """
    hook = _find_hook(backbone)
    if hook is None:
        set_merging(backbone, r, recipe=recipe)
        try:
            yield
        finally:
            unset_merging(backbone)
        return
    before = hook.settings
    set_merging(backbone, r, recipe=recipe, bound=hook.bound)
    try:
        yield
    finally:
        hook.settings = before


class MergeHook:
    """Forward pre-hook that begins a call of a backbone, with a `TokenState` of its own; `EndHook` ends it.

    Args:
        settings: How to merge.
        backbone: The backbone that calls it.
        bound: Whether the weights belong to the degree, as those of a `TocomModel` do.
    """

    def __init__(self, settings: MergeSettings, backbone: Backbone, bound: bool):
        self.settings = settings
        self.bound = bound
        self.shuffles_patches = backbone.architecture.shuffles_patches
        self.passes_kwargs = backbone.architecture.passes_kwargs
        self.layers_path = backbone.architecture.layers
        self.arguments = argument_names(type(backbone.module).forward)
        self.token_mask = backbone.architecture.token_mask

    def __call__(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        refuse_hidden_tokens(self.arguments, args, kwargs)
        if self.token_mask is not None and _is_given(self.token_mask, self.arguments, args, kwargs):
            raise UnsupportedInputError(
                f"Token merging does not take {self.token_mask}: merged tokens have no single position to mask. "
                f"Call the model without {self.token_mask}, or undo apply_tome first with remove_tome(model)."
            )
        if self.shuffles_patches and len(args) < 2 and kwargs.get("noise") is None:
            # which tokens may merge depends on their order, and the model shuffles them anew in every call
            pixel_values = args[0] if args else kwargs["pixel_values"]
            kwargs = {**kwargs, "noise": ascending_noise(pixel_values, module.config)}
        if self.settings.restore and any(self.settings.schedule):
            refuse_hooked_layers(cast(nn.ModuleList, module.get_submodule(self.layers_path)))
        tome = begin_call(module, self.settings)
        # layers that are wrapped to be recomputed, as FSDP does, must be given the state by the model
        return args, {**kwargs, "tome": tome} if self.passes_kwargs else kwargs


class EndHook:
    """Forward hook that ends what `MergeHook` began, after an error too."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        tome = end_call(module)
        # after an error there is no output, and the error says enough
        if output is not None and tome is not None and not tome.reached:
            raise UnsupportedModelError(
                f"{type(module).__name__} ran without its layers receiving what token merging tells them, so no token "
                "merged. This happens where a model runs its layers in other threads, or leaves all of them out."
            )


def _default_settings(backbone: Backbone) -> MergeSettings:
    """How a model merges that was told nothing but a degree."""
    # the decoders of SimMIM-style models read the patch tokens
    reads_patches = backbone.architecture.restore or hasattr(backbone.model, "decoder")
    return MergeSettings(schedule=(), protected=backbone.protected, restore=reads_patches)


def _is_given(name: str, arguments: Sequence[str], args: tuple, kwargs: dict) -> bool:
    """Whether an argument of a forward is given, by its name or at its place, and not `None`."""
    return {**dict(zip(arguments, args, strict=False)), **kwargs}.get(name) is not None


def _given_or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _patch(backbone: Backbone, hook: MergeHook) -> None:
    """Give layers and attention blocks their merging classes, and the backbone the hook that they need."""
    _refuse_wrapped_forwards(backbone)
    architecture = backbone.architecture
    layers = list(backbone.layers)
    attentions = [find_part(layer, architecture.attention) for layer in layers]
    # name every class before the first is replaced, so that a failure leaves the model as it was
    layer_classes = [merging_class(type(layer), MergingLayer) for layer in layers]
    attention_classes = [merging_class(type(attention), MergingAttention) for attention in attentions]
    recomputing = _recomputing_module(backbone)
    recomputing_classes = [merging_class(type(part), MergingVisionTransformer) for part in recomputing]
    for index, layer in enumerate(layers):
        layer.__class__ = layer_classes[index]
        layer.tome_index = index  # type: ignore[assignment]
        layer.tome_architecture = architecture  # type: ignore[assignment]
    for index, attention in enumerate(attentions):
        attention.__class__ = attention_classes[index]
        attention.tome_architecture = architecture
    for part, part_class in zip(recomputing, recomputing_classes, strict=True):
        part.__class__ = part_class
        part.tome_architecture = architecture  # type: ignore[assignment]
    backbone.module.register_forward_pre_hook(hook, with_kwargs=True)
    for module in recording_modules(backbone):
        module.register_forward_hook(RestoreHook(len(layers)))
    # the last one: what is restored is read from the call that runs
    backbone.module.register_forward_hook(EndHook(), always_call=True)


def _recomputing_module(backbone: Backbone) -> list[nn.Module]:
    """The module of timm that recomputes its layers itself, in a list; an empty one for models of transformers."""
    path = backbone.architecture.intermediates
    return [] if path is None else [backbone.module.get_submodule(path)]


def _refuse_wrapped_forwards(backbone: Backbone) -> None:
    for name, module in backbone.layers.named_modules():
        if "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"The forward of layer module {name!r} is wrapped, as Accelerate does when it spreads or offloads a "
                "model (device_map). Load the model on one device, call apply_tome or TocomModel.from_pretrained, and "
                "dispatch it afterwards; to undo, remove the hooks first (remove_hook_from_submodules)."
            )


def _find_hook(backbone: Backbone) -> MergeHook | None:
    for hook in backbone.module._forward_pre_hooks.values():
        if isinstance(hook, MergeHook):
            return hook
    return None
