"""Every family does what `conformance.py` says, and families with planted faults do not."""

import types

import jax.numpy as jnp
import pytest

from elastictok_jax.config import apply_overrides, default_config, resolve_config
from elastictok_jax.models.autoencoder import AutoencoderTask
from elastictok_jax.models.base import Family
from elastictok_jax.models.registry import register_family
from tests.models import conformance, toy

register_family("toy", toy)
COMMON = {
    **{"compute.dtype": "float32", "compute.remat": "none", "video.resolution": 16},
    **{"masking.min_tokens": 1, "data.sequence_blocks": 3, "data.batch_size": 2},
    **{"loss.lpips_weight": 0.0, "optimizer.warmup_steps": 0, "optimizer.ema_decay": 0.9},
    **{"evaluation.batches": 1, "train.keep_last": 1, "mesh.data": 1},
}
ELASTICTOK = {
    **{"model.width": 16, "model.mlp_width": 24, "model.heads": 1, "model.patch": (2, 8, 8)},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "model.rope_theta": 1e4},
}
CASES = {
    "elastictok": ("elastictok", ELASTICTOK),
    "elastictok-vae": (
        "elastictok",
        ELASTICTOK | {"model.bottleneck": "vae", "model.conditioned": False},
    ),
    "toy": ("toy", {}),
}


def config_of(family, **overrides):
    config = default_config(family)
    apply_overrides(config, COMMON | {key.replace("__", "."): v for key, v in overrides.items()})
    return resolve_config(config)


SLOW = pytest.param("elastictok-vae", marks=pytest.mark.slow)  # only its bottleneck is its own


@pytest.fixture(scope="module", params=CASES)
def config(request):
    family, options = CASES[request.param]
    return config_of(family, **options)


def test_clips_do_not_see_each_other(config):
    conformance.check_clips_do_not_see_each_other(config)


def test_microbatches_add_up(config):
    conformance.check_microbatches_add_up(config)


def test_what_is_reported_is_decoded(config, tmp_path):
    conformance.check_what_is_reported_is_decoded(config, tmp_path)


def test_searches_and_budgets(config):
    conformance.check_searches_and_budgets(config)


def test_programs_compile(config):
    conformance.check_programs_compile(config)


@pytest.mark.parametrize("config", ["elastictok", "toy", SLOW], indirect=True)
def test_runs_resume_bitwise_and_are_evaluated(config, tmp_path):
    conformance.check_resume_is_bitwise(config, tmp_path)
    conformance.check_evaluation(tmp_path / "resumed", tmp_path / "report")


class RowsSeeEachOther(toy.Toy):
    def __call__(self, params, inputs, keep, segments, noise_keys):
        mixed = inputs + 0.01 * inputs.mean(axis=0)
        return super().__call__(params, mixed, keep, segments, noise_keys)


class DecodesWhatWasDropped(toy.Toy):
    def decoded(self, params, codes, keep):
        return super().decoded(params, codes, jnp.ones_like(keep))


class OwnTotals(AutoencoderTask):
    def loss(self, group, params, batch, rows_B, *, frozen, keys, totals):
        totals = self.totals(batch)
        return super().loss(group, params, batch, rows_B, frozen=frozen, keys=keys, totals=totals)


def planted(model=toy.Toy, task=AutoencoderTask):
    """Registers a faulty family, and returns its config."""

    def family(config):
        faulty = model(config)
        return Family(task(config, faulty, faulty), faulty)

    parts = dict(SECTIONS=toy.SECTIONS, check=toy.check, family=family)
    register_family("faulty", types.SimpleNamespace(**parts))
    return config_of("faulty")


def test_rows_that_see_each_other_are_found():
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        conformance.check_clips_do_not_see_each_other(planted(model=RowsSeeEachOther))


def test_a_decoder_that_sees_what_was_dropped_is_found(tmp_path):
    config = planted(model=DecodesWhatWasDropped)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        conformance.check_what_is_reported_is_decoded(config, tmp_path)


def test_microbatches_that_do_not_add_up_are_found():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        conformance.check_microbatches_add_up(planted(task=OwnTotals))
