"""Scripts in launch/ with stand-ins for the programs of a cluster: weights first, then restarts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
FETCH, TRAIN = "elastictok fetch-weights lpips-vgg", "elastictok train elastictok_fsq --workdir w"


@pytest.fixture
def run(tmp_path):
    """Runs a command with stand-ins on PATH; returns its status, its stderr, and their calls.

    Each stand-in logs its arguments and fails if they contain FAIL_ON. Trainings end with STATUSES,
    in the order in which they are started.
    """
    stand_in = (
        '#!/bin/bash\necho "${0##*/} $*" >>"$CALLS"\n'
        '[ -z "${FAIL_ON:-}" ] || [[ "$*" != *"$FAIL_ON"* ]] || exit 1\n'
        'case "${0##*/} $*" in *"elastictok train"*)\n'
        '    turn=$(grep -c "elastictok train" "$CALLS")\n'
        '    set -- ${STATUSES:-0}; exit "${!turn:-0}" ;;\n'
        "esac\n"
    )
    (tmp_path / "bin").mkdir()
    for name in ("gcloud", "srun", "scontrol", "elastictok"):
        (tmp_path / "bin" / name).write_text(stand_in)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*command, **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {
            **{"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)},
            **{"CALLS": str(tmp_path / "calls"), "TPU": "pod", "ZONE": "z"},
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"},
        }
        result = subprocess.run(
            command,
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return result.returncode, result.stderr, (tmp_path / "calls").read_text().splitlines()

    return run


def place(calls: list[str], part: str) -> int:
    return next((index for index, call in enumerate(calls) if part in call), -1)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh"])
def test_weights_are_fetched_on_every_machine_before_training(run, script):
    words = ("bash", str(LAUNCH / script), *TRAIN.split()[2:])
    status, _, calls = run(*words)
    assert status == 0 and 0 <= place(calls, FETCH) < place(calls, TRAIN)
    everywhere = "--worker=all" if script == "tpu_vm.sh" else "srun --ntasks=2 --ntasks-per-node=1"
    assert any(everywhere in call and FETCH in call for call in calls)

    status, said, calls = run(*words, FAIL_ON="fetch-weights")
    assert status == {"tpu_vm.sh": 1, "slurm.sh": 2}[script] and place(calls, TRAIN) < 0
    (line,) = said.splitlines()
    assert line.startswith(script) and "run 'elastictok fetch-weights lpips-vgg'" in line

    status, _, calls = run(*words, WEIGHTS="", FAIL_ON="fetch-weights")
    assert status == 0 and place(calls, "fetch-weights") < 0 <= place(calls, TRAIN)


def test_weights_of_this_machine_are_sent_to_hosts_of_a_tpu(run, tmp_path):
    weights = tmp_path / ".cache" / "elastictok_jax" / "lpips_vgg.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    _, _, calls = run("bash", str(LAUNCH / "tpu_vm.sh"), *TRAIN.split()[2:])
    sent = place(calls, f"scp {weights} pod:.cache/elastictok_jax/")
    assert 0 < sent < place(calls, FETCH)


def test_pods_fetch_weights_into_their_volume_before_training(run):
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    (cache,) = [one["value"] for one in container["env"] if one["name"] == "ELASTICTOK_CACHE"]
    assert Path(cache).is_relative_to(mount["mountPath"])
    status, _, calls = run(*container["command"])
    assert status == 0 and 0 <= place(calls, FETCH) < place(calls, "elastictok train")
    status, _, calls = run(*container["command"], FAIL_ON="fetch-weights")
    assert status == 2 and place(calls, "elastictok train") < 0


@pytest.mark.parametrize(("status", "queued"), [(0, False), (2, False), (75, True), (1, True)])
def test_slurm_requeues_a_run_that_was_stopped_or_lost(run, status, queued):
    words = ("bash", str(LAUNCH / "slurm.sh"), *TRAIN.split()[2:])
    ended, _, calls = run(*words, STATUSES=str(status))
    assert ended == status and (place(calls, "scontrol requeue 7") >= 0) == queued
    if status:  # after the last restart only a run that was stopped in order goes on
        _, _, calls = run(*words, STATUSES=str(status), SLURM_RESTART_COUNT="10")
        assert (place(calls, "scontrol requeue 7") >= 0) == (status == 75)


def test_a_tpu_run_is_started_again_until_it_has_finished(run, tmp_path):
    (tmp_path / "bin" / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    words = ("bash", str(LAUNCH / "tpu_vm.sh"), *TRAIN.split()[2:])
    for statuses, ended in (("75 1 0", 0), ("75 2", 2), ("1 75", 75)):
        status, _, calls = run(*words, STATUSES=statuses, RESTARTS="2" if ended == 75 else "10")
        trained = [call for call in calls if "elastictok train" in call]
        assert status == ended and len(trained) == len(statuses.split())


@pytest.mark.parametrize(
    ("statuses", "ended"), [("0 0", 0), ("75 75", 75), ("75 1", 1), ("1 75", 1), ("2 75", 2)]
)
def test_a_failed_process_on_this_machine_outranks_a_stopped_one(run, tmp_path, statuses, ended):
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$1" != -c ] || exec {sys.executable} "$@"\n'
        'echo "$*" >>"$CALLS"\nset -- $STATUSES; shift "$JAX_PROCESS_ID"; exit "$1"\n'
    )
    python.chmod(0o755)
    words = ("bash", str(LAUNCH / "local_processes.sh"), "2", *TRAIN.split()[2:])
    status, _, calls = run(*words, STATUSES=statuses, PYTHON=str(python))
    assert status == ended and len(calls) == 2


def test_a_pod_ends_as_its_run_does(run):
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    for status in (0, 1, 2, 75):
        assert run(*container["command"], STATUSES=str(status))[0] == status
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]  # all others are restarted
