#!/usr/bin/env bash
# Every figure of docs/results/gpu.md, one JSON file each: bash benchmarks/gpu_results.sh DIRECTORY
# Takes about nine minutes on an H200; each part has a limit of its own, so that one that hangs does not cost the others.
set -uo pipefail
out=${1:?say where the results go}
bench() { timeout "$1" python3 -c "from kvframe.cli import main; main()" bench "${@:2}"; }
limited() { timeout "$1" "${@:2}"; }

bench 240 decode --context 131072 --prefill-chunk 0 --json "$out/decode-128k.json" \
    --policies louiskv,window,louiskv@0,louiskv@1,quest,louiskv+compile,dynamic-cache,offloaded-cache
limited 70 python3 benchmarks/long_context.py | tee "$out/long-context.txt"
bench 70 decode --context 32768 --batch-size 8 --policies louiskv,dynamic-cache --json "$out/decode-8x32k.json"
bench 45 decode --context 32768 --batch-size 8 --policies louiskv --dense-layers "" --json "$out/decode-8x32k-none.json"
bench 90 prefill --contexts 32768,131072 --chunks 0 --repeats 1 --json "$out/prefill.json"
bench 45 kernels --json "$out/kernels.json"
bench 30 gather --json "$out/gather.json" > "$out/gather.txt"
