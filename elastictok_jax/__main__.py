"""The program `elastictok`, also run as `python -m elastictok_jax`."""

from elastictok_jax import ctrl_c
from elastictok_jax.streams import prepare_streams


def main() -> None:
    """Runs the command line of this process and exits; see `cli.main` for the exit status."""
    try:
        prepare_streams()  # before another file gets the number of a closed one
        ctrl_c.install_ctrl_c_handler()  # before anything slow is imported
        from elastictok_jax.cli import main

        status = main()
    except BaseException:  # also what C++ or an import turned a KeyboardInterrupt into
        if not ctrl_c.ctrl_c_pressed():
            raise
    finally:
        ctrl_c.end_at_next_ctrl_c()
    if ctrl_c.ctrl_c_pressed():
        ctrl_c.end_interrupted()  # not by SystemExit: exit handlers of libraries are slow, or print
    raise SystemExit(status)


if __name__ == "__main__":
    main()
