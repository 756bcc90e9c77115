#!/usr/bin/env bash
# All of the benchmark that needs a GPU, in one command:
#
#   LLAMAGEN=FOLDER MIRAI=FOLDER launch/bench_gpu.sh OUT
#
# The two folders (whole paths) are clones of FoundationVision/LlamaGen and y0urOy/Mirai-Code; without
# them the official code is not run beside ours. OUT receives gpu_*.json, gpu_*.png, sampler.json and the logs.
# PYTHON is the interpreter (default: python), PEER_PYTHON the one with torch (default: the same).
# More arguments go to the benchmark of the train step: --config.batch_size=128 on a smaller card.
set -euo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
  echo "usage: [LLAMAGEN=FOLDER MIRAI=FOLDER] launch/bench_gpu.sh OUT [--config.field=value ...]" >&2
  exit 1
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # the official code uses one
# Two programs share the card: neither may take all of its memory at its start.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
peer=()
if [ -n "${LLAMAGEN:-}" ]; then
  peer=(--peer "${PEER_PYTHON:-$python} tests/official_peer.py --llamagen=$LLAMAGEN --mirai=${MIRAI:-}")
fi
config=configs/mirai_e.py:imagenet_b

echo "== cuDNN's attention against XLA's"
if "$python" -c "import pytest" 2>/dev/null; then
  MIRAI_TEST_PLATFORM=$JAX_PLATFORMS "$python" -m pytest -q tests/attention_test.py -k cudnn_is_close 2>&1 |
    tee "$out/attention.log" || echo "FAILED: cuDNN's attention; the benchmark goes on"
else
  echo "pytest is not installed: not run"
fi
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
  tee "$out/step_loop.log" || echo "FAILED: the loop; the benchmark goes on"
echo "== sampling: 1,000 images, 125 at once, guidance 2"
"$python" -m mirai_jax.bench --config="$config" --measure=sampler --sample_batch="${SAMPLE_BATCH:-125}" --repeats=8 \
  --json="$out/sampler.json" "${peer[@]}" 2>&1 | tee "$out/sampler.log"
