#!/usr/bin/env bash
# Tables of KL to full attention, policies side by side on one GPU, a process each:
# bash benchmarks/policies.sh MODEL DIRECTORY CONTEXT BUDGETS [POLICY ...]
# Leaves policies-CONTEXT.jsonl and policies-CONTEXT.md in DIRECTORY. An H100 takes a few minutes for 8K.
set -uo pipefail
model=${1:?a directory with a model} out=${2:?where the results go} context=${3:?tokens} budgets=${4:?such as 512,1024}
policies=${*:5}
: "${policies:=oracle_topk louiskv clusterkv retroinfer quest arkvale h2o snapkv window}"
compare() { python3 -c "from kvframe.cli import main; main()" compare "$@"; }
export OMP_NUM_THREADS=1

parts=$(mktemp -d)
for policy in $policies; do
    timeout "${LIMIT:-540}" python3 -c "from kvframe.cli import main; main()" compare --model "$model" \
        --context "$context" --budgets "$budgets" --policies "$policy" --seed "${SEED:-0}" --dtype float32 \
        ${TEXT:+--text "$TEXT"} ${TRIGGERS:+--triggers "$TRIGGERS"} --output "$parts/$policy.jsonl" \
        >"$parts/$policy.log" 2>&1 || { echo "$policy:"; tail -n 3 "$parts/$policy.log"; } &
done
wait
for policy in $policies; do cat "$parts/$policy.jsonl"; done >"$out/policies-$context.jsonl"
compare --from "$out/policies-$context.jsonl" --markdown "$out/policies-$context.md"
