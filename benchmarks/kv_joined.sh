#!/usr/bin/env bash
# The rows of results/kv_joined.jsonl: several passages, each compressed on its own and read together, on a pretrained reader in
# bfloat16, beside their texts read jointly, no context, and text of equal size.
# LIMIT (questions per set), DATA (folder of the sets), OUT, SETS and PASSAGES may be set.
set -euo pipefail
LIMIT=${LIMIT:-100} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/kv_joined.jsonl}

for passages in ${PASSAGES:-5 10}; do
  for set in ${SETS:-nq squad}; do
    ${PYTHON:-python} -m nutgraf.benchmarks.studies.kv_joined "$DATA/qa_dev_${set}_10.jsonl.xz" --passages "$passages" \
      --limit "$LIMIT" --out "$OUT"
  done
done
