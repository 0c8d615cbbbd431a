"""Settings that all tests share. Compiled programs are kept between runs and by subprocesses."""

import gc
import getpass
import os
import sys
import tempfile
from pathlib import Path

# Set before any test imports jax, and in os.environ so that subprocesses share what is compiled.
# Results are bit for bit those of a fresh compile; the cache's key covers program, flags and jax.
_CACHE = f"elastictok-jax-{getpass.getuser()}-py{sys.version_info.major}.{sys.version_info.minor}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / _CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden instead of comparing"
    )
    parser.addoption(
        "--devices", type=int, default=1, help="CPU devices; tests/eight_devices wants 8"
    )


def pytest_configure(config):
    devices = config.getoption("--devices")
    if devices != 1:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_disable_most_optimizations", True)  # they only cost time here


def pytest_collection_finish():
    """Full garbage collections walk all that jax holds, more with every test: let them be rare."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_ignore_collect(collection_path, config):
    """Tests of whole meshes run in a call of their own: devices are fixed when jax starts."""
    if collection_path.name == "eight_devices":
        return config.getoption("--devices") != 8
    return None


@pytest.fixture
def update_golden(request):
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def made_up_i3d():
    """Weights that need no file: waves in the place of every weight, of about He's size."""
    from elastictok_jax.perceptual.i3d import i3d_network_shapes

    params = {}
    for layer, weights in i3d_network_shapes().items():
        params[layer] = {}
        for weight, shape in weights.items():
            wave = np.sin(np.arange(np.prod(shape)) ** 2 * 0.37 + len(params) + len(weight))
            if weight == "kernel":
                wave *= 2 / np.sqrt(np.prod(shape[:-1]))
            elif weight == "variance":
                wave = 0.5 + wave**2
            else:
                wave *= 0.1
            params[layer][weight] = wave.reshape(shape).astype(np.float32)
    return params
