#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# Every figure of a GPU in one command of at most nine minutes, what matters most first:
#
#     benchmarks/gpu.sh OUT             # tables in the folder OUT, one for each stage
#     benchmarks/gpu.sh OUT --smoke     # every stage with tiny shapes on a CPU, to try the script itself
#
# Each stage has its own limit of time and writes its table row by row, so an interrupted run keeps what it has.
set -u

usage="usage: benchmarks/gpu.sh OUT [--smoke]"
out=${1:?$usage}
smoke=${2:-}
if [[ -n $smoke && $smoke != --smoke ]]; then
    echo "$usage" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
mkdir -p "$out" || exit 1
failed=0

if [[ -z $smoke ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "torch sees no GPU here. Try the script itself with: benchmarks/gpu.sh $out --smoke" >&2
    exit 1
fi

# stage NAME SECONDS COMMAND...: the output of the command goes to OUT/NAME.log
stage() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [[ -n $smoke ]] && limit=300
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    local tables=no
    [[ -s $out/$name.md ]] && tables=a
    echo "$name: exit code $code after $((SECONDS - began)) s of $limit, $tables table"
    # a stage that ran out of time but has rows has done its work
    [[ $code -eq 0 || ($code -eq 124 && $tables == a) ]] || failed=1
}

if [[ -z $smoke ]]; then
    models_both="b l" image=224 large=256 small="1 8" degrees="16 8 4 12" rounds=15 dtype=bfloat16
    compile=(--compile --compile_mode default)
    graphs=(--compile --compile_mode reduce-overhead)
    parts=()
else
    export CUDA_VISIBLE_DEVICES=
    models_both="t" image=32 large=2 small="1" degrees="1" rounds=1 dtype=float32
    # one layer's worth of Inductor takes minutes on a CPU, and is not what this tries
    compile=(--compile --compile_backend eager)
    graphs=(--compile --compile_backend eager)
    parts=(--batch_size 1 --heads 2 --head_dim 16 --tokens 13 --r 3 --dtype float32)
fi

# inference NAME SECONDS KERNELS ARGUMENTS...
inference() {
    local name=$1 limit=$2 kernels=$3
    shift 3
    stage "$name" "$limit" env TOCOM_KERNELS="$kernels" "$python" "$here/inference.py" --image_sizes $image \
        --dtypes $dtype --rounds $rounds --without_reference --without_plot --output "$out/$name" "$@"
}
first=${models_both%% *}
last=${models_both##* }

# the limits add up to 515 seconds
inference 1_compiled_first 100 1 --models "$first" --batch_sizes $large --r $degrees "${compile[@]}"
inference 2_compiled_last 130 1 --models "$last" --batch_sizes $large --r $degrees "${compile[@]}"
inference 3_compiled_first_without_kernels 60 0 --models "$first" --batch_sizes $large --r $degrees "${compile[@]}"
inference 4_compiled_last_without_kernels 65 0 --models "$last" --batch_sizes $large --r $degrees "${compile[@]}"
inference 5_eager 45 1 --models $models_both --batch_sizes $large --r $degrees
inference 6_cuda_graphs 60 1 --models "$first" --batch_sizes $small --r $degrees "${graphs[@]}"
stage 7_attention 30 "$python" "$here/gpu_parts.py" attention --output "$out/7_attention.md" "${parts[@]}"
stage 8_kernels 25 "$python" "$here/gpu_parts.py" kernels --output "$out/8_kernels.md" "${parts[@]}"

echo "The tables are in $out."
exit $failed
