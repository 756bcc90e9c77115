"""The patch codebook: its interface, its fit and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax.models import tokenizer
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import patch_codebook


def random_images(count, height, width, channels, seed=0):
    return (
        np.random.RandomState(seed)
        .randint(0, 256, (count, height, width, channels))
        .astype(np.uint8)
    )


def make(vocab_size=7, image_size=(8, 12), patch=4, channels=2):
    module = tokenizer.PatchCodebook(
        vocab_size=vocab_size, image_size=image_size, patch=patch, channels=channels
    )
    codebook = np.random.RandomState(1).uniform(-1, 1, (vocab_size, patch * patch * channels))
    return module, {"params": {"codebook": codebook.astype(np.float32)}}


def test_pixels_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8)
    for to_unit in (tokenizer.to_unit, jax.jit(tokenizer.to_unit)):
        unit = to_unit(pixels)
        assert unit.dtype == np.float32 and unit.min() == -1 and unit.max() == 1
        np.testing.assert_array_equal(unit, tokenizer.to_unit(pixels))
        for to_uint8 in (tokenizer.to_uint8, jax.jit(tokenizer.to_uint8)):
            back = to_uint8(unit)
            assert back.dtype == jnp.uint8
            np.testing.assert_array_equal(back, pixels)
    np.testing.assert_array_equal(tokenizer.to_uint8(jnp.array([-1.5, 2.0])), [0, 255])


def test_attributes_and_parameters():
    module, variables = make()
    assert (module.downsample, module.vocab_size) == (4, 7)
    assert module.grid((8, 12)) == (2, 3) and module.grid((32, 32)) == (8, 8)
    with pytest.raises(ValueError, match="30x32 does not divide into tokens of 4x4"):
        module.grid((30, 32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 12, 2)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_encode_finds_the_nearest_patch_row_by_row():
    module, variables = make()
    codebook = variables["params"]["codebook"]
    images = tokenizer.to_unit(random_images(5, 8, 12, 2))
    codes = jax.jit(lambda x: module.apply(variables, x, method="encode"))(images)
    assert codes.dtype == jnp.int32 and codes.shape == (5, 6)
    for image, row in zip(images, np.asarray(codes), strict=True):
        for position, code in enumerate(row):
            y, x = 4 * (position // 3), 4 * (position % 3)
            patch = image[y : y + 4, x : x + 4].reshape(-1).astype(np.float64)
            assert code == np.argmin(((codebook - patch) ** 2).sum(axis=1))


def test_decode_arranges_patches_and_encode_inverts_it():
    module, variables = make()
    codes = np.random.RandomState(2).randint(0, 7, (5, 6))
    images = module.apply(variables, codes, method="decode")
    assert images.shape == (5, 8, 12, 2) and images.dtype == jnp.float32
    np.testing.assert_array_equal(
        images[3, 4:8, 8:12].reshape(-1), variables["params"]["codebook"][codes[3, 5]]
    )
    np.testing.assert_array_equal(module.apply(variables, images, method="encode"), codes)
    np.testing.assert_array_equal(module.apply(variables, images), images)
    loud = jax.tree.map(lambda table: 3 * table, variables)
    loud_images = module.apply(loud, codes, method="decode")
    assert loud_images.min() == -1 and loud_images.max() == 1


def test_encode_refuses_images_of_another_size():
    module, variables = make()
    with pytest.raises(ValueError, match=r"images are \(8, 8, 2\), this codebook takes"):
        module.apply(variables, jnp.zeros((1, 8, 8, 2)), method="encode")


def test_unfold_is_the_same_for_numpy_and_jax():
    images = random_images(2, 8, 12, 3)
    np.testing.assert_array_equal(
        tokenizer.unfold(images, 4), tokenizer.unfold(jnp.asarray(images), 4)
    )


# The fit -----------------------------------------------------------------------------------------


def smooth_images(count=300, seed=0):
    """Black images with one soft blob each: most patches are blank, as with real digits."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:16, :16]
    centre = rng.uniform(3, 13, (2, count, 1, 1))
    blob = 300 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 4)
    return np.clip(blob, 0, 255).astype(np.uint8)[..., None]


