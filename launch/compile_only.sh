#!/usr/bin/env bash
# Compiles every stage of the paper for a pod, without one: see that all fit before asking for it.
# Usage: launch/compile_only.sh [TOPOLOGY] [--config.KEY=VALUE ...]   (default v4:8x8x4, a v4-512)
# Needs pip install -e '.[tpu]'. Results: runs/compile/STAGE.json, one line each on the terminal.
set -uo pipefail
topology=v4:8x8x4
if [[ $# -gt 0 && $1 != --* ]]; then
    topology=$1
    shift
fi
mkdir -p runs/compile
status=0
for stage in fsq:stage={image,video,64k,512k,1m} vae:stage={image,video,64k,512k}; do
    if elastictok compile "elastictok_$stage" --topology "$topology" --json "$@" \
        >"runs/compile/$stage.json" 2>"runs/compile/$stage.log"; then
        echo "$stage fits $topology"
    else
        echo "$stage does not fit $topology, or failed: see runs/compile/$stage.{json,log}"
        status=1
    fi
done
exit $status
