"""Package definition of elastictok_jax; `experiments/` is installed as part of the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (HERE / "elastictok_jax/__init__.py").read_text()
).group(1)
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    "compress": ["constriction>=0.5"],
    "gcs": ["gcsfs"],
    "s3": ["s3fs"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.17"],
    # Other implementations of the metrics, for tests/evaluation/test_frame_metrics_reference.py.
    "reference": ["lpips>=0.1.4", "scikit-image>=0.24", "torch", "torchmetrics>=1.9"],
    "dev": [
        "constriction>=0.5",
        "hypothesis>=6.100",
        "importlib_resources",  # tfds needs it to define a builder, and does not say so
        "mypy>=1.10",
        "playwright>=1.40",  # drives the system's Chromium, where there is one
        "psutil>=5.9",
        "pytest>=8,<9",  # with 9.2, pytest-xdist 3.8 ignores groups of tests
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "tensorboardX>=2.6",
    ],
}

setup(
    name="elastictok_jax",
    version=VERSION,
    description="Pretrain ElasticTok, an adaptive image and video tokenizer, in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["elastictok_jax*"]), "elastictok_jax.experiments"],
    package_dir={"elastictok_jax.experiments": "experiments"},
    package_data={
        "elastictok_jax": ["data/embedded/**/*", "data/embedded/*", "perceptual/*"],
    },
    install_requires=[
        "absl-py",
        "array-record>=0.8",
        "av>=18",
        "einops>=0.8",
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.18",
        "jax>=0.10,<0.13",
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "ml_dtypes>=0.5",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=10",
        "safetensors>=0.5",
        "simplejpeg>=1.8",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["elastictok = elastictok_jax.__main__:main"]},
)
