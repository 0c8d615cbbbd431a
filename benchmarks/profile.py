"""Where the time of a compiled program goes: profiler events joined to the model's parts."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# The first pattern that an operation's path in the program matches names its part.
PARTS = {
    "attention, backward": r"transpose.*/attention/(?!(query|key|value|out)/)",
    "attention, forward": r"/attention/(?!(query|key|value|out)/)",
    "projections of attention, backward": r"transpose.*/attention/",
    "projections of attention, forward": r"/attention/",
    "feed-forward, backward": r"transpose.*/mlp/",
    "feed-forward, forward": r"/mlp/",
    "norms, backward": r"transpose.*norm",
    "norms, forward": r"norm",
    "bottleneck": r"bottleneck",
    "patches and pixels, backward": r"transpose.*(in_proj|out_proj)",
    "patches and pixels, forward": r"in_proj|out_proj|tanh",
    "other of backward": r"transpose",
    "other of layers": r"/layers(_\d+)?/",
}


def costs_by_part(run: Callable[[], None], program: str, *, runs: int = 5) -> list[dict[str, Any]]:
    """Share of the devices' busy time that each part of the model takes, largest first.

    Nothing, where the profiler does not see the operations. On a GPU it does not see those in CUDA
    graphs: run with XLA_FLAGS=--xla_gpu_enable_command_buffer= to have none.

    Args:
      run: runs the program once, to the end.
      program: its optimised HLO text, which says the path of every operation.
    """
    paths = {}
    for line in program.splitlines():
        found = re.search(r'%?([\w.\-]+) = .*?op_name="([^"]*)"', line)
        if found and not re.search(r" (while|call|conditional)\(", line):  # their insides count
            paths[found[1]] = found[2]
    busy: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(trace)).planes)
        # A GPU's operations show on the host too, where they are started.
        devices = [
            plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))
        ]
        for plane in devices or planes:
            for line in plane.lines:
                for event in line.events:
                    name = event.name
                    if name not in paths:  # a GPU's kernels have names of their own
                        name = str(dict(event.stats).get("hlo_op", ""))
                    if name in paths:
                        busy[_part(paths[name])] += event.duration_ns
    total = sum(busy.values())
    return [{"part": part, "share": time / total} for part, time in busy.most_common()]


def _part(path: str) -> str:
    return next((name for name, like in PARTS.items() if re.search(like, path)), "optimizer, other")
