"""`python -m elastictok_jax` is `elastictok`."""

from elastictok_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
