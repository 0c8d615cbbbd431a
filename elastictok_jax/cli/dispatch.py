"""Dispatches `elastictok VERB` to the module of the verb.

A verb is a name in VERBS and a module with a docstring, which is its help; `add_options(parser)`;
and `run(args, overrides)`, which imports what it needs and returns an exit status, or None for 0.
The module may define EPILOG; TAKES_CONFIG, if the verb accepts `--config.KEY=VALUE`; and
WITHOUT_JAX, if it runs without jax.
"""

import argparse
import importlib
import logging
import sys

from elastictok_jax import __version__
from elastictok_jax.cli.options import OVERRIDE, split_command_line
from elastictok_jax.errors import STOPPED, ReaderGone, RunError, UsageError

VERBS = (
    "train",
    "evaluate",
    "compare",
    "inspect",
    "encode",
    "decode",
    "reconstruct",
    "train-router",
    "prepare",
    "import-published",
    "fetch-weights",
    "inspect-data",
    "compile",
    "config",
    "experiments",
)
STATUSES = (
    f"exit status: 0 done; {STOPPED} stopped in order with everything saved, run the same command "
    "again; 2 bad usage, config or input; 1 a failure while running"
)


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit status.

    It is one of STATUSES, or 141 if the reader of standard output is gone. A Ctrl-C where nothing
    can be saved (130) is handled by `__main__`.
    """
    argv = sys.argv[1:] if argv is None else argv
    # orbax warns about its options and logs a traceback of what it then raises; `main` reports both
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        try:
            return _run_verb(argv)
        finally:
            sys.stdout.flush()  # so that a full disk is noticed here, not when Python exits
    except ReaderGone as gone:
        return gone.status
    except (UsageError, RunError) as error:
        print(f"elastictok: error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:  # a full or failing disk, most likely
        print(f"elastictok: error: {error}: fix that and run it again", file=sys.stderr)
        return RunError.status


def _run_verb(argv: list[str]) -> int:
    """Parses a command line, runs its verb, and returns the exit status."""
    words, overrides = split_command_line(argv)
    parser = build_parser()
    args = parser.parse_args(words)
    verb = args.module
    if overrides and not getattr(verb, "TAKES_CONFIG", False):
        parser.error(f"{args.verb} takes no {OVERRIDE}KEY options")
    if getattr(verb, "WITHOUT_JAX", False):
        return verb.run(args, overrides) or 0
    from elastictok_jax.parallel.backend import jax_started

    with jax_started():
        return verb.run(args, overrides) or 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="elastictok",
        description="Pretrain adaptive visual tokenizers in JAX, and use them.",
        epilog=STATUSES,
    )
    parser.add_argument("--version", action="version", version=f"elastictok {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        verb = importlib.import_module(f"elastictok_jax.cli.{name.replace('-', '_')}")
        says = " ".join((verb.__doc__ or "").split()).removesuffix(".")
        says = says[:1].lower() + says[1:]
        of_verb = verbs.add_parser(name, help=says, epilog=getattr(verb, "EPILOG", None))
        verb.add_options(of_verb)
        of_verb.set_defaults(module=verb)
    return parser
