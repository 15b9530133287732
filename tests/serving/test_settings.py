# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of a deployment: from arguments, from the environment, and changed while it serves."""

import pytest
import yaml
from helpers.paths import EXAMPLES, ROOT

from tocom_hf import ArgumentError


pytest.importorskip("pydantic")

from tocom_hf.serving.settings import DeploymentSettings, ModelSettings, from_arguments, parse


def test_text_of_a_command_line_is_converted():
    given = {"model_name_or_path": "model", "latency_ms": "150", "degrees": "0,4, 8", "num_replicas": "2"}
    settings = from_arguments({**given, "plugins": "", "device": ""}, {})
    assert (settings.latency_ms, settings.degrees, settings.num_replicas) == (150.0, [0, 4, 8], 2)
    assert (settings.plugins, settings.device) == (None, None)


@pytest.mark.parametrize(("given", "degrees"), [("8", [8]), (8, [8]), ([0, 8], [0, 8]), ("", None), (None, None)])
def test_degrees_may_be_a_list_or_text(given, degrees):
    assert from_arguments({"model_name_or_path": "model", "degrees": given}, {}).degrees == degrees


def test_the_environment_gives_what_arguments_do_not():
    environment = {"TOCOM_MODEL_NAME_OR_PATH": "model", "TOCOM_LATENCY_MS": "150", "TOCOM_OTHER": "x", "PATH": "/"}
    settings = from_arguments({"latency_ms": 90}, environment)
    assert (settings.model_name_or_path, settings.latency_ms) == ("model", 90)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "No model is named. Pass model_name_or_path=..., or set TOCOM_MODEL_NAME_OR_PATH."),
        ({"model_name_or_path": ""}, "The setting model_name_or_path='' cannot be used"),
        ({"latency": 5}, "There is no setting 'latency'. Known are model_name_or_path, plugins"),
        ({"latency_ms": "fast"}, "The setting latency_ms='fast' cannot be used"),
        ({"latency_ms": "nan"}, "The setting latency_ms='nan' cannot be used"),
        ({"latency_ms": 0}, "The setting latency_ms=0 cannot be used"),
        ({"degrees": "0,x"}, "The setting degrees='0,x' cannot be used"),
        ({"degrees": [-1]}, "The setting degrees=[-1] cannot be used"),
        ({"max_batch_size": 0}, "The setting max_batch_size=0 cannot be used"),
        ({"num_replicas": 0}, "The setting num_replicas=0 cannot be used"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas=2 is less than num_replicas=3"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(given, message):
    with pytest.raises(ArgumentError) as caught:
        from_arguments({"model_name_or_path": "model", **given} if given else {}, {})
    assert message in str(caught.value)


def test_a_part_may_change_while_it_serves():
    settings = parse(ModelSettings, {"model_name_or_path": "model", "latency_ms": 90})
    changed = settings.changed_by({"plugins": "set", "degrees": [0, 2]})
    assert (changed.plugins, changed.degrees, changed.latency_ms) == ("set", [0, 2], 90)
    assert settings.changed_by({}) == settings.changed_by(None) == settings
    with pytest.raises(ArgumentError, match="There is no setting 'num_replicas'"):
        settings.changed_by({"num_replicas": 2})


def test_a_replica_is_given_no_settings_of_the_cluster():
    settings = from_arguments({"model_name_or_path": "model", "num_gpus": 0.5, "top_k": 3}, {})
    assert isinstance(settings, DeploymentSettings)
    assert settings.of_the_model() == ModelSettings(model_name_or_path="model", top_k=3)


@pytest.mark.parametrize("name", ["ray_serve", "ray_service"])
def test_the_configurations_serve_the_embedded_model_with_settings_that_there_are(name):
    content = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if name == "ray_service":
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    (application,) = content["applications"]
    (classifier,) = application["deployments"]
    assert (application["import_path"], classifier["name"]) == ("tocom_hf.serving.ray_app:app", "Classifier")
    settings = from_arguments(application["args"], {}).of_the_model().changed_by(classifier["user_config"])
    assert (ROOT / settings.model_name_or_path / "config.json").is_file()
    assert (ROOT / settings.plugins / "tocom_config.json").is_file()
