#!/usr/bin/env bash
# The rows of results/tradeoff.jsonl: every shipped method at every ratio, on all sets. Two sets are measured at a time, one
# thread each. What the file holds already, measured by the same code and weights on the same questions, is left out, so it
# can be stopped and started again. LIMIT (questions a set), DATA (folder of the sets) and OUT may be set.
set -euo pipefail
export OMP_NUM_THREADS=1 LIMIT=${LIMIT:-150} DATA=${DATA:-data} OUT=${OUT:-benchmarks/results/tradeoff.jsonl}
export NUTGRAF=${NUTGRAF:-nutgraf}

single() { # a set of one passage a question: all methods, then controls
  local bench="$NUTGRAF bench quality $DATA/qa_dev_$1.jsonl.xz --half report --limit $LIMIT --ttft 4 --resume --out $OUT"
  $bench --no-shuffled --baselines-of mean-pool \
    --baseline truncate --baseline extract --baseline extract-embedder --baseline random-tokens \
    --compressor mean-pool-small@2,4,8,16,32,512 --compressor icae-small@4,8,16 --compressor gist-small@4,8,16 \
    --compressor 500x-small@4,8,16 --compressor autocompressor-small@4,8,16 --compressor pisco-small@4,8,16 \
    --compressor xrag-small --compressor llmlingua2-small@2,4 --compressor llmlingua@2,4 --compressor longllmlingua@2,4 \
    --compressor selective-context@2,4 --compressor salient-pool-small@2,4,8,16,32,512 \
    --compressor salient-pool-query-small@2,4,8,16,32,512 --compressor llmlingua2-query-small@2,4
  $bench --baseline none --compressor mean-pool-small@4,512 --compressor gist-small@4 --compressor xrag-small \
    --compressor salient-pool-small@4,512 --compressor salient-pool-query-small@4,512
}

several() { # a set with distractors: set, passages a question
  $NUTGRAF bench quality "$DATA/qa_dev_$1.jsonl.xz" --passages "$2" --half report --limit $((LIMIT / 3)) --ttft 2 --resume \
    --out "$OUT" --no-shuffled --baselines-of mean-pool --baseline truncate --baseline fewer-passages \
    --baseline extract-embedder --compressor mean-pool-small@4,16 --compressor gist-small@4 --compressor llmlingua2-small@4 \
    --compressor salient-pool-small@4 --compressor salient-pool-query-small@4,16
}

task() { case $1 in *:*) several "${1%:*}" "${1#*:}" ;; *) single "$1" ;; esac; }

export -f single several task
# the longest first
tasks=(quoref nq_10:20 nq_10:10 fairytaleqa multispanqa squad_10:10 squad nq squad_10:5 nq_10:5 qamr)
printf '%s\n' "${TASKS:-${tasks[@]}}" | tr ' ' '\n' | xargs -P 2 -I{} bash -c 'task {}'
