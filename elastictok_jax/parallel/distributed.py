"""Start-up of a run in several processes: from options, the environment, or the cluster.

jax finds the other processes by itself on TPU pods, under Slurm and under Open MPI. Elsewhere each
process is told where process 0 is, how many there are, and which one it is.
"""

import functools
import glob
import importlib.util
import itertools
import math
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax._src import distributed as _distributed  # the key-value store has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.parallel.abort import on_abort

# Options, and the variables that mean the same: jax itself reads the first by this name.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
SHUTDOWN_SECONDS = 60
_KEYS = "elastictok/first/"


def initialize(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of the run; a plain single process returns at once.

    Must come before the first use of a device. What is not given is taken from the environment.

    Raises:
      UsageError: if the settings are half given or do not fit each other.
      RunError: if this is process 0 and cannot listen at its address.

    When not all processes have met after `timeout` seconds, jax aborts; the process then says so
    in one line and exits with status 1.
    """
    given = explicit_settings(
        {"coordinator": coordinator, "processes": processes, "process": process}, os.environ
    )
    if given is None and not in_cluster(os.environ):
        return
    if timeout < 1:
        raise UsageError(f"--initialization-timeout {timeout}: must be at least 1 second")
    # SIGTERM is the loop's own: jax's service would swallow those that come before it listens.
    jax.config.update("jax_enable_preemption_service", False)
    where = given["coordinator_address"] if given else "the address that the cluster gives"
    try:
        with on_abort(
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
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"this process could not join the others at {where} ({reason}): if it is process 0, "
            "its port may be taken, choose another"
        ) from error


def shutdown() -> None:
    """Leaves the others, once all have come to this point; does nothing in a single process."""
    jax.distributed.shutdown()


def explicit_settings(
    options: Mapping[str, str | int | None], environment: Mapping[str, str]
) -> dict | None:
    """Arguments of jax.distributed.initialize from options, else variables; None without any.

    Raises:
      UsageError: naming what is missing or does not fit.
    """
    found: dict[str, str | int] = {}
    for name, variable in VARIABLES.items():
        value: str | int | None = options[name]
        if value is None:
            value = environment.get(variable)
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
    host, _, port = str(found["coordinator"]).rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"coordinator {found['coordinator']}: write HOST:PORT")
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
    """Whether jax can find the other processes by itself, and there may be some.

    Raises:
      UsageError: if there are others, but jax cannot find them.
    """
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True  # an `srun` of several tasks, not the shell of a batch script
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return True
        raise UsageError(
            "this Open MPI does not say where process 0 is (jax knows up to version 4): give "
            "--coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE "
            "--process $OMPI_COMM_WORLD_RANK"
        )
    return _has_tpu(environment)


def _has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU host: jax then asks the pod's metadata for its other hosts."""
    platforms = environment.get("JAX_PLATFORMS") or "tpu"  # empty is unset, as for jax
    if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def client():
    """The client of jax's coordination service, or None in a single process."""
    return _distributed.global_state.client


def coordinator_address() -> tuple[str, int]:
    """Host and port of process 0's coordination service."""
    host, _, port = (_distributed.global_state.coordinator_address or ":0").rpartition(":")
    return host.strip("[]"), int(port)


def place() -> tuple[int, int]:
    """(which process this is, of how many), without waiting for any device."""
    state = _distributed.global_state
    return state.process_id, state.num_processes


def meet(mesh: Mesh, *, timeout: float) -> None:
    """Waits for all processes, then has them form the groups that collectives run in.

    On CPUs a group is formed by the first collective that needs it, whose processes wait for each
    other for 30 s only: less than one of them may take to compile what another has at hand.

    Raises:
      RunError: if not all have come in `timeout` seconds.
    """
    store = client()
    if store is None:
        return
    try:
        store.wait_at_barrier("elastictok/meet", int(timeout * 1000))
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


def first_says(name: str, value: str, *, timeout: float) -> str:
    """The `value` that process 0 gives under this `name`, in every process.

    Raises:
      RunError: if process 0 has not said it in `timeout` seconds.
    """
    store = client()
    if store is None:
        return value
    if place()[0] == 0:
        store.key_value_set(_KEYS + name, value)
        return value
    try:
        return store.blocking_key_value_get(_KEYS + name, int(timeout * 1000))
    except RuntimeError as error:
        raise RunError(
            f"process 0 did not come to {name!r} within {timeout:g} s: see its log"
        ) from error
