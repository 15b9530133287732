#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# Ray 2.60.0: whether `ray start --head` asks for a token depends on what was run before. `ray.init()`, and with it
# `serve run`, makes ~/.ray/auth_token where there is none. From then on `ray start` in that home turns authentication by
# token on, for itself and the processes that it starts. The commands that talk to the dashboard decide by the variable
# RAY_AUTH_MODE alone, so the next command in the same shell, such as `serve status` or `serve deploy`, is refused.
# What to do: export RAY_AUTH_MODE=token before all of them, and copy the file to every node.
#
# Seen: `serve status` after `ray start --head` answers in a new home, is refused after one `ray.init()` in between, and
# answers with RAY_AUTH_MODE=token.
set -euo pipefail
folder=$(mktemp -d)
stop() { "$folder/venv/bin/ray" stop --force > "$folder/log" 2>&1 || true; }
trap 'stop; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[serve]==2.60.0'
mkdir "$folder/home"
export HOME="$folder/home" RAY_USAGE_STATS_ENABLED=0
export PATH="$folder/venv/bin:$PATH"
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
cd "$folder"

# prints what `serve status` says after `ray start --head`
status() {
    ray start --head --num-cpus 1 > log 2>&1
    if serve status > status 2>&1; then
        echo "$1: answered"
    elif grep -q 'Unauthorized: Missing authentication token' status; then
        echo "$1: refused, no token"
    else
        cat status
    fi
    stop
}

{
    status "in a new home"
    python - > log 2>&1 <<'PYTHON'
import ray

ray.init(num_cpus=1)
ray.shutdown()
PYTHON
    test -e "$HOME/.ray/auth_token" && echo "ray.init made a token"
    status "after ray.init"
    RAY_AUTH_MODE=token status "with RAY_AUTH_MODE=token"
} | tee seen
diff seen - <<'SEEN'
in a new home: answered
ray.init made a token
after ray.init: refused, no token
with RAY_AUTH_MODE=token: answered
SEEN
