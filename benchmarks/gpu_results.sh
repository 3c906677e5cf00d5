#!/usr/bin/env bash
# Every figure of docs/results/gpu.md, one JSON file each: bash benchmarks/gpu_results.sh DIRECTORY [PART ...]
# Parts: decode plus batch prompt context kernels; all of them take about fifteen minutes on an H200. Each command has a limit
# of its own, so that one that hangs does not cost the others.
set -uo pipefail
out=${1:?say where the results go}
parts=${*:2}
bench() { timeout "$1" python3 -c "from kvframe.cli import main; main()" bench "${@:2}"; }
wanted() { [[ -z $parts || " $parts " == *" $1 "* ]]; }

if wanted decode; then
    bench 420 decode --context 131072 --prefill-chunk 0 --json "$out/decode-128k.json" --policies \
        louiskv,window,louiskv@0,louiskv@1,quest,louiskv+compile,window+compile,dynamic-cache,offloaded-cache
fi
if wanted plus; then
    bench 480 decode --context 131072 --prefill-chunk 0 --json "$out/decode-plus-128k.json" --policies \
        "louiskv,louiskv-plus,louiskv-plus:missed_share=none,louiskv-plus:missed_share=none:bits=none,\
louiskv-plus:missed_share=none:estimate=false,louiskv-plus:estimate=false,louiskv-plus:missed_share=none:run_length=4,\
louiskv-plus:oversample=4,louiskv-plus@0,louiskv@1,louiskv-plus@1,louiskv+compile,louiskv-plus+compile,\
louiskv-plus:missed_share=none+compile"
fi
if wanted batch; then
    bench 110 decode --context 32768 --batch-size 8 --policies louiskv,dynamic-cache --json "$out/decode-8x32k.json"
    bench 60 decode --context 32768 --batch-size 8 --policies louiskv --dense-layers "" \
        --json "$out/decode-8x32k-none.json"
fi
if wanted prompt; then
    bench 60 prefill --contexts 32768 --chunks 0 --repeats 5 --json "$out/prefill-32k.json"
    bench 120 prefill --contexts 131072 --chunks 0 --repeats 2 --json "$out/prefill-128k.json"
fi
if wanted context; then
    timeout 100 python3 benchmarks/long_context.py | tee "$out/long-context.txt"
fi
if wanted kernels; then
    bench 120 kernels --json "$out/kernels.json"
    bench 45 gather --json "$out/gather.json" > "$out/gather.txt"
fi
