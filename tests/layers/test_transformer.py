"""Rotary positions at any range, remat and dtype policies, and the parameter tree."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import config as config_lib
from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.layers.transformer import (
    LayerSpec,
    apply_rotary_embedding,
    rotary_pairs_to_halves,
    scanned_transformer_layers,
)
from elastictok_jax.models.elastictok.model import build_elastictok, init_elastictok_params
from elastictok_jax.parallel.sharding import LOGICAL_AXIS_RULES
from tests.tiny import abstract_params

THETA, HEAD_WIDTH = 5e7, 128  # of the published FSQ model
SPEC = LayerSpec(
    width=16,
    mlp_width=24,
    heads=2,
    rope_theta=1e4,
    norm_eps=1e-5,
    attention="blockwise",
    remat="none",
    mlp_chunk_tokens=0,
    dtype=jnp.float32,
)
PLACES = SequenceLayout(
    positions_S=jnp.arange(8, dtype=jnp.int32),
    segments_BS=jnp.array([[1] * 6 + [0] * 2, [1] * 4 + [2] * 4], jnp.int32),
    tokens_per_block=4,
)


def unit_vectors(seed, count=2):
    vectors = np.random.default_rng(seed).normal(size=(count, HEAD_WIDTH))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@jax.jit
def rotated(vectors_SK, positions_S):
    return apply_rotary_embedding(vectors_SK[None, :, None], positions_S, theta=THETA)[0, :, 0]


def score(query, key, query_position, key_position):
    both = rotated(
        jnp.asarray([query, key], jnp.float32), jnp.array([query_position, key_position])
    )
    return float(np.asarray(both[0], np.float64) @ np.asarray(both[1], np.float64))


def rotate_pairs_float64(vectors, positions):
    """The published convention: dims 2i and 2i + 1 turn by position * theta ** (-2i / K)."""
    out = np.zeros(vectors.shape)
    dims = vectors.shape[-1]
    for row, position in enumerate(positions):
        for i in range(dims // 2):
            angle = float(position) * THETA ** (-2 * i / dims)
            a, b = vectors[row, 2 * i], vectors[row, 2 * i + 1]
            out[row, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
            out[row, 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


@given(
    position=st.integers(0, 2**20),
    distance=st.integers(0, 2**20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_scores_depend_on_distance_alone(position, distance, seed):
    query, key = unit_vectors(seed)
    near = score(query, key, 0, distance)
    far = score(query, key, position, position + distance)
    assert far == pytest.approx(near, abs=1e-5)


def test_distance_matters():
    query, key = unit_vectors(0)
    at_zero = score(query, key, 1000, 1000)
    assert at_zero == pytest.approx(query @ key, abs=1e-5)
    assert abs(score(query, key, 1000, 1001) - at_zero) > 1e-3


@pytest.mark.parametrize(
    ("positions", "tolerance"),
    [
        (range(64), 1e-6),
        # Frequencies are whole multiples of 2^-32 turns: at position p the angle is off by at
        # most p 2^-33 turns, 8e-4 rad at a million, the same for query and key.
        (range(2**20 - 64, 2**20), 2**20 * 2.0**-33 * 2 * np.pi),
    ],
)
def test_rotation_is_the_published_one(positions, tolerance):
    vectors = unit_vectors(1, count=64)
    want = rotary_pairs_to_halves(
        jnp.asarray(rotate_pairs_float64(vectors, positions), jnp.float32)
    )
    halves = rotary_pairs_to_halves(jnp.asarray(vectors, jnp.float32))
    got = rotated(halves, jnp.asarray(positions, jnp.int32))
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    norms = np.linalg.norm(np.asarray(got, np.float64), axis=-1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_pairs_to_halves_puts_even_dims_first():
    kernel = jnp.arange(24).reshape(3, 8)
    want = np.concatenate([kernel[:, 0::2], kernel[:, 1::2]], axis=1)
    np.testing.assert_array_equal(rotary_pairs_to_halves(kernel), want)


def test_rotation_keeps_dtype_and_computes_in_float32():
    vectors = jnp.asarray(unit_vectors(2, count=3), jnp.bfloat16)
    positions = jnp.array([0, 2**20 - 1, 2**20])
    got = rotated(vectors, positions)
    assert got.dtype == jnp.bfloat16
    want = rotated(vectors.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)


def layers_and_input(**changes):
    layers = scanned_transformer_layers(2, dataclasses.replace(SPEC, **changes))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    return layers, x


def random_params(shapes):
    """Normal weights of any tree of shapes; much faster than compiling the initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32), shapes
    )


