# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`PluginSet`: the chain of plugins `P_0_1 .. P_(max_r - 1)_max_r` of one backbone, and its folder format.

Every plugin is an ordinary PEFT LoRA adapter in a folder of its own, relative to the backbone that `AutoModel` loads.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .architectures import Backbone, projection_paths
from .composition import Adapter, Composite, Factors, chain, compose, require_in_range, require_scale
from .config import CONFIG_NAME, PluginSetConfig
from .errors import DegreeError, PluginFileError
from .files import Repository, read_json, upload_folder, write_folder


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
# what an adapter_config.json may not switch on, with the values that leave it off
_PLAIN_LORA = {
    "use_dora": (False, None), "use_rslora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []), "auto_mapping": (None,), "target_parameters": (None, []),
}  # fmt: skip


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
        return (
            f"PluginSet(base_model={config.base_model!r}, r={config.min_r}..{config.max_r}, rank={config.rank}, "
            f"scale={config.recommended_scale})"
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

        Args:
            pretrained_model_name_or_path: Local folder or Hub id.
            revision: Branch, tag or commit on the Hub. Files that are fetched later come from the same commit.
            subfolder: Folder of the set within the repository.
            cache_dir, token, local_files_only: As in `huggingface_hub.hf_hub_download`.

        Raises:
            PluginFileError: if there is no valid `tocom_config.json`.
        """
        repository = Repository.open(
            pretrained_model_name_or_path,
            probe=CONFIG_NAME,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return cls(PluginSetConfig.from_json_file(repository.path(CONFIG_NAME)), repository=repository)

    def adapter(self, index: int) -> Adapter:
        """The plugin `P_index_index+1`, read on first use and checked against the configuration.

        Raises:
            PluginFileError: if a file is missing, truncated, or not the plain LoRA that the configuration promises.
        """
        if index not in self._adapters:
            if self._repository is None:
                raise PluginFileError(f"The plugin set in memory lacks {plugin_name(index)}.")
            self._adapters[index] = self._read(index)
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
            DegreeError: if a degree is not an integer that the set covers, or the scale is not a number.
            PluginFileError: if a plugin between the two cannot be read.
        """
        config = self.config
        source_r = require_in_range(source_r, "source_r", config.min_r, config.max_r)
        target_r = require_in_range(target_r, "target_r", config.min_r, config.max_r)
        scale = config.recommended_scale if scale is None else require_scale(scale)
        indices, _ = chain(source_r, target_r)
        adapters = [self.adapter(index) for index in indices]
        return compose(adapters, source_r=source_r, target_r=target_r, scale=scale)

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `BackboneMismatchError` unless a model's backbone is, or was fine-tuned from, the set's own."""
        self.config.backbone.check(backbone, self.config.base_model)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the set to a folder, all or nothing: the files are written beside and then moved into place.

        Args:
            save_directory: The folder; made if missing. Other files in it stay.
        """
        config = self.config
        adapters = {index: self.adapter(index) for index in range(config.min_r, config.max_r)}
        with write_folder(save_directory) as folder:
            for index, adapter in adapters.items():
                _write_adapter(folder / plugin_name(index), adapter, config.trained_scale, config.base_model)
            config.to_json_file(folder / CONFIG_NAME)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the set to the Hub in one commit.

        Args:
            repo_id: Hub id of the repository; made if missing.
            **kwargs: `private`, `token`, `revision`, `commit_message` and `create_pr`.

        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(folder, repo_id, **kwargs)

    def _read(self, index: int) -> dict[str, Factors]:
        assert self._repository is not None
        name, config = plugin_name(index), self.config
        _check_adapter_config(self._repository.path(f"{name}/{ADAPTER_CONFIG}"), config)
        path = self._repository.path(f"{name}/{ADAPTER_WEIGHTS}")
        facts = config.backbone
        shape_a, shape_b = (config.rank, facts.hidden_size), (facts.hidden_size, config.rank)
        shapes: dict[str, tuple[int, int]] = {}
        layers = projection_paths(facts.model_type, facts.num_hidden_layers)
        for layer in layers:
            shapes[_key(layer, "A")], shapes[_key(layer, "B")] = shape_a, shape_b
        tensors = _read_tensors(path, shapes)
        return {layer: Factors(tensors[_key(layer, "A")], tensors[_key(layer, "B")]) for layer in layers}


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
        _write_adapter(folder, composite.factors, composite.scale, base_model)


def _key(layer: str, factor: str) -> str:
    return f"{_PEFT_PREFIX}{layer}.lora_{factor}.weight"


def _write_adapter(folder: Path, adapter: Adapter, scale: float, base_model: str | None) -> None:
    from peft import LoraConfig  # takes a quarter of a second to import, and reading does not need it

    rank = next(iter(adapter.values())).lora_A.shape[0]
    lora = LoraConfig(
        r=rank,
        # PEFT multiplies B A by lora_alpha / r
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules=sorted({path.rpartition(".")[2] for path in adapter}),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    lora.save_pretrained(str(folder))
    tensors = {
        _key(path, name): factor.contiguous()
        for path, factors in adapter.items()
        for name, factor in (("A", factors.lora_A), ("B", factors.lora_B))
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _check_adapter_config(path: Path, config: PluginSetConfig) -> None:
    found = read_json(path)
    wanted = {"peft_type": "LORA", "r": config.rank}
    problems = [
        f"{key} is {found.get(key)!r}, not {value!r}" for key, value in wanted.items() if found.get(key) != value
    ]
    alpha = found.get("lora_alpha")
    if not isinstance(alpha, int | float) or abs(alpha - config.trained_scale * config.rank) > 1e-6:
        problems.append(f"lora_alpha is {alpha!r}, not trained_scale * rank = {config.trained_scale * config.rank:g}")
    problems += [f"{key} is {found[key]!r}" for key, off in _PLAIN_LORA.items() if found.get(key) not in off]
    if problems:
        raise PluginFileError(f"{path} is not the plain LoRA that {CONFIG_NAME} promises: {'; '.join(problems)}.")


def _read_tensors(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found.keys() != shapes.keys():
                missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
                raise PluginFileError(
                    f"{path} has other tensors than expected: missing {missing[:3]}, extra {extra[:3]}."
                )
            wrong = {name: shape for name, shape in found.items() if shape != shapes[name]}
            if wrong:
                name, shape = next(iter(wrong.items()))
                raise PluginFileError(f"{path}: {name} has shape {shape}, expected {shapes[name]}.")
            tensors = {name: file.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise PluginFileError(
            f"{path} is truncated or not a safetensors file ({error}). Download or copy the plugin set again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise PluginFileError(f"{path}: {name} must hold finite floating-point numbers.")
    return {name: tensor.float() for name, tensor in tensors.items()}
