#!/usr/bin/env bash
# The rows of results/kv_match.jsonl: keys and values kept without training, on a pretrained reader in bfloat16, beside the other
# methods that compress once. Rows that the file holds already (same code, weights and questions) are left out, so it can be
# stopped and started again.
# LIMIT (questions per set), DATA (folder of the sets), OUT, SETS, RATIOS, HALF (report, tune), PARTS (main, others, slots,
# choices, surrogate) may be set.
set -euo pipefail
LIMIT=${LIMIT:-60} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/kv_match.jsonl} NUTGRAF=${NUTGRAF:-nutgraf}
RATIOS=${RATIOS:-1,2,4,8,16} HALF=${HALF:-report} # 1: all pairs precomputed

quality() { # set, further arguments
  $NUTGRAF bench quality "$DATA/qa_dev_$1.jsonl.xz" --reader reader-smollm2 --dtype bfloat16 --half "$HALF" --limit "$LIMIT" \
    --no-shuffled --no-likelihood --resume --out "$OUT" "${@:2}"
}

others() { # shorter texts, and the passage's first tokens
  quality "$1" --baseline truncate --baselines-of llmlingua2 --compressor "llmlingua2-small@${RATIOS#1,}"
}

slots() { # trained ones
  quality "$1" --baseline none --compressor icae-smollm2@2,4 --compressor "mean-pool-smollm2@${RATIOS#1,}"
}

choices() { # other scores, budgets and repairs; passages are read once for all of them
  ${PYTHON:-python} -m nutgraf.benchmarks.studies.kv_match choices "$DATA/qa_dev_$1.jsonl.xz" --limit "$LIMIT" --out "$OUT"
}

surrogate() { # scores of one pass, without repair and with that of a few questions, beside as few questions alone
  quality "$1" --compressor "kv-match:probes=8@${RATIOS#1,}" --compressor "kv-surrogate-smollm2@${RATIOS#1,}" \
    --compressor "kv-surrogate-smollm2:repair=bias+values@${RATIOS#1,}"
}

for part in ${PARTS:-main others slots choices}; do
  for set in ${SETS:-nq squad qamr fairytaleqa quoref}; do
    case $part in
    main) quality "$set" --baseline none --compressor "kv-match@$RATIOS" ;;
    others) others "$set" ;;
    slots) slots "$set" ;;
    surrogate) surrogate "$set" ;;
    choices) case $set in squad | nq) choices "$set" ;; esac ;;
    esac
  done
done
