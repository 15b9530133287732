# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Opening a transformers checkpoint of a stranger: one commit, safetensors only, no code, no names that leave it."""

import contextlib
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, is_timm_available

from tocom_hf.errors import ArgumentError, HubError, PluginFileError, UnsupportedModelError
from tocom_hf.model.completeness import require_whole_backbone
from tocom_hf.plugins.adapters import ADAPTER_CONFIG
from tocom_hf.storage.json_files import read_json
from tocom_hf.storage.repository import DOWNLOAD_ARGUMENTS, Repository, require_small_header


# what a saved checkpoint consists of, so that nothing of an earlier one with other shards stays behind
CHECKPOINT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_REFUSED = {
    "trust_remote_code": (None, False), "use_safetensors": (None, True), "gguf_file": (None,), "adapter_kwargs": (None,)
}  # fmt: skip


class Checkpoint:
    """The files of a checkpoint in a local folder, downloaded and checked, from one state of a repository.

    Args:
        name: Local folder or Hub id.
        arguments: Keyword arguments of `from_pretrained`; those that this class deals with are taken out.

    Attributes:
        repository: Where the files came from.
        folder: The local folder that holds them.

    Raises:
        ArgumentError: if code or pickled weights of the repository were to be loaded.
        PluginFileError: if a file is missing or not what it should be.
        HubError: if the Hub fails.
    """

    def __init__(self, name: str | Path, arguments: dict[str, Any]):
        for key, harmless in _REFUSED.items():
            if arguments.pop(key, None) not in harmless:
                raise ArgumentError(
                    f"{key}=... is not supported: only safetensors files and the classes of transformers are loaded. "
                    "To load anything else, load the model yourself and pass it to TocomModel.from_pretrained."
                )
        self.download = {key: arguments.pop(key) for key in DOWNLOAD_ARGUMENTS if key in arguments}
        subfolder = arguments.pop("subfolder", None) or ""
        try:
            self.repository = Repository.open(name, probe=CONFIG_NAME, subfolder=subfolder, **self.download)
        except PluginFileError as error:
            with contextlib.suppress(PluginFileError, HubError):
                Repository.open(name, probe=ADAPTER_CONFIG, subfolder=subfolder, **self.download)
                raise UnsupportedModelError(
                    f"{name} holds an adapter, not a model. Name the model that it was trained on beside it: "
                    f"TocomModel.from_pretrained(base, adapter={str(name)!r}, ...) merges it into the weights "
                    "first, as load_lora(base, adapter) does and merge_and_unload of PEFT."
                ) from error
            raise
        self.name, self.subfolder = name, subfolder
        self.folder = self.repository.path(CONFIG_NAME).parent

    def config(self, override: Any, arguments: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The configuration with overrides, and the arguments that are left.

        Args:
            override: A configuration, or where to load one from instead.
            arguments: Keyword arguments of `from_pretrained`; those that the configuration knows change it.
        """
        if isinstance(override, PreTrainedConfig):
            return override, arguments
        content = read_json(self.repository.path(CONFIG_NAME))
        reason = None if override is not None else reason_for_foreign(content)
        if reason is not None:
            error_class = UnsupportedModelError if is_of_timm(content) or "auto_map" in content else PluginFileError
            raise error_class(f"The checkpoint {self.name} cannot be loaded. {reason}")
        if _asks_for_kernels(content):
            raise PluginFileError(
                f"{CONFIG_NAME} of {self.name} asks for an attention kernel of the Hub, which is code. "
                "Pass attn_implementation=... if you want one."
            )
        # "auto" is for the weights: a configuration would take it for the name of a dtype
        automatic = {name: arguments[name] for name in ("dtype", "torch_dtype") if arguments.get(name) == "auto"}
        arguments = {name: value for name, value in arguments.items() if name not in automatic}
        try:
            config, rest = AutoConfig.from_pretrained(
                override or self.folder, return_unused_kwargs=True, trust_remote_code=False, **arguments
            )
        except Exception as error:  # whatever transformers makes of a malformed configuration
            raise PluginFileError(f"{CONFIG_NAME} of {self.name} cannot be used: {error!r:.500}") from error
        if getattr(config, "transformers_weights", None) not in (None, SAFE_WEIGHTS_NAME):
            raise PluginFileError(
                f"{CONFIG_NAME} of {self.name} asks for the weights {config.transformers_weights!r}. Only "
                f"{SAFE_WEIGHTS_NAME}, whole or in shards, is loaded."
            )
        return config, {**rest, **automatic}

    def load(self, model_class: Any, config: PreTrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
        """Download the weights and load the model, of which all of the backbone must be there.

        Args:
            model_class: A class of transformers.
            config: The configuration.
            arguments: Other keyword arguments of its `from_pretrained`.

        Raises:
            PluginFileError: if transformers cannot load it, or would start a part of the backbone at random.
        """
        self.fetch_weights(arguments.get("variant"))
        try:
            model, report = model_class.from_pretrained(
                self.folder, config=config, use_safetensors=True, output_loading_info=True, **arguments
            )
        except Exception as error:  # whatever transformers makes of a configuration that does not fit the weights
            if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
                raise  # the caller's
            self.repository.require_unchanged()
            raise PluginFileError(f"The checkpoint {self.name} cannot be loaded: {error!r:.500}") from error
        self.repository.require_unchanged()
        require_whole_backbone(model, str(self.name), report)
        model.name_or_path = model.config._name_or_path = str(self.name)  # not the folder in the cache
        return model

    def fetch_weights(self, variant: str | None = None) -> None:
        """Download the weights, and check what can be checked before transformers reads them."""
        adapter = self.folder / ADAPTER_CONFIG
        if adapter.exists():
            raise PluginFileError(
                f"{adapter} makes transformers load an adapter, perhaps of another repository, along with the model. "
                "Merge the adapter into the checkpoint (merge_and_unload), or remove the file."
            )
        whole, index = (_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        try:
            path = self.repository.path(whole)
        except (PluginFileError, HubError) as error:
            try:
                shards = read_json(self.repository.path(index)).get("weight_map")
            except HubError:
                raise error from None
            except PluginFileError:
                raise PluginFileError(
                    f"{error} Only safetensors files are read. Load a checkpoint in another format with transformers, "
                    "and save it with save_pretrained, or pass the loaded model."
                ) from error
        else:
            require_small_header(path)
            return
        names = set(shards.values()) if isinstance(shards, dict) else set()
        for name in sorted(names, key=str):
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise PluginFileError(f"{index} of {self.name} lists {name!r}, which is not the name of a shard.")
            require_small_header(self.repository.path(name))


def reason_for_foreign(content: dict[str, Any]) -> str | None:
    """Why a checkpoint is not supported that transformers cannot load here; `None` where it can.

    Args:
        content: Its config.json.
    """
    if is_of_timm(content):
        if "pretrained_cfg" not in content and "model_type" not in content:
            return (
                "It is a checkpoint of an early version of timm, which transformers does not load. Of its DeiT and ViT "
                "`tocom convert --weights` makes checkpoints of transformers."
            )
        if is_timm_available():
            return None
        return (
            "It is a checkpoint of timm, which transformers runs where timm and torchvision are installed: "
            "pip install 'tocom-hf[timm]'. Of its DeiT and ViT `tocom convert --weights` makes checkpoints that need "
            "neither."
        )
    if content.get("model_type") in list(CONFIG_MAPPING):
        return None
    if "auto_map" in content:
        return "Its class is code of the repository, which is not run; only classes of transformers are supported."
    return "Its config.json names no model type that this version of transformers knows."


def is_of_timm(content: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model of timm, as timm writes it or in the wrapper of transformers."""
    if "model_type" in content:
        return content["model_type"] == "timm_wrapper"
    return "pretrained_cfg" in content or "architecture" in content


def _asks_for_kernels(content: Any) -> bool:
    """Whether a configuration names an attention implementation, in whatever part, that transformers would download."""
    if isinstance(content, list):
        return any(map(_asks_for_kernels, content))
    if not isinstance(content, dict):
        return False
    named = (str(value) for key, value in content.items() if "attn_implementation" in key)
    return any("/" in name for name in named) or any(map(_asks_for_kernels, content.values()))


def _variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"
