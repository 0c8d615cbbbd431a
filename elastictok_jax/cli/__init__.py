"""The command line: `elastictok VERB`."""

from elastictok_jax.cli.dispatch import main, split_overrides

__all__ = ["main", "split_overrides"]
