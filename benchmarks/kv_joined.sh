#!/usr/bin/env bash
# The rows of results/kv_joined.jsonl: several passages, each compressed on its own and joined, on a pretrained reader in bfloat16.
# The full text reads them jointly. Beside kv-match: its first REREAD tokens of every passage read again, and text of equal size.
# Rows that the file holds already are left out, so it can be stopped and started again.
# LIMIT (questions per set), DATA (folder of the sets), OUT, SETS, PASSAGES, RATIOS, REREAD and HALF may be set.
set -euo pipefail
LIMIT=${LIMIT:-100} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/kv_joined.jsonl} NUTGRAF=${NUTGRAF:-nutgraf}
RATIOS=${RATIOS:-1,2,4,8} # 1: all pairs precomputed

for passages in ${PASSAGES:-5 10}; do
  for set in ${SETS:-squad nq}; do
    lines=(--compressor "kv-match@$RATIOS")
    for tokens in ${REREAD:-4 8}; do
      lines+=(--compressor "kv-match:reread=$tokens@$RATIOS")
    done
    $NUTGRAF bench quality "$DATA/qa_dev_${set}_10.jsonl.xz" --passages "$passages" --reader reader-smollm2 --dtype bfloat16 \
      --half "${HALF:-report}" --limit "$LIMIT" --no-shuffled --baseline "${BASELINE:-truncate}" --resume --out "$OUT" "${lines[@]}"
  done
done
