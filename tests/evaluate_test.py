"""The program that evaluates: its inputs, what it refuses before any network is loaded, and its
numbers against direct computation from the same features.
"""

import functools
import io
import json
import math
import pathlib
import zipfile

import jax
import numpy as np
import pytest
from helpers import QuickNetwork, exit_message, refusal
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from configs import llamagen
from mirai_jax import evaluate
from mirai_jax.config import compare
from mirai_jax.data import small_sets
from mirai_jax.evaluation import figures, image_streams, metrics
from mirai_jax.evaluation import network as network_lib
from mirai_jax.evaluation import samples as samples_lib
from mirai_jax.models.inception import InceptionV3
from mirai_jax.utils.errors import DataError
from mirai_jax.weights import inception as inception_weights
from mirai_jax.weights import pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")


def pictures(count, seed=0, size=(32, 32)):
    """Coarse squares under noise, uint8."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (count, 4, 4, 3))
    coarse = coarse.repeat(-(-size[0] // 4), 1).repeat(-(-size[1] // 4), 2)
    noise = rng.randint(0, 256, (count, *size, 3))
    return ((3 * coarse[:, : size[0], : size[1]] + noise) // 4).astype(np.uint8)


def save_npz(path, array, compressed=False, version=(1, 0), name="arr_0"):
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, np.asarray(array), version=version)
    return str(path)


def save_folder(path, images):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return str(path)


def whole(stream, chunk=5):
    return np.concatenate(list(stream.chunks(chunk)))


# Streams ------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from([1, 3]),
    chunk=st.integers(1, 12),
    compressed=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_chunks_are_the_whole(tmp_path_factory, shape, channels, chunk, compressed, version):
    images = np.random.RandomState(0).randint(0, 256, (*shape, channels)).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / "chunks.npz"
    for stream in (
        image_streams.open_stream(save_npz(path, images, compressed, version)),
        image_streams.of_array("some", images),
    ):
        assert (stream.count, stream.size) == (shape[0], shape[1:])
        for _ in range(2):  # each call begins anew
            chunks = list(stream.chunks(chunk))
            sizes = [len(c) for c in chunks]
            assert max(sizes) <= chunk and set(sizes[:-1]) <= {chunk}
            assert {c.dtype for c in chunks} == {np.dtype(np.uint8)}
            colour = images.repeat(3, axis=-1) if channels == 1 else images
            np.testing.assert_array_equal(np.concatenate(chunks), colour)


def test_a_folder_of_images(tmp_path):
    images = pictures(7, size=(6, 9))
    folder = tmp_path / "images"
    save_folder(folder / "b", images[4:])
    save_folder(folder / "a", images[:3])
    Image.fromarray(images[3][..., 0]).save(folder / "a" / "grey.PNG")
    (folder / "a" / "readme.txt").write_text("no image")
    # As extraction counts: links lead somewhere, what is hidden is not there.
    (folder / "b").rename(folder.with_name("elsewhere"))
    (folder / "b").symlink_to(folder.with_name("elsewhere"))
    save_folder(folder / ".ipynb_checkpoints", images[:1])
    Image.fromarray(images[0]).save(folder / "a" / "._000.png")
    stream = image_streams.open_stream(str(folder))
    assert (stream.count, stream.size) == (7, (6, 9))
    expected = np.concatenate([images[:3], images[3:4, ..., :1].repeat(3, -1), images[4:]])
    for chunk in (1, 3, 20):
        np.testing.assert_array_equal(whole(stream, chunk), expected)


def test_a_folder_of_samples_stands_for_its_file(tmp_path):
    images = pictures(3)
    (tmp_path / "protocol.json").write_text("{}")
    refusal(image_streams.open_stream, str(tmp_path), error=DataError)  # not finished
    save_npz(tmp_path / "samples.npz", images)
    Image.fromarray(images[0][:20]).save(tmp_path / "grid.png")  # is no sample
    np.testing.assert_array_equal(whole(image_streams.open_stream(str(tmp_path))), images)


def test_images_of_a_run(tmp_path):
    config = llamagen.get_config("demo")
    config.data.held_out = 40
    (tmp_path / "config.json").write_text(compare.to_json(config))
    streams = {s: image_streams.open_stream(f"data:{tmp_path}:{s}") for s in ("train", "held_out")}
    assert {s: (x.count, x.size) for s, x in streams.items()} == {
        "train": (4960, (32, 32)),
        "held_out": (40, (32, 32)),
    }
    real = small_sets.load_images("mnist", split="held_out", held_out=40).images
    np.testing.assert_array_equal(whole(streams["held_out"]), real.repeat(3, axis=-1))
    config.data.held_out = 0
    (tmp_path / "config.json").write_text(compare.to_json(config))
    for spec in (f"data:{tmp_path}", f"data:{tmp_path}:test", "data:train", "data:none:train"):
        assert spec in refusal(image_streams.open_stream, spec)
    assert "data.held_out" in refusal(image_streams.open_stream, f"data:{tmp_path}:held_out")


# Wrong input --------------------------------------------------------------------------------------

NUMBERS = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023)}
NUMBERS["sigma_s"] = np.broadcast_to(np.float64(0), (2023, 2023))


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(samples_lib, "Network", None)


def refused(samples, reference, inception=""):
    arguments = [str(samples)], str(reference), inception, 4, "nowhere"
    message = refusal(samples_lib.evaluate, *arguments, error=DataError)
    assert not pathlib.Path("nowhere").exists()
    return message


def test_wrong_images_are_refused(no_network, tmp_path):
    right = pictures(5)
    good, wrong = save_npz(tmp_path / "good.npz", right), tmp_path / "wrong.npz"
    others = [right / 255, right[..., 0], right[:0], np.asfortranarray(right), right[:, :16]]
    for images in (*others, np.array([{}, None, "x", 4])):
        np.savez(wrong, images)
        for pair in ((wrong, good), (good, wrong)):
            assert "wrong.npz" in refused(*pair)


def test_what_holds_no_images_is_refused(no_network, tmp_path):
    good = save_npz(tmp_path / "good.npz", pictures(5))
    raw = pathlib.Path(good).read_bytes()
    array = io.BytesIO()
    np.save(array, pictures(5))
    file = tmp_path / "file.npz"
    for content in (raw[: len(raw) // 2], raw[:-1000], b"", b"<!DOCTYPE html>", array.getvalue()):
        file.write_bytes(content)
        for pair in ((good, file), (file, good)):
            assert "file.npz" in refused(*pair) and "file.npz" in refused(*pair, "weights.pth")
    save_npz(file, pictures(5), name="images")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for path in (file, tmp_path / "none", tmp_path / "empty"):
        assert path.name in refused(path, good) and path.name in refused(good, path)


def test_folders_of_mixed_sizes_or_without_a_whole_image_are_refused(no_network, tmp_path):
    good = save_npz(tmp_path / "good.npz", pictures(5))
    folder = tmp_path / "mixed"
    save_folder(folder, pictures(5))
    Image.fromarray(pictures(1, size=(32, 30))[0]).save(folder / "other.png")
    assert "other.png" in refused(folder, good)
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    assert "mixed" in refused(good, folder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"mu_s": None}, "mu_s"),
        ({"mu": np.full(2048, np.nan)}, "mu"),
        ({"sigma": np.zeros((2, 2048))}, "sigma"),
        ({"mu": np.array(["x"] * 2048)}, ""),
    ],
)
def test_wrong_statistics_are_refused(no_network, tmp_path, changes, named):
    good, reference = save_npz(tmp_path / "good.npz", pictures(5)), tmp_path / "reference.npz"
    arrays = {k: v for k, v in (NUMBERS | changes).items() if v is not None}
    np.savez(reference, **arrays)
    message = refused(good, reference, inception="weights.pth")
    assert named in message and "reference.npz" in message
    assert "reference.npz" in refused(good, reference)  # EfficientNet cannot use Inception's
    np.savez(reference, arr_0=pictures(5), **arrays)
    assert named in refused(good, reference, inception="weights.pth")


# As a program -------------------------------------------------------------------------------------


def program(*arguments):
    flags = evaluate._FLAGS
    flags.unparse_flags()
    evaluate.main(flags(["evaluate", *map(str, arguments)]))


error = functools.partial(exit_message, program)


def test_wrong_arguments_are_one_line(no_network, tmp_path):
    good = save_npz(tmp_path / "good.npz", pictures(5))
    both = [f"--samples={good}", f"--reference={good}"]
    statistics = f"--save_statistics={tmp_path / 'no' / 'such.npz'}"
    assert "--reference" in error("--samples=a.npz") and "extra" in error(*both, "extra")
    assert "--inception" in error(*both, statistics)
    assert "such.npz" in error(*both, statistics, "--inception=x.pth")
    for out in (good, f"{good}/below"):  # a file, not a folder
        assert out in error(*both, f"--out={out}")
    assert not (tmp_path / "results.json").exists()


def samples_folder(folder, images, guidance):
    folder.mkdir()
    save_npz(folder / "samples.npz", images)
    protocol = {"num_images": len(images), "guidance": guidance, "seed": 5, "step": 40}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return str(folder)


@pytest.mark.slow
def test_efficientnet_compares_samples_at_two_scales(tmp_path, capsys):
    images = pictures(8)
    one = samples_folder(tmp_path / "one", images, 1.0)
    two = samples_folder(tmp_path / "two", 255 - images // 3, 4.0)
    reference = save_folder(tmp_path / "real", images)
    program(f"--samples={one},{two}", f"--reference={reference}", "--batch_size=1")
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = results["rows"]
    assert first["features"] == "efficientnet-lite0" and second["reference"] == reference
    assert (first["samples"], first["num_images"]) == (one, 8)
    assert first["sha256"] == pretrained.sha256_of_file(f"{one}/samples.npz")
    assert second["protocol"] == {"num_images": 8, "guidance": 4.0, "seed": 5, "step": 40}
    first, second = first["metrics"], second["metrics"]
    names = [f"efficientnet_lite0_{name}" for name in ("precision", "recall")]
    assert list(first) == list(second) == ["frechet_efficientnet_lite0", *names]
    (same, *whole), (different, precision, _) = first.values(), second.values()
    assert same < 1e-6 * different and different > 0.01
    assert whole == [1, 1] and precision < 1

    printed = capsys.readouterr().out
    everything = printed + (tmp_path / "results.json").read_text()
    assert "fid" not in everything.lower() and "inception" not in everything.lower()
    assert "warning: samples: 8 images are too few" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert table[2].startswith(f"| {one} | 8 |") and f"{different:.4g}" in table[3]
    with Image.open(tmp_path / "sweep.png") as figure:
        assert figure.width > 1000 and len(np.unique(np.asarray(figure).reshape(-1, 4), axis=0)) > 9


def test_samples_that_differ_in_more_than_guidance_are_different_curves():
    def row(**fields):
        return {"protocol": fields, "metrics": {}}

    one = [row(guidance=g, workdir="e", seed=0, weights_sha256="1") for g in (1.0, 2.0)]
    other = [row(guidance=g, workdir="i", seed=0, weights_sha256="2") for g in (1.0, 2.0)]
    assert figures._curves(one, "guidance") == {"(1)": one}
    mixed = [one[0], other[0], one[1], other[1]]
    assert figures._curves(mixed, "guidance") == {"workdir e": one, "workdir i": other}
    third = row(guidance=1.0, workdir="i", seed=0, weights_sha256="3")  # trained again
    labels = ["workdir e", "workdir i (2)", "workdir i (3)"]
    assert list(figures._curves([*mixed, third], "guidance")) == labels


# Inception ----------------------------------------------------------------------------------------

REAL = pictures(6, seed=1)
# Much like one of them: precise, of low recall.
FAKE = REAL[:1] // 8 * 7 + pictures(12, seed=2) // 8
POOL, SPATIAL = 40, 30  # of all features: the roots of 2048 x 2048 would take most of a minute


@pytest.fixture(scope="module")
def network():
    """Inception of random weights over two devices, which keeps its outputs."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    rng = np.random.RandomState(0)

    def draw(path, leaf):
        scale = math.sqrt(2 / math.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.1
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, tree)

    def narrow(params, images):
        out = InceptionV3().apply({"params": params}, images)
        return out.pool[:, :POOL], out.spatial[:, :SPATIAL], out.probabilities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "load", lambda path: params)
        patch.setattr(network_lib, "_inception", narrow)
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
        made = network_lib.Network("weights.pth", 2)
    made.outputs = []
    return made


