#!/usr/bin/env bash
# Every check that wants a GPU, one after another within a budget of time, and one report of them.
#
#     benchmarks/gpu.sh [OUTPUT_FOLDER]        default: $OUT, else runs/gpu
#
# Writes OUTPUT_FOLDER/report.md, made to be pasted into benchmarks/RESULTS.md, with a JSON file and
# a log a step. A step that fails or runs out of its time is reported, and the next one starts.
#
# Python: $PYTHON, else .venv/bin/python, else python3, the first that has jax with CUDA. What else
# is missing there is installed from the wheels in $WHEELS (a folder), else from the package index;
# without either, the report says what is missing. The benchmarks need ml-collections alone beside
# jax, flax and optax; the quick start needs all that setup.py names.
#
#     BUDGET=720     seconds for everything; steps that no time is left for are reported as such
#     ONLY=REGEX     those steps alone, added to the report of the folder
#     DRY=1          the same steps on tiny sizes, on any platform: a test of this script

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

out=${1:-${OUT:-runs/gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
budget=${BUDGET:-720}
dry=${DRY:-}
began=$SECONDS
steps=$out/steps.tsv
only=${ONLY:-}
if [[ -z $only ]]; then : >"$steps"; else touch "$steps"; fi

left() { echo $((budget - (SECONDS - began))); }

# step NAME SECONDS COMMAND...: runs it within that time, or what is left of the budget.
step() {
    local name=$1 limit=$2 start=$SECONDS status state
    shift 2
    if [[ ! $name =~ $only && $name != install ]]; then return; fi
    if [[ -n $dry ]]; then limit=$((limit * 4)); fi  # they are a GPU's
    if (($(left) < limit)); then limit=$(left); fi
    if ((limit < 5)); then
        state="skipped: no time left"
    else
        echo "== $name (at most $limit s): $*"
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        status=$?
        tail -n 25 "$out/$name.log"
        case $status in
            0) state=passed ;;
            124 | 137) state="stopped after $limit s" ;;
            *) state="failed ($status)" ;;
        esac
    fi
    echo "== $name: $state"
    printf '%s\t%s\t%s\n' "$name" "$state" "$((SECONDS - start))" >>"$steps"
}

if [[ -n $dry ]]; then
    platform='True'
    export JAX_PLATFORMS=cpu
else
    platform='jax.default_backend() == "gpu"'
    # Operations inside CUDA graphs are not seen by the profiler: all figures are without graphs.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer="
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
fi

python=
for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python python3; do
    if "$candidate" -c "import sys, jax; sys.exit(not ($platform))" 2>"$out/python.log"; then
        python=$candidate
        break
    fi
    echo "not $candidate: $(tail -n 1 "$out/python.log")"
done
if [[ -z $python && -z $dry ]] && nvidia-smi >/dev/null 2>&1; then
    echo "no python here has jax with CUDA: making .venv-gpu"
    if timeout 240 sh -c 'python3 -m venv .venv-gpu && .venv-gpu/bin/pip install -q -e ".[cuda]"'; then
        python=.venv-gpu/bin/python
    fi
