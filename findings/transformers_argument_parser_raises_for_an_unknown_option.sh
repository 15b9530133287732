#!/usr/bin/env bash
# transformers 5.23.0: `HfArgumentParser` is an `argparse.ArgumentParser`, but `parse_args_into_dataclasses` answers an
# option that it does not know with a ValueError, and so with a traceback and exit code 1. A wrong value of a known option
# ends as in argparse, with one message and exit code 2. A script has to treat the two cases alike itself.
#
# Seen: "unknown option: ValueError", "wrong value: SystemExit 2"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
from dataclasses import dataclass

from transformers import HfArgumentParser


@dataclass
class Arguments:
    steps: int = 1


def outcome(name, *arguments):
    try:
        HfArgumentParser(Arguments).parse_args_into_dataclasses(list(arguments))
    except SystemExit as ended:
        print(f"{name}: SystemExit {ended.code}")
    except ValueError:
        print(f"{name}: ValueError")


outcome("unknown option", "--step_count", "2")
outcome("wrong value", "--steps", "two")
PYTHON
diff "$folder/seen" - <<'SEEN'
unknown option: ValueError
wrong value: SystemExit 2
SEEN
