#!/usr/bin/env bash
# One training run on a Slurm cluster, a process a GPU. jax finds the processes by itself.
#
#   sbatch launch/slurm.sh EXPERIMENT --workdir DIR [--config.KEY=VALUE ...]
#
# DIR must be on storage that all nodes share. Slurm warns two minutes before the time limit, and at
# preemption: the run saves, ends with status 75, and this job is queued again, and goes on from
# there until `train.steps`. A lost node ends the run with status 1; it is queued again as well,
# unless it has been RESTARTS times (10) for whatever reason.
#
# The weights that the loss needs (VGG's of LPIPS) are fetched on every node that does not have them
# in its cache; where nodes have no network, run `elastictok fetch-weights lpips-vgg` before on a
# machine of the same home folder (or ELASTICTOK_CACHE). With WEIGHTS= (empty) nothing is fetched:
# for loss.lpips_net=alex, or loss.lpips_weight=0.
#
# Not run here for want of a cluster: see that the lines of #SBATCH fit yours.
#SBATCH --job-name=elastictok
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -lt 2 ]; then # --workdir=DIR is one word
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
restarts=${RESTARTS:-10}
weights=${WEIGHTS-lpips-vgg}

# First on this node alone, as all of them may share one cache; then on those that do not.
if [ -n "$weights" ] && ! { JAX_PLATFORMS=cpu elastictok fetch-weights "$weights" &&
    JAX_PLATFORMS=cpu srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        elastictok fetch-weights "$weights"; } >&2; then
    echo "slurm.sh: not all nodes could fetch $weights: run 'elastictok fetch-weights $weights' where" \
        "there is a network, into a cache that all nodes share, or set WEIGHTS= if the run needs none" >&2
    exit 2
fi

# Lines of each process go to its own file.
# --kill-on-bad-exit=0: the processes end each other, each with its reason.
srun --kill-on-bad-exit=0 --error="slurm-%j-%t.log" \
    --open-mode=append elastictok train "$@"
status=$?

case $status in
0 | 2) ;; # done, or nothing that another try would change
75) scontrol requeue "$SLURM_JOB_ID" ;; # stopped in order, everything saved
*) [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
