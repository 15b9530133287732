# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The public surface: what it consists of, that every name has an example which runs, and what importing it costs."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from transformers.utils import logging

import tocom_hf


MODULES = [module.name for module in pkgutil.walk_packages(tocom_hf.__path__, "tocom_hf.") if not module.ispkg]
NAMES = [name for name in tocom_hf.__all__ if name != "__version__"]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, monkeypatch):
    if module.endswith(".triton_kernels"):
        pytest.importorskip("triton", reason="needs the extra triton")
    if module.endswith(".ray_deployments"):
        pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.chdir(ROOT)
    logging.disable_progress_bar()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    try:
        assert doctest.testmod(importlib.import_module(module), optionflags=flags).failed == 0
    finally:
        logging.enable_progress_bar()


def test_all_is_sorted_without_repetition_and_importable():
    names = tocom_hf.__all__
    assert len({*names}) == len(names)
    assert [*names] == sorted(names)
    assert {*names} <= {*dir(tocom_hf)}
    for name in names:
        assert getattr(tocom_hf, name) is not None


def test_all_is_the_whole_public_surface():
    """Whatever else the package shows are its modules and what `__init__.py` needs itself."""
    public = {name for name in vars(tocom_hf) if not name.startswith("_")}
    modules = {module.name for module in pkgutil.iter_modules(tocom_hf.__path__)}
    assert public - {*tocom_hf.__all__} <= modules | {"importlib", "Any", "TYPE_CHECKING"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tocom_hf.nothing


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_with_an_example(name):
    found = getattr(tocom_hf, name)
    text = inspect.getdoc(found) or ""
    assert text
    # errors are shown where they are raised; their base class shows how to catch them
    if not (inspect.isclass(found) and issubclass(found, tocom_hf.TocomError)) or name == "TocomError":
        assert ">>> " in text


def own_members(cls):
    """The public attributes and methods of a class that this package itself defines."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("tocom_hf")]
    names = {name for base in own for name in vars(base)}
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    return {name for name in names if not name.startswith("_")}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def public_surface():
    """Every public name, member and parameter, such as `PluginSet.compose(scale)`."""
    lines = set()
    for name in tocom_hf.__all__:
        found = getattr(tocom_hf, name)
        lines.add(name)
        if inspect.isclass(found):
            for member in own_members(found):
                lines.add(f"{name}.{member}")
                method = getattr(found, member, None)
                if callable(method):
                    lines.update(f"{name}.{member}({parameter})" for parameter in parameters(method))
        elif callable(found):
            lines.update(f"{name}({parameter})" for parameter in parameters(found))
    return lines


def test_nothing_public_goes_away():
    """`public_api.txt` lists what users may rely on. What is new is added to it; what is in it stays."""
    promised = {*(ROOT / "tests" / "project" / "public_api.txt").read_text(encoding="utf-8").split()}
    assert promised - public_surface() == set()
    assert public_surface() - promised == set(), "add these to tests/project/public_api.txt"


def test_importing_it_loads_nothing_heavy():
    heavy = {"torch", "transformers", "huggingface_hub", "numpy", "peft", "accelerate", "datasets", "matplotlib"}
    code = f"import sys, tocom_hf; print(sorted({heavy!r} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_logger_follows_the_verbosity_of_transformers():
    from tocom_hf.cost.calibration import logger

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        assert not logger.isEnabledFor(logging.WARNING)
        logging.set_verbosity_info()
        assert logger.isEnabledFor(logging.INFO)
    finally:
        logging.set_verbosity(before)
