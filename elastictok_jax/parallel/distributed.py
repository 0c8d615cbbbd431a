"""Starts a run in several processes, configured by options, the environment or the cluster.

jax detects the other processes on TPU pods, under Slurm and under Open MPI. Elsewhere each process
is given the address of process 0, the number of processes and its own index.
"""

import contextlib
import functools
import glob
import importlib.util
import itertools
import math
import os
import socket
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax._src import distributed as _distributed  # the key-value store is not public
from jax._src.clusters import ClusterEnv  # nor is the detection of clusters
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.parallel.sigabrt import sigabrt_only_last_word

# Options and their environment variables; jax itself reads the first one.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
SHUTDOWN_SECONDS = 60
ANSWER_SECONDS = 3.0  # for a machine to accept a connection
MAX_PORT = 65535
FIRST_SECONDS = 1800.0  # for process 0 to index its data


def initialize(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of the run; a plain single process returns at once.

    Must be called before the first use of a device. Missing settings come from the environment.

    Raises:
      UsageError: if the settings are incomplete or inconsistent, or if process 0 cannot listen
        there: its host has no address, or is another machine, or its port is taken.
      RunError: if jax cannot join for any other reason.

    If not all processes have met after `timeout` seconds, jax aborts; the process then reports it
    in one line and exits with status 1.
    """
    given = distributed_settings(
        {"coordinator": coordinator, "processes": processes, "process": process}, os.environ
    )
    if given is None and not in_cluster(os.environ):
        return
    if timeout < 1:
        raise UsageError(f"--initialization-timeout {timeout}: must be at least 1 second")
    # The training loop handles SIGTERM: jax's service would swallow signals before it listens.
    jax.config.update("jax_enable_preemption_service", False)
    if given is not None:
        require_coordinator_host(
            given["coordinator_address"], process=given["process_id"], timeout=timeout
        )
        where, me = given["coordinator_address"], given["process_id"]
    else:
        where, me = _place_in_cluster(timeout)
    if where and me == 0:
        require_port(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or where)
    where = where or "the address that the cluster gives"
    try:
        with sigabrt_only_last_word(
            lambda: (
                f"not all processes met at {where} within --initialization-timeout = {timeout} s: "
                "see that process 0 runs there, that its port is open, and that as many were "
                "started as --processes says"
            )
        ):
            jax.distributed.initialize(
                **(given or {}),
                initialization_timeout=timeout,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"this process could not join the others at {where} ({reason}): see that each of them "
            "has its own --process, and that all are given the same --processes"
        ) from error


def shutdown() -> None:
    """Disconnects from the others once all have called this; does nothing in a single process."""
    jax.distributed.shutdown()


def distributed_settings(
    options: Mapping[str, str | int | None], environment: Mapping[str, str]
) -> dict | None:
    """Returns arguments of jax.distributed.initialize from options, else variables; None if unset.

    Raises:
      UsageError: naming what is missing or inconsistent.
    """
    found: dict[str, str | int] = {}
    for name, variable in VARIABLES.items():
        value: str | int | None = options[name]
        if value is None:
            value = environment.get(variable) or None  # empty is unset
        if value is not None:
            found[name] = value
    if not found:
        return None
    missing = [
        f"--{name} (or {variable})" for name, variable in VARIABLES.items() if name not in found
    ]
    if missing:
        has = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise UsageError(f"{has}: {' and '.join(missing)} must be given too, or none of the three")
    host_and_port(str(found["coordinator"]))
    try:
        processes, process = int(found["processes"]), int(found["process"])
    except ValueError:
        raise UsageError(
            f"processes = {found['processes']} and process = {found['process']}: must be numbers"
        ) from None
    if not 0 <= process < processes:
        raise UsageError(
            f"process = {process} of processes = {processes}: must be from 0 to processes - 1"
        )
    return {
        "coordinator_address": str(found["coordinator"]),
        "num_processes": processes,
        "process_id": process,
    }


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether there may be other processes, which jax detects by itself.

    Raises:
      UsageError: if there are others, but jax cannot detect them.
    """
    if _number(environment, "SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
        return True  # an `srun` of several tasks, not the shell of a batch script
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return True
        raise UsageError(
            "this Open MPI does not say where process 0 is (jax knows up to version 4): give "
            "--coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE "
            "--process $OMPI_COMM_WORLD_RANK"
        )
    return _has_tpu(environment)


def _number(environment: Mapping[str, str], variable: str) -> int:
    """Returns the number of processes that a variable states, 1 if it is unset or empty."""
    value = environment.get(variable) or "1"
    if not value.isdecimal():
        raise UsageError(f"{variable}={value}: must be a number of processes, or unset it")
    return int(value)


def _place_in_cluster(timeout: int) -> tuple[str | None, int | None]:
    """Returns the address of process 0 and the index of this process, as jax detects them, or None.

    Errors in the cluster's variables are reported by jax itself when it starts.
    """
    try:
        address, _, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
    except Exception:
        return None, None
    return address, process


def host_and_port(address: str) -> tuple[str, int]:
    """Returns host and port of `HOST:PORT` or `[IPv6]:PORT`.

    Raises:
      UsageError: if it is neither.
    """
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or not port.isdecimal() or (":" in host) != (host == f"[{bare}]"):
        raise UsageError(f"coordinator {address}: write HOST:PORT, or [ADDRESS]:PORT for IPv6")
    if not 1 <= int(port) <= MAX_PORT:
        raise UsageError(f"coordinator {address}: a port is from 1 to {MAX_PORT}")
    return bare, int(port)


def require_coordinator_host(address: str, *, process: int, timeout: float) -> None:
    """Checks that the host of `address` resolves and, for process 0, that it is this machine.

    In a cluster its name may appear late: all processes but the first, which have to wait anyway,
    retry for up to `timeout` seconds.

    Raises:
      UsageError: if it does not resolve, or is another machine.
    """
    host, port = host_and_port(address)
    deadline = time.monotonic() + (timeout if process else 0)
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"coordinator {address}: this machine knows no host {host} "
                    f"({getattr(error, 'strerror', None) or error}): give a name or address of the "
                    "machine of process 0"
                ) from None
            time.sleep(1)
    if process == 0 and not any(_leads_here(family, str(place[0])) for family, *_, place in found):
        raise UsageError(
            f"coordinator {address}: this is process 0, and {host} is another machine: run "
            "process 0 there, or give an address of this one"
        )


def require_port(address: str) -> None:
    """Checks that this process can listen on the port of `address`; otherwise jax would crash.

    Raises:
      UsageError: if it cannot.
    """
    port = host_and_port(address)[1]
    try:
        _listen(port).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # without the address that Python appends
        raise UsageError(
            f"coordinator {address}: process 0 cannot listen on port {port} ({reason}): "
            f"choose a free one{' from 1024 on' if port < 1024 else ''}"
        ) from None


def _listen(port: int) -> socket.socket:
    """Returns a socket that listens on `port` of all addresses, as jax's service does."""
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
        dualstack_ipv6=socket.has_dualstack_ipv6(),
    )