@pytest.fixture(scope="module")
def plain():
    """Params, output and gradients without rematerialisation."""
    layers, x = layers_and_input()
    shapes = nn.meta.unbox(jax.eval_shape(layers.init, jax.random.key(0), x, PLACES))
    params = random_params(shapes)
    return params, *outputs_and_grads(layers, params, x)


def outputs_and_grads(layers, params, x):
    def total(params, x):
        out, _ = layers.apply(params, x, PLACES)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)
    return out, grads


@pytest.mark.parametrize("remat", ["dots", "attention", "offload", "full"])
def test_remat_changes_no_number(plain, remat):
    params, want_out, want_grads = plain
    layers, x = layers_and_input(remat=remat)
    out, grads = outputs_and_grads(layers, params, x)
    np.testing.assert_allclose(out, want_out, atol=1e-6, rtol=1e-6)
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True)
    for got, want in leaves:
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
        assert np.abs(want).max() > 0


def saved_bytes(remat):
    """What the backward pass is handed, by abstract evaluation."""
    layers, x = layers_and_input(remat=remat)
    params = nn.meta.unbox(jax.eval_shape(layers.init, jax.random.key(0), x, PLACES))
    _, backward = jax.eval_shape(
        lambda params: jax.vjp(lambda p: layers.apply(p, x, PLACES)[0], params), params
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_remat_saves_less_and_less():
    sizes = [saved_bytes(remat) for remat in ("full", "attention", "dots", "none")]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_feed_forward_in_chunks_changes_no_number(plain, chunk):
    params, want_out, want_grads = plain
    layers, x = layers_and_input(mlp_chunk_tokens=chunk)
    fresh = nn.meta.unbox(jax.eval_shape(layers.init, jax.random.key(0), x, PLACES))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    out, grads = outputs_and_grads(layers, params, x)
    np.testing.assert_allclose(out, want_out, atol=1e-6, rtol=1e-6)
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True)
    for got, want in leaves:
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_a_scan_is_its_layers_in_turn(plain):
    """Two scanned layers equal the same two layers applied one by one."""
    params, want, _ = plain
    _, x = layers_and_input()
    one = scanned_transformer_layers(1, SPEC)
    for index in range(2):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], params)
        x, _ = one.apply(layer, x, PLACES)
    np.testing.assert_allclose(x, want, atol=1e-6, rtol=1e-6)


def test_bfloat16_computes_in_bfloat16_on_float32_params(plain):
    params, want, _ = plain
    layers, x = layers_and_input(dtype=jnp.bfloat16)
    fresh = jax.eval_shape(layers.init, jax.random.key(0), x, PLACES)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    x = x.astype(jnp.bfloat16)
    out = jax.jit(lambda x: layers.apply(params, x, PLACES)[0])(x)
    assert out.dtype == jnp.bfloat16
    _, grads = jax.eval_shape(lambda p, x: outputs_and_grads(layers, p, x), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads[0])} == {jnp.dtype("float32")}
    error = np.asarray(out, np.float64) - np.asarray(want, np.float64)
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.02 * np.std(want)  # rounded, and not by more


def tiny(**overrides):
    config = config_lib.default_config()
    sizes = {"width": 16, "mlp_width": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 3}
    sizes = {f"model.{key}": value for key, value in sizes.items()}
    config_lib.apply_overrides(
        config, sizes | {"compute.dtype": "float32", "compute.remat": "none"}
    )
    config_lib.apply_overrides(config, overrides)
    return config_lib.resolve_config(config)


@pytest.mark.parametrize("bottleneck", ["fsq", "vae"])
def test_every_parameter_has_logical_axes_that_the_rules_know(bottleneck):
    model = build_elastictok(tiny(**{"model.bottleneck": bottleneck}))
    boxed = jax.eval_shape(lambda: init_elastictok_params(model, jax.random.key(0)))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    known = {name for name, _ in LOGICAL_AXIS_RULES}
    assert len(leaves) > 20
    for leaf in leaves:
        assert isinstance(leaf, nn.Partitioned), leaf
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= known


def paths(tree):
    return {"/".join(key): leaf.shape for key, leaf in traverse_util.flatten_dict(tree).items()}


def test_conditioning_adds_two_vectors_and_nothing_else():
    conditioned = paths(abstract_params(tiny()))
    plain = paths(abstract_params(tiny(**{"model.conditioned": False})))
    added = {"encoder/kept_embed": (16,), "encoder/dropped_embed": (16,)}
    assert conditioned == plain | added
    assert not plain.keys() & added.keys()


