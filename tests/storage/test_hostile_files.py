# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Files of strangers: whatever is in them, the outcome is a correct load or an exception of this package.

`make fuzz` runs many more examples than the ordinary tests (environment variable `FUZZ_EXAMPLES`).
"""

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers.models import make_model, make_plugins
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tocom_hf import ArgumentError, PluginFileError, PluginSet, TocomError, TocomModel, UnsupportedModelError
from tocom_hf.plugins.config import PluginSetConfig


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, "", "../x", "/etc/passwd", "vit", "swin", [], {}]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=8
)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model, its set, and where the set and a TocomModel of it were saved."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = make_model(num_hidden_layers=2, hidden_size=16)
    plugins = make_plugins(model, max_r=2)
    plugins.save_pretrained(folder / "set")
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=1)
    composed.save_pretrained(folder / "model")
    return folder, plugins


def paths(content, prefix=()):
    """All keys of a JSON object, nested ones too."""
    for key, value in content.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@st.composite
def mutations(draw, content):
    """A JSON object with some entries replaced, removed or added."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths(content))))
        place = content
        for key in path[:-1]:
            place = place[key]
        action = draw(st.sampled_from(["replace", "remove", "add", "nudge"]))
        old = place[path[-1]]
        if action == "replace":
            place[path[-1]] = draw(VALUES)
        elif action == "remove":
            del place[path[-1]]
        elif action == "add":
            place[draw(st.text(max_size=12))] = draw(VALUES)
        elif isinstance(old, int | float) and not isinstance(old, bool):
            place[path[-1]] = old + draw(st.sampled_from([-1, 1, 0.5, 1e-9, 1e300]))
    return content


def replica(origin, what, tmp):
    """A fresh copy whose files are links to the original's, to be replaced one at a time."""
    target = tmp / what
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(origin / what, target, copy_function=os.link)
    return target


def overwrite(path, data):
    path.unlink()
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def load_set(folder, plugins):
    """Load all of a set; what loads is what was saved, or differs only in what was changed on purpose."""
    try:
        loaded = PluginSet.from_pretrained(folder)
        composite = loaded.compose(loaded.config.min_r, min(loaded.config.max_r, 2))
    except TocomError as error:
        event(f"refused: {type(error).__name__}")
        return None
    event("loaded")
    for path, factors in composite.factors.items():
        for factor in factors:
            assert factor.dtype == torch.float32
            assert factor.isfinite().all()
        assert factors.lora_A.shape == (composite.rank, 16), path
    return loaded


@fuzz
@given(data=st.data())
def test_mutated_configurations(origin, tmp_path_factory, data):
    folder, plugins = origin
    target = replica(folder, "set", tmp_path_factory.getbasetemp() / "configs")
    original = json.loads((folder / "set" / "tocom_config.json").read_text())
    content = data.draw(mutations(original))
    overwrite(target / "tocom_config.json", content)
    loaded = load_set(target, plugins)
    if loaded is not None:
        # an accepted configuration says what the file says, and survives a round trip
        again = target / "again.json"
        loaded.config.to_json_file(again)
        assert repr(PluginSetConfig.from_json_file(again)) == repr(loaded.config)


@fuzz
@given(data=st.data())
def test_mutated_adapter_configurations(origin, tmp_path_factory, data):
    folder, plugins = origin
    target = replica(folder, "set", tmp_path_factory.getbasetemp() / "adapters")
    path = target / "P_1_2" / "adapter_config.json"
    original = json.loads(path.read_text())
    content = data.draw(mutations(original))
    overwrite(path, content)
    if load_set(target, plugins) is not None:
        relevant = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "auto_mapping", "use_dora")
        for key in relevant:
            old, new = original[key], content.get(key)
            assert new == old or not new or abs(new - old) < 1e-6 or sorted(set(new)) == sorted(old)


