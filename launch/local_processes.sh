#!/usr/bin/env bash
# One training run in N processes on this machine, to try out what many hosts do, or to train on
# its GPUs with a process each.
#
#   launch/local_processes.sh N EXPERIMENT --workdir DIR [--config.KEY=VALUE ...]
#
# With N or more NVIDIA GPUs each process gets one of them; otherwise each gets one CPU device
# (JAX_NUM_CPU_DEVICES for more). Lines of process I go to DIR/process-I.log, those of process 0
# also here. A signal to this script goes to all processes. Exits with 0 if all processes did, with
# 75 if they were stopped in order (run it again to go on), else with the status of a failed one.
set -uo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
processes=$1
shift
workdir=
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
    --workdir) workdir=${words[i + 1]:-} ;;
    --workdir=*) workdir=${words[i]#--workdir=} ;;
    esac
done
[ -n "$workdir" ] || { echo "local_processes.sh: give --workdir DIR" >&2; exit 2; }
mkdir -p "$workdir" || exit 2
python=${PYTHON:-python}

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes
[ "$gpus" -ge "$processes" ] || export JAX_PLATFORMS=cpu

touch "$workdir/process-0.log"
tail -n 0 -F "$workdir/process-0.log" >&2 2>/dev/null &
tail=$!
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT HUP
set -m # groups of their own, which Ctrl-C does not reach as well: a second signal would not save
for ((i = 0; i < processes; i++)); do
    environment=(JAX_PROCESS_ID="$i")
    [ "$gpus" -ge "$processes" ] && environment+=(CUDA_VISIBLE_DEVICES="$i")
    env "${environment[@]}" "$python" -m elastictok_jax train "$@" 2>>"$workdir/process-$i.log" &
    pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
    while :; do # a trapped signal ends `wait` too, before the process has ended
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    case $status in 0 | 75) [ "$code" -eq 0 ] || status=$code ;; esac # a failure outranks a stop
done
sleep 1 # for the last lines
kill "$tail" 2>/dev/null
exit "$status"
