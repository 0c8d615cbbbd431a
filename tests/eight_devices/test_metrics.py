"""Figures of frames whose batch lies over eight devices: nothing needs to be exchanged."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elastictok_jax.aot.costs import program_costs
from elastictok_jax.aot.hlo import parse_module
from elastictok_jax.evaluation.frame_metrics import frame_mse, frame_psnr, ms_ssim, ssim


@pytest.mark.parametrize("figure", [frame_mse, frame_psnr, ssim, ms_ssim])
def test_frames_over_devices_have_the_figures_of_one_device(figure):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (16, 180, 176, 3)).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 30, x.shape), 0, 255).astype(np.uint8)
    compiled = jax.jit(figure, in_shardings=over_devices).lower(x, y).compile()
    assert not program_costs(parse_module(compiled.as_text())).collectives
    found = compiled(*(jax.device_put(frames, over_devices) for frames in (x, y)))
    assert found.sharding.is_equivalent_to(over_devices, 1)
    np.testing.assert_allclose(found, jax.jit(figure)(x, y), rtol=1e-5)
