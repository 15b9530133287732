# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Push and pull through the real huggingface_hub client and HTTP, against the server in hub_server.py."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import hub_server
from helpers.hub_faults import FAULTS, Situation
from helpers.hub_listener import HUB_LISTENER
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoModelForImageClassification

from tocom_hf import HubError, PluginFileError, PluginSet, TocomModel
from tocom_hf.storage.upload import upload_folder


@pytest.fixture(scope="module")
def server():
    server = hub_server.Hub(HUB_LISTENER)
    yield server
    server.close()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """An empty Hub that this process may ask, with an empty cache and without waits between retries."""
    server.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return server


@pytest.fixture
def pushed(hub, plugins):
    plugins.push_to_hub("user/set", token="token")
    return hub


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def test_pushing_a_set_is_one_commit_that_comes_back(hub, plugins):
    address = plugins.push_to_hub("user/set", token="token", private=True, commit_message="My set")
    repo = hub.repos["user/set"]
    assert repo.messages == ["initial commit", "My set"]
    assert repo.private
    assert address == f"{hub.endpoint}/user/set/commit/{repo.branches['main']}"
    names = {f"P_{i}_{i + 1}/adapter_{rest}" for i in range(6) for rest in ("config.json", "model.safetensors")}
    assert set(hub.files("user/set")) == {*names, "tocom_config.json", "README.md", ".gitattributes"}
    loaded = PluginSet.from_pretrained("user/set", token="token")
    assert loaded.config == plugins.config
    for path, factors in plugins.compose(0, 6).factors.items():
        assert torch.equal(loaded.compose(0, 6).factors[path].lora_B, factors.lora_B)


def test_only_the_plugins_in_between_are_downloaded(pushed):
    pushed.requests.clear()
    PluginSet.from_pretrained("user/set").compose(4, 2)
    fetched = {name for name in pushed.files("user/set") if any(r.endswith("/" + name) for r in pushed.requests)}
    rest = ("config.json", "model.safetensors")
    assert fetched == {"tocom_config.json", *(f"P_{i}_{i + 1}/adapter_{name}" for i in (2, 3) for name in rest)}


def test_a_snapshot_in_the_cache_is_a_folder_too(pushed):
    folder = snapshot_download("user/set")
    assert (Path(folder) / "tocom_config.json").is_symlink()
    PluginSet.from_pretrained(folder).compose(0, 6)


def test_a_branch_a_pull_request_and_a_commit(hub, plugins, model):
    plugins.push_to_hub("user/set", token="token")
    first = hub.repos["user/set"].branches["main"]
    other = make_plugins(model, seed=9)
    other.push_to_hub("user/set", token="token", revision="next")
    address = make_plugins(model, seed=3).push_to_hub("user/set", token="token", create_pr=True)
    assert "/discussions/" in address
    path = next(iter(plugins.adapter(0)))
    for revision, expected in ((None, plugins), (first, plugins), ("next", other)):
        loaded = PluginSet.from_pretrained("user/set", revision=revision)
        assert torch.equal(loaded.adapter(0)[path].lora_A, expected.adapter(0)[path].lora_A)


def test_files_that_are_fetched_later_come_from_the_commit_that_was_opened(hub, plugins, model):
    plugins.push_to_hub("user/set", token="token")
    loaded = PluginSet.from_pretrained("user/set")
    make_plugins(model, seed=9).push_to_hub("user/set", token="token")
    path = next(iter(plugins.adapter(0)))
    assert torch.equal(loaded.adapter(0)[path].lora_A, plugins.adapter(0)[path].lora_A)


def test_pushing_a_shorter_set_removes_the_plugins_that_it_lacks(pushed, model):
    make_plugins(model, max_r=3).push_to_hub("user/set", token="token")
    assert not [name for name in pushed.files("user/set") if name.startswith(("P_3", "P_4", "P_5"))]


def test_an_upload_that_another_overtakes_fails_and_commits_nothing(pushed, plugins, tmp_path):
    plugins.save_pretrained(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("mine")
    pushed.before_upload = lambda repo: repo.commit({**pushed.files("user/set"), "theirs.txt": b""})
    with pytest.raises(HubError, match="somebody else changed 'user/set' meanwhile") as caught:
        upload_folder(tmp_path / "set", "user/set", token="token")
    assert caught.value.status_code == 412
    assert "theirs.txt" in pushed.files("user/set")
    assert "notes.txt" not in pushed.files("user/set")


def test_offline_everything_comes_from_the_cache(pushed, plugins, monkeypatch):
    PluginSet.from_pretrained("user/set").compose(1, 4)
    pushed.requests.clear()
    PluginSet.from_pretrained("user/set", local_files_only=True).compose(1, 4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = PluginSet.from_pretrained("user/set")
    cached.compose(1, 4)
    assert pushed.requests == []
    with pytest.raises(HubError, match="not in the cache"):
        cached.compose(0, 2)


def test_a_pushed_model_comes_back_alone(hub, model, plugins, pixel_values):
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=1, target_r=5, scale=0.2)
    composed.push_to_hub("user/model", token="token")
    assert hub.repos["user/model"].messages == ["initial commit", "Upload with tocom_hf"]
    again = TocomModel.from_pretrained("user/model")
    assert (again.source_r, again.target_r) == (1, 5)
    assert torch.equal(logits(again, pixel_values), logits(composed, pixel_values))
    assert again.name_or_path == "user/model"
    again.set_target_r(0)
    composed.set_target_r(0)
    assert torch.equal(logits(again, pixel_values), logits(composed, pixel_values))
    plain = AutoModelForImageClassification.from_pretrained("user/model")
    assert type(plain).__name__ == "ViTForImageClassification"


def test_a_model_that_transformers_pushed_anew_has_lost_its_plugins(hub, model, plugins, tmp_path, caplog):
    TocomModel.from_pretrained(model, plugins=plugins, source_r=0).save_pretrained(tmp_path / "ours")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    plain.push_to_hub("user/theirs", token="token")
    assert TocomModel.from_pretrained("user/theirs").plugins is None
    assert "plugins=..." in caplog.text
    with pytest.raises(PluginFileError, match=r"tocom_plugins, which is missing.*Pass plugins"):
        TocomModel.from_pretrained("user/theirs", target_r=3)
    assert TocomModel.from_pretrained("user/theirs", plugins=plugins, target_r=3).target_r == 3


def test_saving_with_push_to_hub_uploads_the_folder(hub, model, plugins, tmp_path):
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)
    composed.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="user/model", token="token")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {*names, ".gitattributes", "README.md"} == set(hub.files("user/model"))
    assert "tocom_plugins/P_5_6/adapter_model.safetensors" in names


