#!/usr/bin/env bash
# The rows of speed and cost: results/speed.jsonl, store.jsonl and training_speed.jsonl. What the files hold already is not
# measured again, so it can be stopped and started anew. On the CPU, about ten minutes on two cores that do nothing else;
# DEVICE=cuda measures the shapes of large readers instead, each command in a few minutes. TASKS names some of the tasks.
set -euo pipefail
DEVICE=${DEVICE:-cpu} RESULTS=${RESULTS:-benchmarks/results} NUTGRAF=${NUTGRAF:-nutgraf} PYTHON=${PYTHON:-python}
S=$RESULTS/speed.jsonl T=$RESULTS/training_speed.jsonl

account() { $NUTGRAF bench speed --device "$DEVICE" --out "$S" "$@"; }

cpu_contexts() { # the shipped reader, 512 to 3,840 tokens in 130 slots
  account --reader reader-small --context 2048 --passages 10 --compressor mean-pool-small@16 --slots 16 --slots 32 \
    --repeats 9 --warmup 2
  for at in "512 4" "1024 8" "3840 30"; do
    set -- $at
    account --reader reader-small --context "$1" --passages 10 --compressor "mean-pool-small@$2" --repeats 9 --warmup 2
  done
}

cpu_batches() { # several prompts at a time
  account --reader reader-small --context 1024 --passages 10 --compressor mean-pool-small@16 --repeats 3 \
    --batch 1 --batch 4 --batch 16 --batch 64
}

cpu_pretrained() { # a pretrained reader; its package must be installed
  account --reader reader-smollm2 --dtype bfloat16 --context 2048 --passages 10 --compressor icae-smollm2@16 --slots 16 \
    --repeats 3
}

cpu_large() { # a reader of the 1B shape, float32, 5 GB
  account --shape llama-1b --context 256 --passages 2 --slots 16 --repeats 1 --decode-tokens 4
}

cpu_compress() { # every shipped encoder on 64 passages of mixed lengths
  $NUTGRAF bench compress --device cpu --repeats 3 --out "$S" --compressor mean-pool-small@4 --compressor icae-small@4 \
    --compressor gist-small@4 --compressor 500x-small@4 --compressor autocompressor-small@4 --compressor pisco-small@4 \
    --compressor xrag-small
}

cpu_training() { # a step over its bare passes; memory of the losses
  $NUTGRAF bench training --device cpu --steps 16 --out "$T"
  $NUTGRAF bench training --device cpu --steps 16 --compressor gist --compressor mean-pool --objective lm --out "$T"
  $NUTGRAF bench training --device cpu --memory 2048 --memory 8192 --out "$T"
}

cpu_store() { # reading from the store, by itself and in front of an answer
  grep -qs '"state": "answer"' "$RESULTS/store.jsonl" ||
    $PYTHON -m nutgraf.benchmarks.speed.store --reader reader-small --out "$RESULTS/store.jsonl"
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
  tasks=(contexts batches pretrained compress training store large)
else
  tasks=(8b contexts small methods training)
fi
for task in ${TASKS:-${tasks[@]}}; do
  "${DEVICE%%:*}_$task"
done
