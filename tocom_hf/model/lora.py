# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`load_lora`: a model of transformers with a LoRA adapter merged into its weights."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tocom_hf.model.loading import open_checkpoint
from tocom_hf.model.lora_files import LoraFiles
from tocom_hf.model.lora_merging import merge_lora
from tocom_hf.storage.repository import DOWNLOAD_ARGUMENTS


def load_lora(
    base: str | Path | PreTrainedModel,
    adapter: str | Path,
    *,
    adapter_revision: str | None = None,
    adapter_subfolder: str = "",
    **kwargs: Any,
) -> PreTrainedModel:
    """Merge a LoRA adapter into the model that it was trained on, ready for `TocomModel.from_pretrained`.

    transformers 5 renamed the layers of ViT, DeiT, DINOv2 and others. An adapter that was trained under transformers 4
    is merged all the same, which PEFT alone refuses, or does not notice. Every weight of the adapter must arrive.

    Args:
        base: Hub id or local folder of the model, or a loaded one, which is changed in place. It has the head that the
            adapter was trained with, or gets it where the adapter brings its own and `base` is a name.
        adapter: Hub id or local folder of the adapter: a LoRA in safetensors, of any kind but those that need other
            weights to start from. It may have been trained on the backbone alone.
        adapter_revision: Branch, tag or commit of the adapter on the Hub.
        adapter_subfolder: Folder of the adapter within its repository.
        **kwargs: For a name, passed to the model class's own `from_pretrained` (`dtype`, `revision`, ...). `token`,
            `cache_dir`, `local_files_only` and `force_download` are for both.

    Returns:
        The model, in evaluation mode unless it was passed in loaded.

    Raises:
        PluginFileError: if a file is missing or damaged, or a weight of the adapter has no place in the model.
        HubError: if the Hub refuses or fails a request, or cannot be reached.
        UnsupportedModelError: if the architecture is not supported, or the model is quantised or offloaded.
        ComposedWeightsError: if plugins are folded into the weights of a loaded `TocomModel`.
        ArgumentError: if code or pickled weights were to be loaded.

    Example:

    ```python
    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import AutoModelForImageClassification
    >>> from tocom_hf import load_lora
    >>> base = "examples/digits/checkpoint"
    >>> model = AutoModelForImageClassification.from_pretrained(base)
    >>> tuned = get_peft_model(model, LoraConfig(target_modules=["fc1"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tuned.save_pretrained(folder)
    ...     type(load_lora(base, folder)).__name__
    'ViTForImageClassification'

    ```
    """
    download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs and name != "revision"}
    if isinstance(base, nn.Module) and kwargs.keys() - download.keys():
        raise TypeError(f"A loaded model takes no loading arguments, got {', '.join(kwargs.keys() - download.keys())}.")
    files = LoraFiles.open(adapter, subfolder=adapter_subfolder, revision=adapter_revision, **download)
    if isinstance(base, nn.Module):
        model = base
    else:
        opened = open_checkpoint(base, kwargs, files)
        model = opened.checkpoint.load(opened.model_class, opened.config, opened.arguments)
    merge_lora(model, files)
    return model