def test_sizes_follow_the_config():
    shapes = paths(abstract_params(tiny(**{"model.patch": "2,4,4"})))
    assert shapes["encoder/in_proj/kernel"] == (2 * 4 * 4 * 3, 16)
    assert shapes["encoder/out_proj/kernel"] == (16, 6)
    assert shapes["decoder/in_proj/kernel"] == (6, 16)
    assert shapes["encoder/layers/attention/query/kernel"] == (2, 16, 2, 8)
    assert shapes["decoder/layers/mlp/down/kernel"] == (3, 24, 16)
    vae = paths(abstract_params(tiny(**{"model.bottleneck": "vae", "model.vae_dim": 5})))
    assert vae["encoder/out_proj/kernel"] == (16, 10)  # mean and log-variance
    assert vae["decoder/in_proj/kernel"] == (5, 16)


def test_conditioned_encoder_reads_the_mask_and_the_other_does_not():
    places = dataclasses.replace(PLACES, segments_BS=jnp.ones((2, 8), jnp.int32))
    patches = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 8, 192)), jnp.float32)
    everything, half = jnp.ones((2, 8), bool), jnp.arange(8)[None].repeat(2, 0) % 4 < 2
    for conditioned in (True, False):
        config = tiny(**{"model.conditioned": conditioned, "model.bottleneck": "vae"})
        model, params = build_elastictok(config), random_params(abstract_params(config))
        encode = jax.jit(
            lambda keep, m=model, p=params: m.apply(
                {"params": p}, patches, keep, places, method="encode"
            )
        )
        assert bool(jnp.any(encode(everything) != encode(half))) == conditioned


def test_what_is_dropped_never_reaches_the_decoder():
    model, params = build_elastictok(tiny()), random_params(abstract_params(tiny()))
    keep = jnp.arange(8)[None].repeat(2, 0) % 4 < 2
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 64000, (2, 8)), jnp.int32)
    decode = jax.jit(
        lambda codes: model.apply({"params": params}, codes, keep, PLACES, method="decode")
    )
    other = jnp.where(keep, codes, 64000 - 1 - codes)
    np.testing.assert_array_equal(decode(codes), decode(other))
    assert np.any(np.asarray(decode(codes)) != np.asarray(decode(64000 - 1 - codes)))


QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time


def both_layouts():
    sizes = {"model.encoder_layers": 1, "model.decoder_layers": 2}
    return tiny(**sizes), tiny(**sizes, **{"compute.scan_layers": False})


def test_layers_stacked_or_apart_are_the_same_model():
    """From the same weights, the forward pass and all gradients agree to rounding."""
    stacked, apart = both_layouts()
    params = stack_or_unstack(random_params(abstract_params(stacked)), stacked=False)
    assert paths(params) == paths(abstract_params(apart))
    assert len(params["decoder"].keys() & {"layers_0", "layers_1"}) == 2
    patches = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 8, 192)), jnp.float32)
    keep = jnp.arange(8)[None].repeat(2, 0) % 4 < 3

    def loss(params, config):
        output = build_elastictok(config).apply({"params": params}, patches, keep, PLACES)
        return jnp.mean(output.reconstruction**2), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=QUICK)
    frozen = [ml_collections.FrozenConfigDict(config) for config in (stacked, apart)]
    grads, output = run(stack_or_unstack(params, stacked=True, stack=jnp.stack), frozen[0])
    apart_grads, apart_output = run(params, frozen[1])
    np.testing.assert_array_equal(apart_output.codes, output.codes)
    np.testing.assert_allclose(
        apart_output.reconstruction, output.reconstruction, atol=1e-6, rtol=1e-6
    )
    want = stack_or_unstack(jax.device_get(grads), stacked=False)
    for got, expected in zip(jax.tree.leaves(apart_grads), jax.tree.leaves(want), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(got, expected, atol=1e-5 * scale, rtol=0)


def test_initial_weights_do_not_depend_on_the_layout():
    stacked, apart = (
        jax.jit(
            lambda c=config: nn.meta.unbox(
                init_elastictok_params(build_elastictok(c), jax.random.key(3))
            ),
            compiler_options=QUICK,
        )()
        for config in both_layouts()
    )
    want = stack_or_unstack(jax.device_get(stacked), stacked=False)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(apart), want)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_layers_apart_are_rematerialised_too(remat):
    def saved(remat):
        config = tiny(**{"compute.scan_layers": False, "compute.remat": remat})
        model, patches = build_elastictok(config), jnp.zeros((2, 8, 192))
        _, backward = jax.eval_shape(
            lambda params: jax.vjp(
                lambda p: (
                    model.apply(
                        {"params": p}, patches, jnp.ones((2, 8), bool), PLACES
                    ).reconstruction
                ),
                params,
            ),
            abstract_params(config),
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert saved(remat) < saved("none")
