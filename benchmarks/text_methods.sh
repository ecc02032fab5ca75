#!/usr/bin/env bash
# The rows of results/text_methods.jsonl: methods that make a shorter text, on a pretrained reader in bfloat16. Rows that the
# file holds already (same code, weights and questions) are left out, so it can be stopped and started again.
# LIMIT (questions per set), DATA (folder of the sets), OUT, SETS, HALF (report, tune), PARTS (several, asked, once) and TRAINED
# (folders of trained pruners) may be set.
set -euo pipefail
LIMIT=${LIMIT:-40} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/text_methods.jsonl} NUTGRAF=${NUTGRAF:-nutgraf}
HALF=${HALF:-report} TRAINED=${TRAINED:-}

quality() { # set, further arguments
  $NUTGRAF bench quality "$DATA/qa_dev_$1.jsonl.xz" --reader reader-smollm2 --dtype bfloat16 --half "$HALF" --limit "$LIMIT" \
    --no-shuffled --no-likelihood --resume --out "$OUT" "${@:2}"
}

several() { # ten passages: trained pruners give all of them one budget
  local more=()
  for each in $TRAINED; do more+=(--compressor "$each:pooled=true@4"); done
  quality "$1_10" --baseline extract --baselines-of llmlingua2-query "${more[@]}" --compressor llmlingua2-query-small@4
}

asked() { # for each question, by a classifier of 22 million parameters, the reader or the embedder
  local more=()
  for each in $TRAINED; do more+=(--compressor "$each@4,8"); done
  quality "$1" --baseline extract --baselines-of llmlingua2-query "${more[@]}" \
    --compressor llmlingua2-query-small@4,8 --compressor token-elimination@4,8 --compressor prompt-saw@4,8 \
    --compressor exit@4,8 --compressor longllmlingua@4
}

once() { # before any question
  quality "$1" --baseline truncate --baselines-of llmlingua2 --compressor semantic@2,4 --compressor llmlingua2-small@2,4 \
    --compressor prompt-saw:query_aware=false@2,4 --compressor selective-context@4
}

for part in ${PARTS:-several asked once}; do
  for set in ${SETS:-nq squad}; do "$part" "$set"; done
done
