# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Turning a loaded model of transformers into a `TocomModel` in place, all or nothing."""

import copy
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedModel

from tocom_hf.merging.backbones import Backbone, backbones_in
from tocom_hf.merging.patching import get_settings, set_merging, unset_merging
from tocom_hf.merging.subclassing import runtime_subclass
from tocom_hf.model.folding import TocomState, live_weights
from tocom_hf.model.locks import ReadersWriterLock, SwitchLock
from tocom_hf.plugins.plugin_set import PluginSet
from tocom_hf.plugins.translation import in_names_of


def equip(backbone: Backbone, state: TocomState, target_r: int, mixin: type) -> Any:
    """Turn a loaded model into a `TocomModel`, or leave it as it was.

    Args:
        backbone: The backbone of the model.
        state: What it shall know, at its source degree.
        target_r: The degree to run at.
        mixin: `TocomModel` itself, which imports this module.
    """
    if state.plugins is not None:
        live_weights(backbone, None)  # what is quantised or offloaded has no weights to know the backbone by
        state = replace(state, plugins=in_names_of(backbone, state.plugins))
        cast(PluginSet, state.plugins).check_backbone(backbone)
        live_weights(backbone, state.target_modules)
    if isinstance(backbone.model, mixin):
        return _equip_again(backbone, backbone.model, state, target_r)
    model = backbone.model
    stock_class = type(model)
    settings = get_settings(backbone)
    recorded = model.config.__dict__.get("tocom")
    try:
        set_merging(backbone, state.source_r, recipe=state.recipe)
        _own_config(model)
        model.__class__ = runtime_subclass(mixin, stock_class)
        equipped: Any = model
        equipped._tocom = state
        equipped._tocom_path = backbone.path if len(backbones_in(model)) > 1 else None
        equipped._tocom_lock = ReadersWriterLock()
        equipped._tocom_switch = SwitchLock()
        equipped._switch_alone(backbone, target_r, state.scale)
    except BaseException:
        model.__class__ = stock_class
        for name in ("_tocom", "_tocom_path", "_tocom_lock", "_tocom_switch"):
            model.__dict__.pop(name, None)
        model.config.__dict__.pop("tocom", None)
        if recorded is not None:
            model.config.tocom = recorded
        if settings is None:
            unset_merging(backbone)
        else:
            set_merging(backbone, list(settings.schedule), recipe=settings.recipe)
        raise
    return equipped


def _equip_again(backbone: Backbone, model: Any, state: TocomState, target_r: int) -> Any:
    """Give a `TocomModel` another plugin set, source degree or scale, or leave it as it was."""
    before = model._tocom
    model.set_target_r(model.source_r)
    try:
        model._adopt(backbone, state)
        model._switch(target_r, state.scale)
    except BaseException:
        model._adopt(
            backbone, TocomState(before.source_r, before.source_r, before.scale, before.plugins, before.recipe)
        )
        model._switch(before.target_r, before.scale)
        raise
    return model


def _own_config(model: PreTrainedModel) -> None:
    """Give a model a copy of its configuration, which it may share with other models, before degrees go into it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = copies.get(id(module.__dict__.get("config")))
        if own is not None:
            module.config = own
