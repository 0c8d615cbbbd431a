"""Reports in one line why jax cannot start in this environment."""

import contextlib
import os
from collections.abc import Iterator

from elastictok_jax.errors import RunError, UsageError, first_line

ADVICE = (" (set JAX_PLATFORMS=",)  # jax's own, where ours says more


@contextlib.contextmanager
def jax_started() -> Iterator[None]:
    """Imports jax, and reports a missing device as a UsageError of the code inside.

    jax looks for devices at their first use, which may be anywhere.

    Raises:
      UsageError: if the environment keeps jax from starting or names a backend that does not exist.
    """
    try:
        import jax  # noqa: F401
    except Exception as error:  # ValueError for a JAX_ variable, or whatever a plugin raises
        raise UsageError(
            f"jax does not start ({first_line(error, until=ADVICE)}): check the environment's "
            "JAX_ variables"
        ) from error
    try:
        yield
    except (UsageError, RunError, OSError):
        raise
    except Exception:
        require_devices()
        raise


def require_devices() -> None:
    """Raises UsageError if jax has no device to run on."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or an AssertionError for cuda without its plugin
        reason = first_line(error, until=ADVICE)
        asked = os.environ.get("JAX_PLATFORMS")
        if asked:
            raise UsageError(
                f"JAX_PLATFORMS={asked}: jax finds no such device ({reason}): unset it, or "
                "install jax for that device"
            ) from error
        raise UsageError(
            f"jax finds no device ({reason}): see its driver, or set JAX_PLATFORMS=cpu"
        ) from error
