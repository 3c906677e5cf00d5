#!/usr/bin/env bash
# Tables of KL to full attention, policies side by side on one GPU, a process each, JOBS at a time:
# bash benchmarks/policies.sh MODEL DIRECTORY CONTEXT BUDGETS [POLICY ...]
# Leaves policies-CONTEXT.jsonl and policies-CONTEXT.md in DIRECTORY. An H100 takes a few minutes for 8K.
set -uo pipefail
model=${1:?a directory with a model} out=${2:?where the results go} context=${3:?tokens} budgets=${4:?such as 512,1024}
read -r -a policies <<<"${*:5}"
[ "${#policies[@]}" -gt 0 ] || policies=(oracle_topk louiskv clusterkv retroinfer quest arkvale h2o snapkv window)
export OMP_NUM_THREADS=1

parts=$(mktemp -d)
kvframe() { python3 -c "from kvframe.cli import main; main()" "$@"; }
one() {
    kvframe compare --model "$model" --context "$context" --budgets "$budgets" --policies "$1" --seed "${SEED:-0}" \
        --dtype float32 ${TEXT:+--text "$TEXT"} ${TRIGGERS:+--triggers "$TRIGGERS"} --output "$parts/$1.jsonl" \
        >"$parts/$1.log" 2>&1 || { echo "$1:"; grep -m 3 Error "$parts/$1.log"; }
}
for policy in "${policies[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-5}" ]; do wait -n; done
    one "$policy" &
done
wait
for policy in "${policies[@]}"; do cat "$parts/$policy.jsonl"; done >"$out/policies-$context.jsonl"
kvframe compare --from "$out/policies-$context.jsonl" --markdown "$out/policies-$context.md"