def test_a_card_that_somebody_wrote_stays(hub, model, plugins):
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)
    composed.push_to_hub("user/model", token="token")
    assert ModelCard(hub.files("user/model")["README.md"].decode()).data.library_name == "tocom-hf"
    repo = hub.repos["user/model"]
    repo.commit({**hub.files("user/model"), "README.md": b"mine"})
    composed.set_target_r(4)
    composed.push_to_hub("user/model", token="token")
    assert hub.files("user/model")["README.md"] == b"mine"
    assert json.loads(hub.files("user/model")["config.json"])["tocom"]["target_r"] == 4


def test_the_code_of_a_pushed_card_runs(hub):
    plugins = PluginSet.from_pretrained(ROOT / "hub_cards" / "tocom-vit-fashion-mnist")
    plugins.config.base_model = "user/vit-fashion-mnist"
    plugins.push_to_hub("user/tocom-vit-fashion-mnist", token="token")
    hub.publish("user/vit-fashion-mnist", ROOT / "examples" / "fashion_mnist" / "checkpoint")
    card = ModelCard.load("user/tocom-vit-fashion-mnist")
    namespace = {}
    exec(compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec"), namespace)
    assert namespace["model"].target_r == 4
    assert namespace["model"].name_or_path == "user/vit-fashion-mnist"
    card.validate()


def test_the_example_pushes_a_set_and_a_checkpoint(hub, plugins, model, tmp_path, monkeypatch, capsys):
    plugins.save_pretrained(tmp_path / "set")
    TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HF_TOKEN", "token")
    for folder in ("set", "model"):
        arguments = ["push_to_hub.py", str(tmp_path / folder), f"user/{folder}", "--private"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "push_to_hub.py"), run_name="__main__")
        assert ended.value.code == 0
        assert hub.repos[f"user/{folder}"].private
        assert capsys.readouterr().out.strip().startswith(f"{hub.endpoint}/user/{folder}/commit/")


def test_a_dropped_download_is_resumed_where_it_broke(pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what is less than a chunk is lost
    pushed.faults = [hub_server.Fault("/storage/", "GET", damage="drop", times=1)]
    PluginSet.from_pretrained("user/set").compose(2, 3)
    broken, rest = [answer for answer in pushed.answers if "/storage/" in answer.path and answer.method == "GET"]
    assert broken.status == 200
    # half of it arrived before the connection broke
    assert (rest.size, rest.status) == (broken.size - broken.size // 2, 206)


def test_what_has_arrived_is_not_fetched_again(pushed):
    pushed.faults = [hub_server.Fault("P_3_4/adapter_model", status=403)]
    with pytest.raises(HubError):
        PluginSet.from_pretrained("user/set").compose(2, 4)
    pushed.faults, pushed.requests[:] = [], []
    PluginSet.from_pretrained("user/set").compose(2, 4)
    assert not any("P_2_3" in request for request in pushed.requests)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults(fault, hub, plugins, tmp_path, monkeypatch):
    situation = Situation(hub, plugins, make_model(), tmp_path, monkeypatch)
    outcome = fault.run(situation)
    assert outcome.error is None or isinstance(outcome.error, HubError | PluginFileError), outcome.error
    assert (outcome.error is None) == (fault.message is None), outcome.error
    if fault.message is not None:
        assert fault.message in str(outcome.error)
    assert outcome.left == fault.left
    assert outcome.model_unchanged


def test_one_process_pushes_and_another_loads_the_same_logits(hub, fork_server, tmp_path):
    """They share nothing but the Hub: each has an empty cache of its own."""
    printed = []
    for name in ("push", "pull"):
        (done,) = fork_server.run(f"helpers.hub_process:{name}", str(tmp_path / name), tmp_path)
        assert done.code == 0, done.output
        lines = done.output.splitlines()
        printed.append([line for line in lines if line.startswith(("logits ", "weights "))])
    assert len(printed[0]) == 2
    assert printed[0] == printed[1]
    assert len(set(printed[0][0].split())) == 6  # "logits" and five numbers, none of them the same
