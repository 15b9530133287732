# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`PluginSet`: the chain of plugins `P_0_1 .. P_(max_r - 1)_max_r` of one backbone, and its folder format.

Every plugin is an ordinary PEFT LoRA adapter in a folder of its own, relative to the backbone that `AutoModel` loads.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tocom_hf.errors import ArgumentError, DegreeError, PluginFileError
from tocom_hf.merging.backbones import Backbone
from tocom_hf.plugins.adapters import read_adapter, write_adapter
from tocom_hf.plugins.cards import AGREEMENT_FIGURE, CARD_NAME, plugin_set_card
from tocom_hf.plugins.composition import (
    Adapter,
    Composite,
    chain,
    require_in_range,
    require_scale,
    sum_chain,
)
from tocom_hf.plugins.config import CONFIG_NAME, DTYPES, PluginSetConfig
from tocom_hf.storage.repository import Repository
from tocom_hf.storage.transaction import retry_while_saved, scratch_folder, write_folder
from tocom_hf.storage.upload import upload_folder


# what a saved set consists of, so that no plugin of an earlier, longer one stays behind
PLUGIN_FILES = r"P_\d+_\d+/adapter_(config\.json|model\.safetensors)"


class PluginSet:
    """The plugins of one backbone. Adapters are read, and downloaded, when a composition first needs them.

    Args:
        config: What the set is for and how it was made.
        adapters: The plugins by index i of `P_i_i+1`; may be partial if `repository` is given.
        repository: Where the missing ones are read from.

    Example:

    ```python
    >>> from tocom_hf import PluginSet
    >>> plugins = PluginSet.from_pretrained("hub_cards/tocom-vit-fashion-mnist")
    >>> plugins.config.max_r, plugins.config.rank
    (8, 2)
    >>> plugins.compose(2, 8).rank  # P_2_3 .. P_7_8 as one LoRA
    12

    ```
    """

    def __init__(
        self,
        config: PluginSetConfig,
        adapters: Mapping[int, Adapter] | None = None,
        repository: Repository | None = None,
    ):
        self.config = config
        self._adapters = dict(adapters or {})
        self._repository = repository

    def __repr__(self) -> str:
        config = self.config
        source = "" if config.source_r is None else f"source_r={config.source_r}, "
        return (
            f"PluginSet(base_model={config.base_model!r}, {source}r={config.min_r}..{config.max_r}, "
            f"rank={config.rank}, scale={config.recommended_scale})"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "PluginSet":
        """Open a plugin set in a local folder or on the Hub. Only `tocom_config.json` is read at once.

        Files from the Hub are kept in its cache, which serves them when the Hub cannot be reached. A download that
        breaks is resumed where it broke; after an error, only what had not arrived is fetched again.

        Args:
            pretrained_model_name_or_path: Local folder or Hub id.
            revision: Branch, tag or commit on the Hub. Files that are fetched later come from the same commit.
            subfolder: Folder of the set within the repository.
            cache_dir, token, local_files_only: As in `huggingface_hub.hf_hub_download`.

        Raises:
            PluginFileError: if there is no valid `tocom_config.json`.
            HubError: if the Hub refuses or fails a request, or cannot be reached.
        """
        arguments = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}

        def load() -> "PluginSet":
            repository = Repository.open(
                pretrained_model_name_or_path, probe=CONFIG_NAME, subfolder=subfolder, **arguments
            )
            config = PluginSetConfig.from_json_file(repository.path(CONFIG_NAME))
            repository.require_unchanged()
            return cls(config, repository=repository)

        return retry_while_saved(load)

    def adapter(self, index: int) -> Adapter:
        """The plugin `P_index_index+1`, read on first use and checked against the configuration.

        Raises:
            PluginFileError: if a file is missing, truncated, or not the plain LoRA that the configuration promises.
        """
        if index not in self._adapters:
            if self._repository is None:
                raise PluginFileError(f"The plugin set in memory lacks {plugin_name(index)}.")
            self._adapters[index] = self._read(self._repository, index)
        return self._adapters[index]

    def compose(self, source_r: int, target_r: int, scale: float | None = None) -> Composite:
        """The signed chain of plugins from one degree to another as one LoRA (ToCom, eq. 4 and 5).

        Args:
            source_r: The degree that a checkpoint was trained at.
            target_r: The degree that it shall run at.
            scale: The factor s; by default what the set recommends.

        Returns:
            The composite. `save_composite` writes it as one ordinary PEFT adapter.

        Raises:
            DegreeError: if a degree is not an integer that the set covers, the set is for weights of another degree
                only, or the scale is not a number.
            PluginFileError: if a plugin between the two cannot be read.
        """
        scale = self.require(source_r, target_r, scale)
        indices, _ = chain(source_r, target_r)
        adapters = [self.adapter(index) for index in indices]
        return sum_chain(adapters, source_r=source_r, target_r=target_r, scale=scale)

    def require(self, source_r: int, target_r: int, scale: float | None = None) -> float:
        """Make sure that `compose` will do, without composing: the degrees are covered and the plugins can be read.

        Call it before work that a wrong degree or a damaged file would make worthless.

        Args:
            source_r, target_r, scale: As in `compose`.

        Returns:
            The scale that `compose` would use.

        Raises:
            DegreeError, PluginFileError: as `compose` does.
        """
        config = self.config
        source_r = require_in_range(source_r, "source_r", config.min_r, config.max_r)
        target_r = require_in_range(target_r, "target_r", config.min_r, config.max_r)
        if config.source_r not in (None, source_r) and source_r != target_r:
            raise DegreeError(
                f"source_r={source_r}, but the plugin set was distilled for weights trained at r = {config.source_r} "
                "and fits no others. Use a set for every degree, or distil one with "
                f"DistillationArguments(source_r={source_r})."
            )
        scale = config.recommended_scale if scale is None else require_scale(scale)
        indices, _ = chain(source_r, target_r)
        for index in indices:
            self.adapter(index)
        return scale

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `BackboneMismatchError` unless a model's backbone is, or was fine-tuned from, the set's own."""
        self.config.check(backbone)

    def save_pretrained(self, save_directory: str | Path, *, dtype: str | None = None) -> None:
        """Write the set to a folder, all or nothing: the files are written beside and then moved into place.

        Args:
            save_directory: The folder; made if missing. Plugins of a longer set in it go, other files stay.
            dtype: What to store the factors in: `float32`, `float16` or `bfloat16`, which halve the size; by default
                what the configuration says. A set that is loaded from the folder and saved again keeps it.

        Raises:
            ArgumentError: if the dtype is none of these, or a factor is too large for it.
        """
        if dtype is not None:
            config = replace(self.config, dtype=dtype)
            PluginSet(config, self._adapters, self._repository).save_pretrained(save_directory)
            return
        if self.config.dtype not in DTYPES:
            raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, got {self.config.dtype!r:.50}.")
        for index in range(self.config.min_r, self.config.max_r):
            self.adapter(index)  # what cannot be read is noticed before a folder is made
        with write_folder(save_directory, replaces=[PLUGIN_FILES]) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the files of the set to an empty folder."""
        config = self.config
        for index in range(config.min_r, config.max_r):
            write_adapter(
                folder / plugin_name(index),
                self.adapter(index),
                config.trained_scale,
                config.base_model,
                getattr(torch, config.dtype),
            )
        config.to_json_file(folder / CONFIG_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a ToCom plugin set",
        create_pr: bool = False,
    ) -> str:
        """Upload the set, with a card made from what its configuration records, to the Hub in one commit.

        Args:
            repo_id: Hub id of the repository; made if missing.
            private: Whether a new repository is private.
            token: As in `huggingface_hub.HfApi`.
            revision: The branch; `main` by default, made if missing.
            commit_message: Message of the commit.
            create_pr: Open a pull request instead of committing to `main`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            HubError: if the Hub refuses or fails a request, or cannot be reached. Nothing is committed then.
        """
        with scratch_folder() as folder:
            self.write(folder)
            plugin_set_card(self.config, repo_id, figure=self._copy_figure(folder)).save(folder / CARD_NAME)
            return upload_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                replaces=[PLUGIN_FILES],
            )

    def _copy_figure(self, folder: Path) -> str | None:
        repository = self._repository
        if repository is None or repository.folder is None or not (repository.folder / AGREEMENT_FIGURE).exists():
            return None
        shutil.copyfile(repository.path(AGREEMENT_FIGURE), folder / AGREEMENT_FIGURE)
        return AGREEMENT_FIGURE

    def _read(self, repository: Repository, index: int) -> Adapter:
        try:
            adapter = read_adapter(repository, plugin_name(index), self.config)
        except PluginFileError:
            repository.require_unchanged()  # else that is the reason, and may be tried again
            raise
        repository.require_unchanged()
        return adapter


def plugin_name(index: int) -> str:
    """The name of the plugin from degree `index` to `index + 1`, as adapter and as folder: `P_4_5`."""
    return f"P_{index}_{index + 1}"


def save_composite(composite: Composite, save_directory: str | Path, *, base_model: str | None = None) -> None:
    """Write a composite as one ordinary PEFT LoRA adapter, which stock `PeftModel.from_pretrained` loads.

    Args:
        composite: What `PluginSet.compose` returned, for two different degrees.
        save_directory: The folder; made if missing.
        base_model: Hub id or path of the backbone, for the adapter's configuration.

    Raises:
        DegreeError: if the degrees are equal, so that there is nothing to save.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from tocom_hf import PluginSet, save_composite
    >>> plugins = PluginSet.from_pretrained("hub_cards/tocom-vit-fashion-mnist")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_composite(plugins.compose(2, 8), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    ```
    """
    if not composite.factors:
        raise DegreeError(
            f"source_r and target_r are both {composite.source_r}: no adapter is needed, the weights stay as they are."
        )
    with write_folder(save_directory) as folder:
        write_adapter(folder, composite.factors, composite.scale, base_model)
