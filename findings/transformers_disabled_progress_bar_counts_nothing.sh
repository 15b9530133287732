#!/usr/bin/env bash
# transformers 5.23.0: with `logging.disable_progress_bar()`, `logging.tqdm(...)` returns a stand-in all of whose
# attributes are functions that return nothing. Code that reads a counter of tqdm, such as `bar.n`, works with bars on,
# and also with `tqdm(disable=True)`, but gets a function where a user has turned bars off: `bar.n < 5` is a TypeError.
#
# Seen: "shown: 2", "disabled by argument: 0", "disabled by the user: function"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
from transformers.utils import logging


def counter(**settings):
    bar = logging.tqdm(total=5, **settings)
    bar.update(2)
    return bar.n


logging.enable_progress_bar()
print("shown:", counter())
print("disabled by argument:", counter(disable=True))
logging.disable_progress_bar()
print("disabled by the user:", type(counter()).__name__)
PYTHON
diff "$folder/seen" - <<'SEEN'
shown: 2
disabled by argument: 0
disabled by the user: function
SEEN
