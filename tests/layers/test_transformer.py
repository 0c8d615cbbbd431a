"""Remat and dtype policies, and the parameter tree."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import traverse_util

from elastictok_jax import config as config_lib
from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.layers.transformer import LayerSpec, scanned_transformer_layers
from elastictok_jax.models.elastictok.model import build_elastictok_model, init_elastictok_model
from elastictok_jax.parallel.sharding import LOGICAL_AXIS_RULES
from tests.tiny import abstract_params

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
    model = build_elastictok_model(tiny(**{"model.bottleneck": bottleneck}))
    boxed = jax.eval_shape(lambda: init_elastictok_model(model, jax.random.key(0)))
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
        model, params = build_elastictok_model(config), random_params(abstract_params(config))
        encode = jax.jit(
            lambda keep, m=model, p=params: m.apply(
                {"params": p}, patches, keep, places, method="encode"
            )
        )
        assert bool(jnp.any(encode(everything) != encode(half))) == conditioned


def test_what_is_dropped_never_reaches_the_decoder():
    model, params = build_elastictok_model(tiny()), random_params(abstract_params(tiny()))
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
        output = build_elastictok_model(config).apply({"params": params}, patches, keep, PLACES)
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
                init_elastictok_model(build_elastictok_model(c), jax.random.key(3))
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
        model, patches = build_elastictok_model(config), jnp.zeros((2, 8, 192))
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
