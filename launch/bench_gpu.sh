#!/usr/bin/env bash
# The part of the benchmark that needs a GPU, in one command:
#
#   LLAMAGEN=FOLDER MIRAI=FOLDER launch/bench_gpu.sh OUT [--config.batch_size=128 ...]
#
# The two folders (absolute paths) are clones of FoundationVision/LlamaGen and y0urOy/Mirai-Code; without
# them the official code is not timed. OUT receives gpu_*.json, gpu_*.png, sampler.json and the logs.
# PYTHON is the interpreter (default: python), PEER_PYTHON the one with torch (default: the same).
# Further arguments go to the benchmark of the train step.
set -euo pipefail
[ $# -gt 0 ] && [[ $1 != -* ]] || { echo "usage: launch/bench_gpu.sh OUT [--config.field=value ...]" >&2 && exit 1; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # the official code uses one
# Two programs share the card: neither may preallocate its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
peer=()
[ -z "${LLAMAGEN:-}" ] ||
  peer=(--peer "${PEER_PYTHON:-$python} tests/official_peer.py --llamagen=$LLAMAGEN --mirai=${MIRAI:-}")
config=configs/mirai_e.py:imagenet_b

echo "== cuDNN's attention against XLA's"
MIRAI_TEST_PLATFORM=$JAX_PLATFORMS "$python" -m pytest -q tests/attention_test.py -k cudnn_is_close 2>&1 |
  tee "$out/attention.log" || echo "FAILED: cuDNN's attention; the benchmark continues"
# Officially teachers run in float32, outside of autocast; in bfloat16 they are faster.
for dtype in float32 bfloat16; do
  echo "== train step: LlamaGen, Mirai-E, Mirai-I; batch 256, bfloat16, teachers $dtype"
  "$python" -m mirai_jax.bench --config="$config" --compare --measure=step --measure=parts \
    --config.teacher.dtype="$dtype" --repeats=10 --json="$out/gpu_$dtype.json" \
    --figure="$out/gpu_$dtype.png" "${peer[@]}" "$@" 2>&1 | tee "$out/step_$dtype.log"
done
echo "== LlamaGen's step as a loop over its blocks, as XL has it"
"$python" -m mirai_jax.bench --config=configs/llamagen.py:imagenet_b --measure=step --repeats=10 \
  --config.model.unroll=1 --config.model.remat=dots --json="$out/gpu_loop.json" 2>&1 |
  tee "$out/step_loop.log" || echo "FAILED: the loop; the benchmark continues"
echo "== sampling: 1,000 images, 125 at once, guidance 2"
"$python" -m mirai_jax.bench --config="$config" --measure=sampler --sample_batch="${SAMPLE_BATCH:-125}" --repeats=8 \
  --json="$out/sampler.json" "${peer[@]}" 2>&1 | tee "$out/sampler.log"
