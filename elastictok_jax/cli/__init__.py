"""The command line: `elastictok VERB`."""

from elastictok_jax.cli.dispatch import main
from elastictok_jax.cli.options import split_command_line

__all__ = ["main", "split_command_line"]
