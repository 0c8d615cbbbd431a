"""Start-up of several processes: wrong settings are reported before jax tries them."""

import os
import socket
import subprocess
import sys

import pytest

from elastictok_jax.errors import UsageError
from elastictok_jax.parallel.distributed import (
    distributed_settings,
    host_and_port,
    in_cluster,
    require_coordinator_host,
    require_port,
)


@pytest.fixture
def taken():
    """Yields a port that another program listens on."""
    with socket.create_server(("", 0), family=socket.AF_INET) as listener:
        yield listener.getsockname()[1]


def train(tmp_path, *words, status: int = 2, **environment) -> str:
    """Returns the only line of a `train` in several processes that cannot start."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "elastictok_jax", "train", "quickstart"),
            *("--workdir", str(tmp_path / "run"), *words),
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert not (tmp_path / "run").exists()
    return line


def test_a_taken_port_is_said_and_nothing_crashes(tmp_path, taken):
    several = ("--processes", "2", "--process", "0", "--coordinator")
    line = train(tmp_path, *several, f"localhost:{taken}")
    assert f"process 0 cannot listen on port {taken} (Address already in use" in line


def test_a_taken_port_under_slurm_is_said_too(tmp_path):
    first = 65536 - 2**12  # jax adds the job's number modulo 2^12
    for job in range(100):
        try:
            listener = socket.create_server(("", first + job))
        except OSError:
            continue
        with listener:
            variables = {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
            }
            line = train(tmp_path, **variables)
            assert f"process 0 cannot listen on port {first + job} (Address already" in line
            return


def test_others_that_do_not_come_are_said_in_one_line(tmp_path):
    with socket.create_server(("", 0)) as listener:
        free = listener.getsockname()[1]
    for process in ("0", "1"):
        words = ("--coordinator", f"localhost:{free}", "--processes", "2", "--process", process)
        line = train(tmp_path, *words, "--initialization-timeout", "1", status=1)
        assert f"not all processes met at localhost:{free} within" in line


def test_a_free_port_is_left_free(taken):
    with pytest.raises(UsageError, match="choose a free one"):
        require_port(f"localhost:{taken}")
    with socket.create_server(("", 0)) as listener:
        free = listener.getsockname()[1]
    for _ in range(2):
        require_port(f"localhost:{free}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost", "write HOST:PORT"),
        (":1234", "write HOST:PORT"),
        ("localhost:", "write HOST:PORT"),
        ("localhost:ssh", "write HOST:PORT"),
        ("localhost:²", "write HOST:PORT"),
        ("localhost:-1", "write HOST:PORT"),
        ("::1:1234", r"\[ADDRESS\]:PORT for IPv6"),
        ("localhost:0", "a port is from 1 to 65535"),
        ("localhost:99999", "a port is from 1 to 65535"),
    ],
)
def test_what_is_no_address_is_refused(address, said):
    with pytest.raises(UsageError, match=said):
        host_and_port(address)


def test_addresses_of_hosts_and_of_both_protocols():
    assert host_and_port("node-1.cluster:1234") == ("node-1.cluster", 1234)
    assert host_and_port("[::1]:1234") == ("::1", 1234)


def test_process_0_is_on_the_machine_that_its_address_names():
    for own in ("localhost:1234", "127.0.0.1:1234", f"{socket.gethostname()}:1234"):
        require_coordinator_host(own, process=0, timeout=1)
    with pytest.raises(UsageError, match=r"this is process 0, and 192\.0\.2\.1 is another machine"):
        require_coordinator_host("192.0.2.1:1234", process=0, timeout=1)  # an address for documents
    require_coordinator_host("192.0.2.1:1234", process=1, timeout=1)


@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_does_not_exist_is_said(process):
    for host in ("no-such-host.invalid", "a..b", "x" * 300):
        with pytest.raises(UsageError, match="this machine knows no host"):
            require_coordinator_host(f"{host}:1234", process=process, timeout=0.1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen at every port")
def test_a_port_that_is_not_allowed_is_said():
    with pytest.raises(UsageError, match="choose a free one from 1024 on"):
        require_port("localhost:80")


def test_empty_variables_are_unset_and_others_must_be_numbers():
    unset = dict.fromkeys(("coordinator", "processes", "process"))
    empty = dict.fromkeys(("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"), "")
    assert distributed_settings(unset, empty) is None
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        assert not in_cluster({variable: "", "JAX_PLATFORMS": "cpu"})
        for value in ("two", "-3", "1.5", "²"):
            with pytest.raises(UsageError, match=f"{variable}={value}: must be a number"):
                in_cluster({variable: value})