@pytest.fixture
def use_network(network, monkeypatch):
    call = network_lib.Network.__call__

    def recorded(self, images):
        self.outputs.append(call(self, images))
        return self.outputs[-1]

    network.outputs.clear()
    shapes = {"mu": (POOL,), "sigma": (POOL, POOL)}
    shapes |= {"mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
    monkeypatch.setattr(image_streams, "_SHAPES", shapes)
    monkeypatch.setattr(network_lib.Network, "__call__", recorded)
    monkeypatch.setattr(samples_lib, "Network", lambda inception, batch_size: network)
    return network


def moments_of(features):
    """Mean and covariance."""
    return np.float64(features).mean(axis=0), np.cov(np.float64(features), rowvar=False)


def test_inception_metrics_are_those_of_its_outputs(use_network, tmp_path):
    fake, real = save_npz(tmp_path / "fake.npz", FAKE), save_npz(tmp_path / "real.npz", REAL)
    saved = tmp_path / "statistics.npz"
    # The file of the weights is asked for by the network alone, which is here already.
    flags = [f"--samples={fake}", "--inception=weights.pth", "--batch_size=2"]
    program(*flags, f"--reference={real}", f"--save_statistics={saved}")
    assert [len(x[0]) for x in use_network.outputs] == [4, 2, 4, 4, 4]
    (real_pool, real_spatial, _), (pool, spatial, probabilities) = (
        [np.concatenate(part) for part in zip(*use_network.outputs[chosen], strict=True)]
        for chosen in (slice(2), slice(2, 5))
    )
    assert probabilities.shape == (12, 1008) and (real_pool.std(axis=0) > 0).mean() > 0.5

    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert row["features"] == "inception-v3 2015-12-05"
    assert row["reference_sha256"] == pretrained.sha256_of_file(real)
    found = row["metrics"]
    assert row["protocol"] == {} and row["num_images"] == 12
    distance = lambda one, other: metrics.frechet_distance(*moments_of(one), *moments_of(other))
    score, deviation = metrics.inception_score(probabilities)
    precision, recall = metrics.precision_recall(real_pool, pool)
    expected = {"fid": distance(pool, real_pool), "sfid": distance(spatial, real_spatial)}
    expected |= {"inception_score": score, "inception_score_std": deviation}
    expected |= {"precision": precision, "recall": recall}
    assert list(found) == list(expected) and found == pytest.approx(expected, rel=1e-6)
    assert min(found["fid"], found["sfid"]) > 1e-3 and score > 1 + 1e-6 and precision > recall
    assert not (tmp_path / "sweep.png").exists()

    with np.load(saved) as file:
        names = ("mu", "sigma", "mu_s", "sigma_s")
        wanted = (*moments_of(real_pool), *moments_of(real_spatial))
        for name, want in zip(names, wanted, strict=True):
            np.testing.assert_allclose(file[name], want, rtol=1e-5, atol=1e-12)
    # Statistics stand for the images in both distances, and cannot in the others.
    program(*flags, f"--reference={saved}", f"--out={tmp_path / 'again'}")
    (row,) = json.loads((tmp_path / "again" / "results.json").read_text())["rows"]
    stored = row["metrics"]
    assert list(stored) == ["fid", "sfid", "inception_score", "inception_score_std"]
    assert stored == pytest.approx({name: found[name] for name in stored}, rel=1e-6)
    assert len(use_network.outputs) == 8
    # Without those of the spatial features sFID alone is left out.
    with np.load(saved) as file:
        np.savez(saved, mu=file["mu"], sigma=file["sigma"])
    program(*flags, f"--reference={saved}", f"--out={tmp_path / 'half'}")
    (row,) = json.loads((tmp_path / "half" / "results.json").read_text())["rows"]
    assert row["metrics"] == pytest.approx({n: x for n, x in stored.items() if n != "sfid"})


def test_a_later_evaluation_loses_nothing_of_an_earlier_one(use_network, tmp_path):
    """FID, then copies, then classes, then another reference, each by another command."""
    fake, real = tmp_path / "fake.npz", tmp_path / "real.npz"
    np.savez(fake, arr_0=FAKE, labels=np.arange(12) % 2)
    np.savez(real, arr_0=REAL, labels=np.arange(6) % 2)
    flags = [f"--samples={fake}", "--inception=weights.pth"]
    read = lambda: json.loads((tmp_path / "results.json").read_text())["rows"]
    program(*flags, f"--reference={real}")
    (first,) = read()
    # As earlier versions wrote it.
    beside = {name: first.pop(name) for name in ("features", "reference", "reference_sha256")}
    (tmp_path / "results.json").write_text(json.dumps({**beside, "rows": [first]}))
    program(*flags, f"--reference={real}", f"--training={real}")
    program(*flags, f"--reference={real}", "--by_class")
    (row,) = read()
    assert row.items() >= (first | beside).items() and row.keys() >= {"copies", "by_class"}
    other = save_npz(tmp_path / "other.npz", pictures(6, seed=3))
    program(*flags, f"--reference={other}")
    assert read()[0] == row and [r["reference"] for r in read()] == [str(real), other]
    np.savez(fake, arr_0=FAKE[::-1] // 2)  # drawn again: what was found of the others is not theirs
    program(*flags, f"--reference={real}")
    assert read()[0] == row and len(read()) == 3 and "copies" not in read()[2]
    (tmp_path / "results.json").write_text("[]")
    assert "results.json" in error(*flags, f"--reference={real}")


def test_classes_are_left_out_where_images_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples_lib, "Network", QuickNetwork)
    np.savez(tmp_path / "fake.npz", arr_0=FAKE, labels=np.arange(12) % 2)
    for name in "ab":
        save_folder(tmp_path / "real" / name, REAL)
    broken = tmp_path / "real" / "a" / "003.png"
    broken.write_bytes(broken.read_bytes()[:-500])
    flags = f"--samples={tmp_path / 'fake.npz'}", f"--reference={tmp_path / 'real'}"
    program(*flags, "--by_class")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["metrics"]["frechet_efficientnet_lite0"] > 0 and "by_class" not in row
    assert "003.png" in capsys.readouterr().out


def test_what_was_evaluated_before_a_damage_is_kept(use_network, tmp_path):
    good = samples_folder(tmp_path / "good", pictures(4), 1.0)
    bad = samples_folder(tmp_path / "bad", pictures(4), 2.0)
    file = tmp_path / "bad" / "samples.npz"
    raw = bytearray(file.read_bytes())
    raw[300] ^= 1  # inside the pixels
    file.write_bytes(raw)
    flags = [f"--reference={good}", "--inception=weights.pth"]
    assert "bad" in error(f"--samples={good},{bad}", *flags)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["samples"] == good
