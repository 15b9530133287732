# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A bare `pip install tocom-hf` does all that needs no extra; what needs one says which, by an error of our own."""

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import venv

import pytest
from helpers.paths import ROOT
from packaging.version import Version

from tocom_hf.extras import EXTRAS


PROGRAM = ROOT / "tests" / "helpers" / "bare_install.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# what each case of bare_install.py returns where no extra is installed
WORKS = {
    "load_plugins": "PluginSet(base_model='vit-mix', r=0..8, rank=8, scale=0.1)",
    "run_model": [2, 10, False],
    "merge_tokens": [False, True],
    "count_flops": True,
    "calibrate": [0, 4],
    "pick_scale": 0.1,
    "fit_scales": 0,
    "evaluate_degrees": [0, 4],
    "export": [0],
}
# the extra that each other case needs
NEEDS = {
    "load_images": "train",
    "with_pixel_values": "train",
    "distill": "train",
    "paint_groups": "vis",
    "tile": "vis",
    "plot_calibration": "vis",
    "export_to_onnx": "onnx",
    "export_to_openvino": "onnx",
}


def run_program(python, *arguments, folder):
    """Run bare_install.py in a process of its own and return its answers.

    Args:
        python: The interpreter, which decides what is installed.
        arguments: Further arguments of the program.
        folder: Where to run it.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(PROGRAM), str(ROOT), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hidden():
    """The answers of this environment, in which the packages of the extras cannot be imported."""
    return run_program(sys.executable, "--hide", folder=ROOT)


def require_works(answers, case):
    assert answers[case] == {"value": WORKS[case]}


def require_names_the_extra(answers, case):
    answer = answers[case]
    assert answer.get("error") == "MissingExtraError", answer
    assert answer["ours"]
    assert f"pip install 'tocom-hf[{NEEDS[case]}]'" in answer["message"]


def test_no_extra_can_be_imported(hidden):
    """But for Accelerate, which PEFT needs itself. Or the other tests here would show nothing."""
    assert hidden["installed_extras"] == {"value": ["accelerate"]}


def test_every_case_is_judged(hidden):
    assert {*hidden} == {"installed_extras", *WORKS, *NEEDS}


@pytest.mark.parametrize("case", WORKS)
def test_it_works_without_extras(hidden, case):
    require_works(hidden, case)


@pytest.mark.parametrize("case", NEEDS)
def test_it_names_the_extra_to_install(hidden, case):
    require_names_the_extra(hidden, case)


def requirement_names(requirements):
    """Names of packages, in lower case, from requirements such as `torch>=2.13`."""
    names = set()
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement).group()
        names.add(name.lower())
    return names


def test_the_extra_that_an_error_names_brings_the_package():
    distributions = {"PIL": "pillow"}
    for package, extra in EXTRAS.items():
        listed = requirement_names(PROJECT["optional-dependencies"][extra])
        assert distributions.get(package, package).lower() in listed, package


def test_the_lowest_versions_are_those_that_pyproject_promises():
    """`make test-lowest` tries constraints-lowest.txt; a bound that is not in there was not tried."""
    lowest = {}
    for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            lowest[name.lower()] = version
    promised = [*PROJECT["dependencies"]]
    for extra in ("train", "vis", "serve"):
        promised += PROJECT["optional-dependencies"][extra]
    for requirement in promised:
        name, bound = requirement.split(">=")
        assert Version(lowest[name.lower()]) == Version(bound), requirement


def require_network():
    try:
        urllib.request.urlopen("https://pypi.org/simple/pip/", timeout=10).close()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"pip has no network: {error}")


@pytest.mark.slow
def test_a_bare_install_in_an_empty_environment(tmp_path):
    """`pip install .` pulls all that the package needs, and no extra; it is the same that hiding them shows."""
    require_network()
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, str(ROOT)], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)

    # in an empty folder, so that the installed package is imported and not the one of the repository
    answers = run_program(python, folder=tmp_path)
    # PEFT needs Accelerate itself
    assert answers["installed_extras"] == {"value": ["accelerate"]}
    for case in WORKS:
        require_works(answers, case)
    for case in NEEDS:
        require_names_the_extra(answers, case)
