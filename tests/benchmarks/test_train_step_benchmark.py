"""The benchmark of the training step runs, and its figures mean what they say."""

import json

import pytest

from benchmarks import train_step
from benchmarks.profile import costs_by_part

TINY = {
    "model.width": 16,
    "model.mlp_width": 24,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "data.batch_size": 1,
}


def test_figures_of_a_tiny_model(tmp_path, capsys):
    words = [f"--config.{key}={value}" for key, value in TINY.items()]
    out = tmp_path / "out.json"
    train_step.main(["--experiment", "quickstart", "--steps", "2", "--json", str(out), *words])
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert results["machine"] in printed
    tokens = 4 * 2 * 2 * 2  # blocks, patches along frames, height and width
    seconds, peak = results["step_seconds"], results["matmul_peak_gflops"] * 1e9
    assert results["tokens_per_second"] == pytest.approx(tokens / seconds)
    flops = 6 * results["million_parameters"] * 1e6 * tokens
    assert results["utilisation_6_parameters_tokens"] == pytest.approx(flops / seconds / peak)
    assert 0 < results["quickest_step_seconds"] <= seconds
    assert sum(part["share"] for part in results["parts"]) == pytest.approx(1)
    names = {part["part"] for part in results["parts"]}
    assert {"attention, backward", "feed-forward, forward"} <= names
    assert all(part["part"] in printed for part in results["parts"])


def test_parts_are_found_by_the_paths_of_operations():
    """An operation that the program does not name is left out; a loop is not counted twice."""
    import jax
    import jax.numpy as jnp

    def program(x):
        with jax.named_scope("mlp"):
            return jnp.sum(jnp.sin(x) @ x)

    x = jnp.ones((64, 64))
    compiled = jax.jit(program).lower(x).compile()
    parts = costs_by_part(lambda: compiled(x).block_until_ready(), compiled.as_text(), runs=1)
    assert parts[0]["part"] == "feed-forward, forward"
