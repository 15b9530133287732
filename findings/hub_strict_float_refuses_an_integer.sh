#!/usr/bin/env bash
# huggingface_hub 2.4.0: a field annotated `float` in a dataclass under `huggingface_hub.dataclasses.strict` refuses an
# integer, though Python's typing lets `int` stand for `float` (PEP 484). So `learning_rate=1` fails where `1.0` works.
# A field annotated `typing.Annotated[float, ...]` cannot be used at all: its type counts as unsupported.
#
# Seen: "accepts 1.0", "refuses 1: TypeError", "refuses Annotated: TypeError"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
from dataclasses import dataclass
from typing import Annotated

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError


@strict
@dataclass
class Plain:
    learning_rate: float = 0.5


@strict
@dataclass
class WithMetadata:
    learning_rate: Annotated[float, "positive"]


def outcome(name, make):
    try:
        make()
    except StrictDataclassFieldValidationError as error:
        print(f"refuses {name}: {type(error.__cause__).__name__}")
    else:
        print(f"accepts {name}")


outcome("1.0", lambda: Plain(1.0))
outcome("1", lambda: Plain(1))
outcome("Annotated", lambda: WithMetadata(1.0))
PYTHON
diff "$folder/seen" - <<'SEEN'
accepts 1.0
refuses 1: TypeError
refuses Annotated: TypeError
SEEN
