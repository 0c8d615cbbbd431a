"""The memory of a training step on GPUs that are not here, or what is missing to know it."""

import importlib.util
import subprocess
import sys

import pytest

from benchmarks import compile_gpu
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment

TINY = {
    "compute.attention": "fused",
    "compute.dtype": "bfloat16",
    "model.width": 32,
    "model.mlp_width": 48,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "data.batch_size": 2,
    "mesh.sequence": 2,
}


def has_compiler() -> bool:
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


@pytest.mark.skipif(has_compiler(), reason="the compiler for GPUs is here")
def test_without_the_compiler_the_mend_is_named():
    with pytest.raises(UsageError, match=r"pip install 'jax\[cuda13\]'"):
        compile_gpu.h200_devices(1)


@pytest.mark.skipif(not has_compiler(), reason="wants the compiler of jax[cuda13]")
def test_fused_attention_in_a_ring_compiles_for_two_gpus():
    words = [f"--config.{key}={value}" for key, value in TINY.items()]
    module = [sys.executable, "-m", "benchmarks.compile_gpu", "--experiment", "quickstart"]
    done = subprocess.run(
        [*module, "--devices", "2", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| 2 x NVIDIA H200 | fused |" in done.stdout


def test_a_mesh_over_machines_is_refused():
    config = get_experiment("quickstart")
    config.mesh.dcn_data = 2
    with pytest.raises(UsageError, match="one machine"):
        compile_gpu.plan(config, devices=[])
