"""What the tests of this folder stand on."""

import jax


def test_there_are_eight_devices_in_one_process():
    assert len(jax.local_devices()) == 8
