#!/usr/bin/env bash
# The rows of results/kv_match.jsonl: keys and values matched without training, on a pretrained reader in float32.
# Rows that the file holds already (same code, weights and questions) are left out, so it can be stopped and started again.
# LIMIT (questions per set), DATA (folder of the sets), OUT, SETS, RATIOS and PARTS (main, choices, several) may be set.
set -euo pipefail
LIMIT=${LIMIT:-300} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/kv_match.jsonl} NUTGRAF=${NUTGRAF:-nutgraf}
RATIOS=${RATIOS:-1,2,4,8,16} # 1: all pairs precomputed

quality() { # set, further arguments
  $NUTGRAF bench quality "$DATA/qa_dev_$1.jsonl.xz" --reader reader-smollm2 --dtype float32 --half report --limit "$LIMIT" \
    --no-shuffled --baseline none --resume --out "$OUT" "${@:2}"
}

choices() { # other scores, budgets and repairs; each name changes what it says and keeps the rest
  for changed in repair=none repair=bias budget=per-layer budget=uniform budget=uniform,repair=none \
    score=kvzip,budget=uniform,repair=none score=kvzip score=keydiff,repair=none score=expected,repair=none \
    score=snapkv,budget=uniform,repair=none score=random,repair=none score=first,repair=none; do
    quality "$1" --compressor "kv-match:$changed@${RATIOS#1,}"
  done
}

for set in ${SETS:-squad nq}; do
  for part in ${PARTS:-main choices several}; do
    case $part in
    main) quality "$set" --compressor "kv-match@$RATIOS" ;;
    choices) choices "$set" ;;
    several) quality "${set}_10" --passages 5 --compressor "kv-match@$RATIOS" ;;
    esac
  done
done