def reconstruction_error(images, params):
    module = tokenizer.PatchCodebook(vocab_size=len(params["codebook"]), image_size=(16, 16))
    unit = tokenizer.to_unit(images)
    return float(np.mean((module.apply({"params": params}, unit) - unit) ** 2))


def test_fit_is_deterministic_and_better_with_more_prototypes():
    images = smooth_images()
    errors = []
    for vocab_size in (4, 16, 64):
        params = patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=vocab_size, seed=0)
        again = patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=vocab_size, seed=0)
        assert params["codebook"].tobytes() == again["codebook"].tobytes()
        assert params["codebook"].shape == (vocab_size, 16)
        assert params["codebook"].dtype == np.float32
        assert len(np.unique(params["codebook"], axis=0)) == vocab_size
        brightness = params["codebook"].mean(axis=1)
        assert (np.diff(brightness) >= 0).all()
        module = tokenizer.PatchCodebook(vocab_size=vocab_size, image_size=(16, 16))
        blank = module.apply({"params": params}, np.full((1, 16, 16, 1), -1.0), method="encode")
        assert (blank == 0).all()
        errors.append(reconstruction_error(images, params))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_fit_on_a_subset_of_many_patches(monkeypatch):
    images = smooth_images()
    monkeypatch.setattr(patch_codebook, "_PATCHES_FITTED", 2000)
    params = patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=64, seed=0)
    assert reconstruction_error(images, params) < 0.01
    # Where the subset holds too few distinct patches but the images do not, all are used.
    distinct = len(np.unique(tokenizer.unfold(images, 4).reshape(-1, 16), axis=0))
    monkeypatch.setattr(patch_codebook, "_PATCHES_FITTED", 50)
    assert distinct > 64
    params = patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=64, seed=0)
    assert len(np.unique(params["codebook"], axis=0)) == 64


def test_fit_refuses_more_prototypes_than_patches():
    images = np.zeros((10, 8, 8, 1), np.uint8)
    images[:5, :4] = 255
    params = patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=2, seed=0)
    np.testing.assert_array_equal(params["codebook"], [[-1] * 16, [1] * 16])
    with pytest.raises(ValueError, match="vocab_size 3 is too large: the images have only 2"):
        patch_codebook.fit_patch_codebook(images, patch=4, vocab_size=3, seed=0)
    with pytest.raises(ValueError, match="reshape"):
        patch_codebook.fit_patch_codebook(images, patch=3, vocab_size=2, seed=0)


# The file ----------------------------------------------------------------------------------------


def test_parameters_survive_the_file(tmp_path):
    params = {"codebook": np.float32([[1, 2]]), "a": {"b": {"kernel": np.arange(6).reshape(2, 3)}}}
    patch_codebook.save_params(tmp_path / "p.npz", params)
    assert [file.name for file in tmp_path.iterdir()] == ["p.npz"]
    loaded = patch_codebook.load_params(tmp_path / "p.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for array, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)
    first = (tmp_path / "p.npz").read_bytes()
    patch_codebook.save_params(tmp_path / "p.npz", params)
    assert (tmp_path / "p.npz").read_bytes() == first


def test_a_damaged_parameter_file_is_named(tmp_path):
    file = tmp_path / "p.npz"
    patch_codebook.save_params(file, {"codebook": np.random.RandomState(0).rand(9, 9)})
    raw = file.read_bytes()
    for damaged in (b"", b"text", raw[:-30], raw[:100], raw[:300] + b"?" + raw[301:]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="p.npz: missing or damaged") as error:
            patch_codebook.load_params(file)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="other.npz"):
        patch_codebook.load_params(tmp_path / "other.npz")
