"""Fake devices make compiling slow, and speed is not tested here."""

import jax


def pytest_configure(config):
    if config.getoption("--devices") == 8:
        jax.config.update("jax_disable_most_optimizations", True)
