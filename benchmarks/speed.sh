#!/usr/bin/env bash
# The rows of speed and cost: results/speed.jsonl, store.jsonl and training_speed.jsonl. What the files hold already is not
# measured again, so it can be stopped and started anew. On the CPU, about ten minutes on two cores that do nothing else;
# DEVICE=cuda measures the shapes of large readers instead, each command in a few minutes. TASKS names some of the tasks.
set -euo pipefail
DEVICE=${DEVICE:-cpu} RESULTS=${RESULTS:-benchmarks/results} NUTGRAF=${NUTGRAF:-nutgraf} PYTHON=${PYTHON:-python}
S=$RESULTS/speed.jsonl T=$RESULTS/training_speed.jsonl

account() { $NUTGRAF bench speed --device "$DEVICE" --out "$S" "$@"; }

cpu_pretrained() { # a pretrained reader; its package must be installed
  account --reader reader-smollm2 --dtype bfloat16 --context 2048 --passages 10 --compressor icae-smollm2@16 --slots 16 \
    --repeats 3
}

cpu_kv() { # keys and values from the store at 4x, and all pairs precomputed (1x)
  account --reader reader-smollm2 --dtype bfloat16 --context 2048 --passages 10 --compressor kv-match@1,4 --repeats 3
}

cpu_large() { # a reader of the 1B shape, float32, 5 GB
  account --shape llama-1b --context 256 --passages 2 --slots 16 --repeats 1 --decode-tokens 4
}

cpu_compress() { # encoders of the pretrained reader on 16 passages of mixed lengths
  $NUTGRAF bench compress --device cpu --repeats 3 --passages 16 --out "$S" --compressor icae-smollm2@4 --compressor xrag-smollm2
}

cpu_training() { # a step over its bare passes; memory of the losses
  $NUTGRAF bench training --device cpu --shape llama-mini --steps 16 --out "$T"
  $NUTGRAF bench training --device cpu --shape llama-mini --steps 16 --compressor gist --compressor mean-pool --objective lm --out "$T"
  $NUTGRAF bench training --device cpu --memory 2048 --memory 8192 --out "$T"
}

cpu_store() { # reading from the store, by itself and in front of an answer
  grep -qs '"state": "answer"' "$RESULTS/store.jsonl" ||
    $PYTHON -m nutgraf.benchmarks.speed.store --reader reader-smollm2 --batch 10 --repeats 5 --out "$RESULTS/store.jsonl"
}

cuda_8b() {
  account --shape llama-8b --context 16384 --passages 32 --slots 4 --slots 16 --slots 32 --slots 512
  account --shape llama-8b --context 4096 --passages 10 --slots 16 --batch 1 --batch 4 --batch 16 --batch 64
  account --shape llama-8b --context 16384 --passages 32 --slots 4 --slots 16 --interface kv
}

cuda_contexts() {
  account --shape llama-8b --context 2048 --context 8192 --context 32768 --passages 16 --passages 64
}

cuda_small() {
  for shape in llama-1b llama-3b; do
    account --shape "$shape" --context 2048 --context 16384 --passages 32 --slots 4 --slots 16 --slots 32 --slots 512
  done
}

cuda_methods() {
  account --shape llama-8b --context 4096 --passages 16 --compressor icae@16 --compressor mean-pool@16 --compressor gist@16
  for method in icae mean-pool gist; do
    $NUTGRAF bench compress --device cuda --shape llama-8b --compressor "$method@16" --passages 64 --out "$S"
  done
}

cuda_training() {
  $NUTGRAF bench training --device cuda --shape llama-1b --steps 16 --out "$T"
  $NUTGRAF bench training --device cuda --memory 2048 --memory 8192 --memory 32768 --out "$T"
}

if [ "$DEVICE" = cpu ]; then
  tasks=(pretrained kv compress training store large)
else
  tasks=(8b contexts small methods training)
fi
for task in ${TASKS:-${tasks[@]}}; do
  "${DEVICE%%:*}_$task"
done
