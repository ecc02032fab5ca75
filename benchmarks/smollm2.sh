#!/usr/bin/env bash
# The rows of results/smollm2.jsonl: a pretrained reader, SmolLM2 with the shipped adapter, in bfloat16. What the file holds
# already, measured by the same code and weights on the same questions, is left out, so it can be stopped and started again.
# LIMIT (questions a set), DATA (folder of the sets), OUT, TASKS and PARTS (soft, text) may be set.
set -euo pipefail
LIMIT=${LIMIT:-100} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/smollm2.jsonl} NUTGRAF=${NUTGRAF:-nutgraf}

quality() { # set, further arguments
  $NUTGRAF bench quality "$DATA/qa_dev_$1.jsonl.xz" --reader reader-smollm2 --dtype bfloat16 --half report --limit "$LIMIT" \
    --resume --out "$OUT" --ttft 2 "${@:2}"
}

soft() { # slots, and plain text of their budgets
  quality "$1" --baseline none --compressor icae-smollm2@2,4 --compressor xrag-smollm2
  quality "$1" --no-shuffled --baseline truncate --baseline extract --compressor salient-pool-query-smollm2@2,4,8,16
}

text() { # shorter texts
  quality "$1" --no-shuffled --baseline none --compressor llmlingua2-small@2,4 --compressor llmlingua2-query-small@2,4,8,16 \
    --compressor llmlingua@2,4 --compressor longllmlingua@2,4 --compressor selective-context@2,4
}

several() { # ten passages a question
  quality "$1" --no-shuffled --baseline truncate --baseline fewer-passages --baseline extract-embedder \
    --compressor salient-pool-query-smollm2@4
}

for task in ${TASKS:-squad nq qamr quoref fairytaleqa squad_10 nq_10}; do
  case $task in
    *_10) several "$task" ;;
    *) for part in ${PARTS:-soft text}; do "$part" "$task"; done ;;
  esac
done
