# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import helpers.hub_listener  # isort: skip  # noqa: F401  # before anything imports huggingface_hub
import pytest
import torch
from helpers.fork_server import ForkServer
from helpers.models import make_model, make_plugins


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def plugins(model):
    return make_plugins(model)


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def fork_server():
    """Processes that need not import torch first."""
    server = ForkServer()
    yield server
    server.close()