@st.composite
def damaged(draw, data):
    """Bytes with some of them changed, cut, or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(len(data) - 1, 0)) | st.integers(0, 200))
        action = draw(st.sampled_from(["flip", "cut", "insert", "length", "text"]))
        if action == "flip" and data:
            data[min(position, len(data) - 1)] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del data[position:]
        elif action == "insert":
            data[position:position] = draw(st.binary(max_size=16))
        elif action == "length":
            data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 5000)))
        else:
            old, new = draw(
                st.sampled_from([(b"F32", b"F16"), (b"F32", b"U32"), (b"[2,16]", b"[1,32]"), (b":[0,", b":[4,")])
            )
            data[:] = data.replace(old, new, draw(st.integers(1, 3)))
    return bytes(data)


@fuzz
@given(data=st.data())
def test_damaged_weights(origin, tmp_path_factory, data):
    folder, plugins = origin
    target = replica(folder, "set", tmp_path_factory.getbasetemp() / "weights")
    path = target / "P_0_1" / "adapter_model.safetensors"
    overwrite(path, data.draw(damaged(path.read_bytes())))
    load_set(target, plugins)


@fuzz
@given(
    names=st.lists(st.text(max_size=30), max_size=4),
    dtype=st.sampled_from(["F32", "F64", "I64", "X", "BF16"]),
    shape=st.lists(st.integers(0, 2**40), max_size=3),
    offsets=st.lists(st.integers(0, 2**64), min_size=2, max_size=2),
    extra=VALUES,
    body=st.integers(0, 64),
)
def test_made_up_headers(origin, tmp_path_factory, names, dtype, shape, offsets, extra, body):
    folder, plugins = origin
    target = replica(folder, "set", tmp_path_factory.getbasetemp() / "headers")
    key = "base_model.model.layers.0.attention.q_proj.lora_A.weight"
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets} for name in (*names, key)}
    text = json.dumps({**header, "__metadata__": extra}).encode()
    overwrite(target / "P_0_1" / "adapter_model.safetensors", struct.pack("<Q", len(text)) + text + bytes(body))
    assert load_set(target, plugins) is None


def integers(value):
    """All integers in a JSON value."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from integers(entry)
    elif isinstance(value, int):
        yield value


@fuzz
@given(data=st.data())
def test_mutated_checkpoints(origin, tmp_path_factory, data):
    folder, _ = origin
    target = replica(folder, "model", tmp_path_factory.getbasetemp() / "checkpoints")
    original = json.loads((folder / "model" / "config.json").read_text())
    content = data.draw(mutations({**original, "transformers_weights": None, "auto_map": {"AutoConfig": "x.Y"}}))
    assume(max(map(abs, integers(content)), default=0) < 2000)  # transformers makes models as large as it is told to
    overwrite(target / "config.json", content)
    if data.draw(st.booleans()):
        path = target / "model.safetensors"
        overwrite(path, data.draw(damaged(path.read_bytes())))
    try:
        model = TocomModel.from_pretrained(target)
    except TocomError as error:
        event(f"refused: {type(error).__name__}")
        return
    event("loaded")
    assert isinstance(model, TocomModel)


KEYS = [
    f"base_model.model.layers.{i}.attention.{n}.lora_{f}.weight"
    for i in (0, 1)
    for n in ("q_proj", "v_proj")
    for f in "AB"
]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff" * 8, "header claims"),
        (struct.pack("<Q", 10**6) + b" " * 10**6, "far more than its"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (b"", "truncated"),
    ],
)
def test_a_hostile_header_is_refused_before_it_is_parsed(origin, tmp_path, header, message):
    target = replica(origin[0], "set", tmp_path)
    overwrite(target / "P_0_1" / "adapter_model.safetensors", header)
    with pytest.raises(PluginFileError, match=message):
        PluginSet.from_pretrained(target).adapter(0)


def test_a_hostile_header_does_not_make_us_allocate_more_than_the_file(origin, tmp_path):
    """A small file that claims terabytes, loaded in a process that may not have them."""
    target = replica(origin[0], "set", tmp_path)
    header = {key: {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]} for key in KEYS}
    text = json.dumps(header).encode()
    overwrite(target / "P_0_1" / "adapter_model.safetensors", struct.pack("<Q", len(text)) + text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PluginFileError):
        PluginSet.from_pretrained(target).adapter(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_names_that_leave_the_folder_are_refused(origin, tmp_path):
    target = replica(origin[0], "set", tmp_path)
    secret = tmp_path / "secret.safetensors"
    shutil.copy(target / "P_0_1" / "adapter_model.safetensors", secret)
    for subfolder in ("../set", "/etc", "a/../../x", "C:\\x", "..\\x"):
        with pytest.raises(PluginFileError, match="leaves the repository"):
            PluginSet.from_pretrained(target, subfolder=subfolder)
        with pytest.raises(PluginFileError, match="leaves the repository"):
            PluginSet.from_pretrained("user/set", subfolder=subfolder)
    link = target / "P_0_1" / "adapter_model.safetensors"
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(PluginFileError, match="outside of"):
        PluginSet.from_pretrained(target).adapter(0)


def test_a_link_to_the_folder_itself_is_fine(origin, tmp_path):
    (tmp_path / "link").symlink_to(origin[0] / "set")
    PluginSet.from_pretrained(tmp_path / "link").compose(0, 2)


@pytest.fixture
def checkpoint(origin, tmp_path):
    return replica(origin[0], "model", tmp_path)


def test_pickled_weights_are_never_read(checkpoint):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(checkpoint / "exploded"),)

    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(PluginFileError, match=r"model.safetensors is missing.*Only safetensors files are read"):
        TocomModel.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    overwrite(checkpoint / "config.json", {**config, "transformers_weights": "adapter_model.bin"})
    with pytest.raises(PluginFileError, match="asks for the weights"):
        TocomModel.from_pretrained(checkpoint)
    assert not (checkpoint / "exploded").exists()


