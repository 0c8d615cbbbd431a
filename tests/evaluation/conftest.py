"""What the tests of evaluation share."""

import numpy as np
import pytest

from elastictok_jax.evaluation.i3d import i3d_shapes


@pytest.fixture(scope="session")
def made_up_i3d():
    """Weights that need no file: waves in the place of every weight, of about He's size."""
    params = {}
    for layer, weights in i3d_shapes().items():
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
