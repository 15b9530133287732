# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a deployment on Ray Serve may be told, by arguments, by environment variables, or while it serves."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tocom_hf.errors import ArgumentError


PREFIX = "TOCOM_"
"""Of the environment variables: `TOCOM_LATENCY_MS` is for `latency_ms`."""


def _numbers(value: Any) -> Any:
    """A list from what a command line can hold: `0,4,8`, or a single number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str):
        return value.replace(",", " ").split() or None
    return value


def _absent(value: Any) -> Any:
    return None if value == "" else value


Degrees = Annotated[list[Annotated[int, Field(ge=0)]] | None, BeforeValidator(_numbers)]
Text = Annotated[str | None, BeforeValidator(_absent)]


class ModelSettings(BaseModel):
    """What is served, and within which limits. All of it may change while the service runs.

    Attributes:
        model_name_or_path: Hub id or folder of a fine-tuned checkpoint, or a folder that `tocom_hf.export` wrote. Every
            node must be able to read it.
        plugins: Hub id or folder of the plugin set; by default the one that the checkpoint brings. An export has its
            own.
        source_r: The degree that the checkpoint was trained at; by default what it records.
        degrees: The degrees to choose from; by default the plugin set's, or the exported ones.
        latency_ms: Objective for the time to an answer.
        max_batch_size: Images in a batch, and in a request.
        batch_wait_ms: How long a batch that is not full waits for more. By default not at all: what arrives while the
            model is busy is the next batch.
        max_queue: Images that may wait in a replica; by default what the objective allows.
        top_k: Labels in an answer.
        device: By default cuda where the replica has a GPU, else the CPU; of an export in the words of its runtime.
        threads: Threads of the model on a CPU; by default what Ray gives to the replica (`num_cpus`).
        calibration_seconds: How long a replica measures the speed of the degrees before it serves.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_name_or_path: Annotated[str, Field(min_length=1)]
    plugins: Text = None
    source_r: Annotated[int | None, Field(ge=0)] = None
    degrees: Degrees = None
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 200
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    batch_wait_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    max_queue: Annotated[int | None, Field(ge=1)] = None
    top_k: Annotated[int, Field(ge=1)] = 5
    device: Text = None
    threads: Annotated[int | None, Field(ge=1)] = None
    calibration_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3

    def changed_by(self, user_config: Mapping[str, Any] | None) -> "ModelSettings":
        """These settings with some of them replaced.

        Raises:
            ArgumentError: if one is unknown or out of range.
        """
        return parse(ModelSettings, {**self.model_dump(), **(user_config or {})})


class DeploymentSettings(ModelSettings):
    """All that `serve run tocom_hf.serving.ray_app:app` takes: the model's settings and how many replicas there are.

    Attributes:
        num_replicas: Copies of the model; the smallest number of them where `max_replicas` is given.
        max_replicas: Let Ray add replicas up to so many while requests wait.
        num_cpus: CPUs of a replica.
        num_gpus: GPUs of a replica, or a part of one.
        gateways: Processes that take requests from HTTP and hand them to the replicas.
        max_queued_requests: Requests that may wait in each gateway while no replica takes them, such as when the only
            one is being replaced.
    """

    num_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int | None, Field(ge=1)] = None
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    gateways: Annotated[int, Field(ge=1)] = 1
    max_queued_requests: Annotated[int, Field(ge=1)] = 256

    @model_validator(mode="after")
    def _ordered(self) -> "DeploymentSettings":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than num_replicas={self.num_replicas}")
        return self

    def of_the_model(self) -> ModelSettings:
        """The part that a replica is given."""
        return ModelSettings(**{name: getattr(self, name) for name in ModelSettings.model_fields})


Settings = TypeVar("Settings", bound=ModelSettings)


def parse(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from their names and values, which may be text.

    Raises:
        ArgumentError: if one is unknown, missing or out of range. The message names the first of them.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        raise ArgumentError(f"There is no setting {name!r}. Known are {', '.join(kind.model_fields)}.")
    if first["type"] == "missing":
        raise ArgumentError(f"No model is named. Pass {name}=..., or set {PREFIX}{name.upper()}.")
    if not name:
        raise ArgumentError(f"The settings do not fit: {first['ctx']['error']}.")
    raise ArgumentError(f"The setting {name}={values[name]!r:.100} cannot be used: {first['msg']}.")


def from_arguments(arguments: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> DeploymentSettings:
    """The settings of a deployment: those that were passed, else those of environment variables, else the defaults.

    Args:
        arguments: What `serve run` or the `args` of a configuration file pass.
        environment: Where variables such as `TOCOM_LATENCY_MS` are.

    Raises:
        ArgumentError: if one is unknown, missing or out of range.
    """
    names = {PREFIX + name.upper(): name for name in DeploymentSettings.model_fields}
    from_environment = {name: environment[variable] for variable, name in names.items() if variable in environment}
    return parse(DeploymentSettings, {**from_environment, **arguments})