def _leads_here(family: socket.AddressFamily, address: str) -> bool:
    """Returns whether `address` is this machine's, directly or through a gateway."""
    with contextlib.suppress(OSError), socket.socket(family) as trial:
        trial.bind((address, 0))
        return True
    with contextlib.suppress(OSError), _listen(0) as here:
        port = here.getsockname()[1]
        socket.create_connection((address, port), ANSWER_SECONDS).close()
        here.settimeout(ANSWER_SECONDS)
        here.accept()[0].close()
        return True
    return False


def _has_tpu(environment: Mapping[str, str]) -> bool:
    """Returns whether this is a TPU host: jax gets the other hosts from the pod's metadata."""
    platforms = environment.get("JAX_PLATFORMS") or "tpu"  # empty is unset, as for jax
    if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def coordination_client():
    """Returns the client of jax's coordination service, or None in a single process."""
    return _distributed.global_state.client


def coordinator_address() -> tuple[str, int]:
    """Returns host and port of process 0's coordination service."""
    host, _, port = (_distributed.global_state.coordinator_address or ":0").rpartition(":")
    return host.strip("[]"), int(port)


def process_place() -> tuple[int, int]:
    """Returns (index of this process, number of processes), without waiting for a device."""
    state = _distributed.global_state
    return state.process_id, state.num_processes


def wait_for_all_processes(mesh: Mesh, *, timeout: float) -> None:
    """Waits for all processes, then forms the groups of devices that collectives run in.

    On CPUs a group is formed by the first collective that needs it, and its processes wait for each
    other for only 30 s: one may take longer to compile what another finds in its cache.

    Raises:
      RunError: if not all have started within `timeout` seconds.
    """
    store = coordination_client()
    if store is None:
        return
    try:
        store.wait_at_barrier(run_scoped_key("meet"), int(timeout * 1000))
    except RuntimeError as error:
        raise RunError(f"not all processes started within {timeout:g} s: see their logs") from error
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    for count in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, count):
            spec = PartitionSpec(group)
            add = jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=group),
                mesh=mesh,
                in_specs=spec,
                out_specs=PartitionSpec(),
            )
            ones = np.ones(math.prod(mesh.shape[axis] for axis in group), np.float32)
            placed = jax.make_array_from_callback(
                ones.shape, NamedSharding(mesh, spec), ones.__getitem__
            )
            jax.block_until_ready(jax.jit(add)(placed))


def require_same_process_count(*, timeout: float) -> None:
    """Raises UsageError if this process and process 0 were given different --processes."""
    process, processes = process_place()
    first = int(broadcast_from_first("processes", str(processes), timeout=timeout))
    if first != processes:
        raise UsageError(
            f"process 0 is given --processes {first} and process {process} is given --processes "
            f"{processes}: give all the same"
        )


class _Runs:
    """Counts the runs that this program has begun; the count is the same in all processes."""

    begun = 0


def begin_distributed_run() -> None:
    """Starts a new set of keys and barriers, each usable once; all processes call it once a run."""
    _Runs.begun += 1


def run_scoped_key(name: str) -> str:
    """Returns a key of the shared store that no earlier run of this program has used."""
    return f"elastictok/{_Runs.begun}/{name}"


def broadcast_from_first(name: str, value: str, *, timeout: float) -> str:
    """Broadcasts the `value` of process 0 under this `name`: returns it in every process.

    Raises:
      RunError: if process 0 has not sent it within `timeout` seconds.
    """
    store = coordination_client()
    if store is None:
        return value
    if process_place()[0] == 0:
        store.key_value_set(run_scoped_key(f"first/{name}"), value)
        return value
    try:
        return store.blocking_key_value_get(run_scoped_key(f"first/{name}"), int(timeout * 1000))
    except RuntimeError as error:
        raise RunError(
            f"process 0 did not reach {name!r} within {timeout:g} s: see its log"
        ) from error