@pytest.mark.parametrize(
    "arguments",
    [{"trust_remote_code": True}, {"use_safetensors": False}, {"gguf_file": "x"}, {"adapter_kwargs": {"a": 1}}],
)
def test_code_and_other_formats_are_refused(checkpoint, arguments):
    with pytest.raises(ArgumentError, match="is not supported"):
        TocomModel.from_pretrained(checkpoint, **arguments)


def test_code_in_a_checkpoint_is_not_run(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "evil.py").write_text("import os; os.mkdir('exploded')")
    for changes in ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, {"architectures": ["Trainer"]}):
        overwrite(checkpoint / "config.json", {**config, **changes})
        with pytest.raises((PluginFileError, UnsupportedModelError)):
            TocomModel.from_pretrained(checkpoint)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernels_that_a_checkpoint_names_are_refused(checkpoint, key):
    config = json.loads((checkpoint / "config.json").read_text())
    overwrite(checkpoint / "config.json", {**config, "vision_config": {key: {"": "stranger/kernel"}}})
    with pytest.raises(PluginFileError, match="which is code"):
        TocomModel.from_pretrained(checkpoint)


def test_an_adapter_beside_a_checkpoint_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(PluginFileError, match="load an adapter"):
        TocomModel.from_pretrained(checkpoint)


def test_a_folder_that_holds_an_adapter_only_is_refused(origin):
    with pytest.raises(UnsupportedModelError, match="holds an adapter, not a model"):
        TocomModel.from_pretrained(origin[0] / "set" / "P_0_1")


def test_shards_that_leave_the_folder_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside.safetensors")
    index = {"weight_map": {"classifier.weight": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PluginFileError, match="not the name of a shard"):
        TocomModel.from_pretrained(checkpoint)


def test_sharded_checkpoints_load(checkpoint, origin, tmp_path):
    model = TocomModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    again = TocomModel.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    model.save_pretrained(tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("model-*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}), ("modules_to_save", ["classifier"]),
        ("target_modules", ["q_proj", "v_proj", "k_proj"]), ("target_modules", ".*"), ("use_dora", True),
        ("layer_replication", [[0, 4]]), ("eva_config", {"rho": 2.0}), ("a_new_option", True), ("use_qalora", True),
        ("qalora_group_size", 8), ("megatron_core", "evil.module"), ("r", True), ("lora_alpha", 10**400),
    ],
)  # fmt: skip
def test_an_adapter_switches_on_nothing_but_plain_lora(origin, tmp_path, key, value):
    target = replica(origin[0], "set", tmp_path)
    path = target / "P_0_1" / "adapter_config.json"
    overwrite(path, {**json.loads(path.read_text()), key: value})
    with pytest.raises(PluginFileError, match=f"not the plain LoRA.*{key}"):
        PluginSet.from_pretrained(target).adapter(0)


def test_integers_in_place_of_numbers_are_refused(origin, tmp_path):
    target = replica(origin[0], "set", tmp_path)
    path = target / "P_0_1" / "adapter_model.safetensors"
    path.unlink()
    save_file({key: torch.ones(2, 16) if "_A" in key else torch.ones(16, 2, dtype=torch.int32) for key in KEYS}, path)
    with pytest.raises(PluginFileError, match="dtype I32"):
        PluginSet.from_pretrained(target).adapter(0)


def test_a_newer_format_names_the_version_to_upgrade_to(origin, tmp_path):
    target = replica(origin[0], "set", tmp_path)
    content = json.loads((target / "tocom_config.json").read_text())
    overwrite(target / "tocom_config.json", {**content, "format_version": 2, "tocom_hf_version": "3.1.0"})
    with pytest.raises(PluginFileError, match=r"pip install -U 'tocom-hf>=3.1.0'"):
        PluginSet.from_pretrained(target)
    overwrite(target / "tocom_config.json", {**content, "format_version": 2, "tocom_hf_version": "3; rm -rf /"})
    with pytest.raises(PluginFileError, match=r"pip install -U tocom-hf`"):
        PluginSet.from_pretrained(target)
