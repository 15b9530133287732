# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugin sets for the same weights in other names: query, key and value are three layers in transformers, one in timm.

A set that was distilled for `facebook/deit-base-patch16-224` fits timm's checkpoint of the same weights, and the
reverse. What a set adds to a weight is the same number for number.
"""

from dataclasses import replace

from tocom_hf.errors import BackboneMismatchError
from tocom_hf.merging.architectures import ARCHITECTURES
from tocom_hf.merging.backbones import Backbone
from tocom_hf.plugins.composition import Adapter, Factors
from tocom_hf.plugins.fused import join_query_and_value, split_query_and_value
from tocom_hf.plugins.plugin_set import PluginSet


def in_names_of(backbone: Backbone, plugins: PluginSet) -> PluginSet:
    """A plugin set in the names of a backbone that holds the same weights, or was fine-tuned from them.

    Returns:
        The set itself where it has these names, or where it does not fit the backbone at all.

    Raises:
        BackboneMismatchError: if the backbone has the same layers but not the same weights; if the set applies to
            layers of its own choice, whose other names are not known.
    """
    config = plugins.config
    model_type = backbone.module.config.model_type
    wrapped = [name for name in (model_type, config.backbone.model_type) if ARCHITECTURES[name].reader is not None]
    if model_type == config.backbone.model_type or not wrapped:
        return plugins
    config.backbone.check(backbone, config.base_model)
    if config.target_modules is not None:
        raise BackboneMismatchError(
            f"The plugin set was distilled for a model of the type {config.backbone.model_type!r} and applies to "
            f"{', '.join(config.target_modules)}, layers that have other names in one of the type {model_type!r}. Only "
            "sets on query and value, the default, fit both."
        )
    return _Renamed(plugins, model_type)


class _Renamed(PluginSet):
    """A set whose plugins are read in the names of another model type when they are first needed.

    Args:
        original: The set as it is stored.
        model_type: Of the backbone that it shall fit.
    """

    def __init__(self, original: PluginSet, model_type: str):
        super().__init__(replace(original.config, backbone=replace(original.config.backbone, model_type=model_type)))
        self._original = original

    def adapter(self, index: int) -> Adapter:
        if index not in self._adapters:
            factors = self._split(self._original.adapter(index))
            if self.config.joins_query_and_value:
                factors = [join_query_and_value(*pair) for pair in zip(factors[::2], factors[1::2], strict=True)]
            self._adapters[index] = dict(zip(self.config.shapes(), factors, strict=True))
        return self._adapters[index]

    def _split(self, adapter: Adapter) -> list[Factors]:
        """The factors of query and value in turn, layer by layer."""
        stored = [adapter[path] for path in self._original.config.shapes()]
        if not self._original.config.joins_query_and_value:
            return stored
        return [part for joined in stored for part in split_query_and_value(joined)]
