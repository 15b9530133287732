# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import re

import pytest
from helpers.paths import ROOT


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory in which the README's relative paths exist."""
    for name in ("examples", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", range(5))
def test_the_first_code_blocks_run_as_they_stand(clone, index):
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), {})


def test_the_first_block_saves_a_model_that_loads(clone):
    namespace = {}
    exec(compile(BLOCKS[0], "README.md block 0", "exec"), namespace)
    assert (clone / "my-model" / "tocom_plugins" / "tocom_config.json").exists()
    assert namespace["model"].target_r == 4
