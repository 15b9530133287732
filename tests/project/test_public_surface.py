# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The public surface: what it consists of, that every name has an example which runs, and what importing it costs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from transformers.utils import logging

import tocom_hf


MODULES = [module.name for module in pkgutil.walk_packages(tocom_hf.__path__, "tocom_hf.") if not module.ispkg]
NAMES = [name for name in tocom_hf.__all__ if name != "__version__"]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, monkeypatch):
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


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("tocom_hf.cli.")])
def test_the_library_does_not_print(module):
    """It logs by transformers' logger, or returns."""
    tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_importing_it_loads_nothing_heavy():
    """Beyond what transformers loads itself, which includes accelerate where it is installed."""
    code = (
        "import sys; from transformers import AutoConfig, PreTrainedModel; before = {*sys.modules}; import tocom_hf;"
        "heavy = {'accelerate', 'datasets', 'matplotlib', 'pandas', 'peft', 'kornia', 'fastapi', 'gradio'};"
        "print(sorted(heavy & ({*sys.modules} - before)), 'datasets' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False False"


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