fi
if [[ -z $python ]]; then
    {
        echo "no python with jax on a GPU. Missing: an NVIDIA driver (nvidia-smi), or"
        echo "\`pip install -e '.[cuda]'\` in a python >= 3.11 (give it as PYTHON=...)"
    } | tee "$out/report.md"
    exit 1
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
missing() {
    "$python" - <<'PYTHON'
import importlib.util

names = {"ml_collections": "ml-collections", "tensorflow_datasets": "tensorflow-datasets"}
names |= {"array_record": "array-record", "PIL": "pillow", "orbax": "orbax-checkpoint"}
modules = "absl av array_record einops flax fsspec grain jax matplotlib ml_collections msgpack"
modules += " numpy optax orbax PIL safetensors simplejpeg tensorflow_datasets tqdm"
print(*(names.get(m, m) for m in modules.split() if importlib.util.find_spec(m) is None))
PYTHON
}
lacks=$(missing)
if [[ -n $lacks ]]; then
    site=$(mktemp -d)
    export PYTHONPATH=$PYTHONPATH:$site
    pip=("$python" -m pip install -q --no-compile --target "$site")
    if [[ -n ${WHEELS:-} ]]; then
        step install 60 "${pip[@]}" --no-index --no-deps "$WHEELS"/*.whl
    else
        # shellcheck disable=SC2086  # a list of words
        step install 60 "${pip[@]}" $lacks
    fi
    lacks=$(missing)
    [[ -n $lacks ]] && echo "still missing: $lacks (download wheels elsewhere, give WHEELS=FOLDER)"
fi

if [[ -n $dry ]]; then
    sizes=(--tokens 512 --block 256 --width 32 --seconds 0.05)
    tune=(--tokens 512 --block 256 --width 32 --seconds 0.05)
    timed=3
    small=(--config.model.width=16 --config.model.mlp_width=24 --config.model.encoder_layers=1
        --config.model.decoder_layers=1 --config.video.resolution=32 --config.masking.min_tokens=1
        --config.compute.dtype=float32)
    quick=(--config.train.steps=4 --config.train.eval_every=4 --config.train.checkpoint_every=4
        --config.evaluation.report=False)
    many=2
else
    sizes=(--seconds 0.2)
    tune=(--tokens 16384 --seconds 0.2)
    timed=8
    small=()
    quick=(--config.train.steps=300 --config.train.eval_every=300
        --config.train.checkpoint_every=300 --config.evaluation.report=False)
    many=16
fi

train_step() {
    local name=$1 limit=$2
    shift 2
    step "train-$name" "$limit" "$python" -m benchmarks.train_step \
        --experiment benchmarks/experiments/paper_200m.py --steps "$timed" \
        --json "$out/train-$name.json" ${small[@]+"${small[@]}"} "$@"
}

step check-fused 90 "$python" -m benchmarks.check_attention --backends fused \
    --json "$out/check-fused.json"
step attention 100 "$python" -m benchmarks.attention --json "$out/attention.json" "${sizes[@]}"
train_step fused-dots-1 40 --config.compute.attention=fused --config.compute.remat=dots
train_step fused-attention-4 50 --config.compute.attention=fused --config.compute.remat=attention \
    --config.data.batch_size=4
train_step fused-none-1 40 --config.compute.attention=fused --config.compute.remat=none
train_step fused-lpips-1 40 --config.compute.attention=fused --config.compute.remat=dots \
    --config.loss.lpips_weight=0.1
tiles=blockwise:256x512,blockwise:512x1024,blockwise:1024x1024,blockwise:2048x2048
# Those that XLA compiles for an H200 without spilling registers, forward at least.
tiles+=,blockwise:4096x4096,fused:128x64x8,fused:128x128x8,fused:64x64x4,fused:64x32x4
step tiles 40 "$python" -m benchmarks.attention --backends "$tiles" --json "$out/tiles.json" \
    "${tune[@]}"
train_step fused-dots-4 50 --config.compute.attention=fused --config.compute.remat=dots \
    --config.data.batch_size=4
train_step fused-none-4 50 --config.compute.attention=fused --config.compute.remat=none \
    --config.data.batch_size=4
train_step fused-attention-$many 100 --config.compute.attention=fused \
    --config.compute.remat=attention --config.data.batch_size=$many
workdir=$(mktemp -d)
step quickstart 60 "$python" -m elastictok_jax train quickstart --workdir "$workdir" "${quick[@]}"
rm -rf "$workdir"
# Last, since a minute was too short for either on an H200.
train_step blockwise-dots-1 120 --config.compute.attention=blockwise --config.compute.remat=dots
step check-blockwise 150 "$python" -m benchmarks.check_attention --backends dense,blockwise \
    --json "$out/check-blockwise.json"

"$python" -m benchmarks.gpu_report "$out" | tee "$out/report.md"
