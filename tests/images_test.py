"""Sources of images: what is found, under which names, and what is refused."""

import functools
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import types
from concurrent import futures

import grain
import helpers
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirai_jax.data import crops
from mirai_jax.data import images as sources
from mirai_jax.utils.errors import DataError

refusal = functools.partial(helpers.refusal, error=DataError)


def pixels(height=6, width=7, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def put(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


def same(a, b):
    return type(a) is type(b) and (a == b if isinstance(a, bytes) else np.array_equal(a, b))


def contents(source):
    """(key, label, image) of every image."""
    found = []
    for i in range(len(source)):
        image, *about = source.example(i)
        assert source.about(i) == tuple(about)
        found.append((about[1], about[0], image))
    return found


def key(source, index):
    return source.about(index)[1]


# Folders -----------------------------------------------------------------------------------------


def write_tree(root):
    """A folder with every kind of file; returns {key: (label, bytes)} in order."""
    image = pixels()
    grey = image[..., 0]
    files = {
        "B/a.JPEG": encoded(image, "JPEG"),
        "a/0.bmp": encoded(image, "BMP"),
        "a/1.GIF": encoded(grey, "GIF"),
        "a/10.png": encoded(image, "PNG"),
        "a/2.jpeg": encoded(grey, "JPEG"),
        "a/Z.jpg": encoded(image, "JPEG"),
        "a/ä.pgm": encoded(grey, "PPM"),
        "a/deep/x.ppm": encoded(image, "PPM"),
        "a/deep-er/x.tif": encoded(image, "TIFF"),
        "a/deep/inner/x.tiff": encoded(grey, "TIFF"),
        "é f/broken.webp": b"no image",
        "é f/x.webp": encoded(image, "WEBP"),
    }
    others = ["B/notes.txt", "README", "a/deep/Makefile", "loose.png"]
    hidden = ["a/.hidden.png", ".git/x.png", "a/.cache/x.png", "a/._10.png", ".DS_Store"]
    put(root, dict.fromkeys(others + hidden, b"?") | files)
    return {key: ("Baé".index(key[0]), raw) for key, raw in files.items()}, others


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path):
    files, others = write_tree(tmp_path)
    source = sources.open_images(str(tmp_path))
    # Classes by code points; folders by path ('-' comes before '/'), then files.
    assert source.class_names == ("B", "a", "é f")
    assert contents(source) == [(key, label, raw) for key, (label, raw) in files.items()]
    assert source.skipped == tuple(sorted(others))
    want = {"kind": "folder", "name": tmp_path.name, "split": "", "number": 12}
    assert source.describe() == want


def test_finding_by_key_lists_nothing(tmp_path, monkeypatch):
    files, _ = write_tree(tmp_path)

    def scandir(folder):
        raise AssertionError("listed")

    monkeypatch.setattr(os, "scandir", scandir)
    source = sources.open_images(str(tmp_path))
    pickled = pickle.dumps(source)
    for key, (_, raw) in files.items():
        assert source.find(key) == pickle.loads(pickled).find(key) == raw
    assert len(pickled) < 500
    with pytest.raises(AssertionError, match="listed"):
        len(source)


def test_a_folder_may_move_and_the_program_may_change_its_folder(tmp_path, monkeypatch):
    write_tree(tmp_path / "one")
    before = contents(sources.open_images(str(tmp_path / "one")))
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    source = sources.open_images("two/")
    monkeypatch.chdir("/")
    assert contents(source) == before and source.describe()["name"] == "two"
    assert pickle.loads(pickle.dumps(source)).find("B/a.JPEG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sources.open_images("~/two")) == 12


def test_linked_folders_and_files_are_followed(tmp_path):
    put(tmp_path, {"store/x/1.png": b"", "store/x/2": b""})
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "a").symlink_to(tmp_path / "store")
    (root / "b" / "one.png").symlink_to(tmp_path / "store/x/1.png")
    source = sources.open_images(str(root))
    assert [key(source, i) for i in range(len(source))] == ["a/x/1.png", "b/one.png"]
    assert source.example(1)[0] == b""


@pytest.mark.parametrize("target", [".", "..", "../b"])
def test_a_circle_of_links_is_refused(tmp_path, target):
    put(tmp_path, {"a/1.png": b"", "b/1.png": b""})
    (tmp_path / "a" / "link").symlink_to(target)
    (tmp_path / "b" / "link").symlink_to("../a")
    assert "links to a folder that contains it" in refusal(len, sources.open_images(str(tmp_path)))


def test_a_wrong_folder_is_refused(tmp_path):
    source = lambda: sources.open_images(str(tmp_path))
    put(tmp_path, {"1.png": b""})
    refusal(len, source())  # no class
    put(tmp_path, {"a/notes.txt": b"", "b/1.png": b""})
    assert "'a'" in refusal(len, source())
    put(tmp_path, {"a/1.png": b""})
    (tmp_path / "a" / os.fsdecode(b"\xff.png")).touch()
    assert r"\xff" in refusal(len, source())
    gone = source()
    shutil.rmtree(tmp_path)
    refusal(len, gone)


@settings(deadline=None, derandomize=True)
@given(st.text() | st.lists(st.sampled_from(["..", ".", "a", "1.png", ""])).map("/".join))
@example("/etc/passwd")
@example("a/../../1.png")
@example("a\0")
@example(3)
def test_any_key_is_an_image_of_the_folder_or_a_data_error(tmp_path_factory, key):
    root = tmp_path_factory.getbasetemp() / "keys"
    if not root.exists():
        put(root, {"root/a/1.png": b"1", "root/1.png": b"1", "1.png": b"outside"})
    try:
        assert sources.open_images(str(root / "root")).find(key) == b"1"
    except DataError as error:
        assert "\n" not in str(error)


# tensorflow_datasets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Small data sets, prepared as ArrayRecord without TensorFlow."""
    import tensorflow_datasets as tfds

    folder = str(tmp_path_factory.mktemp("tfds"))

    def prepare(name, features, **of):
        """Prepares the data set `name` with `features`; `of` makes those of an image."""
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), **features})
        of["image"] = lambda k: io.BytesIO(encoded(pixels(seed=k), "PNG"))
        generate = lambda n: ((k, {name: made(k) for name, made in of.items()}) for k in range(n))
        body = {
            "VERSION": tfds.core.Version("1.2.0"),
            "code_path": None,  # else tfds looks for checksums beside this file
            "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
            "_split_generators": lambda self, _: {"train": generate(5), "test": generate(2)},
            "_generate_examples": None,
        }
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()

    text, classes = tfds.features.Text(), tfds.features.ClassLabel(names=["cat", "dog"])
    named = {"label": classes, "file_name": text}
    prepare("NamedPhotos", named, label=lambda k: k % 2, file_name=lambda k: f"img_{k}.png")
    prepare("PlainPhotos", {"label": np.int64}, label=lambda k: k)
    prepare("BarePhotos", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", folder)
        yield folder


def test_tfds_without_tensorflow(tfds_folder):
    source = sources.open_images("tfds:named_photos")
    assert source.class_names == ("cat", "dog") and source.skipped == ()
    found = contents(source)
    assert [key.partition(":")[0] for key, *_ in found] == list("01234")
    seeds = [int(key.partition(":img_")[2].removesuffix(".png")) for key, *_ in found]
    assert sorted(seeds) == list(range(5))  # tfds shuffles when it prepares
    for seed, (_, label, raw) in zip(seeds, found, strict=True):
        assert raw == encoded(pixels(seed=seed), "PNG") and label == seed % 2
    want = {"kind": "tfds", "name": "named_photos/1.2.0", "split": "train", "number": 5}
    assert source.describe() == want
    assert "tensorflow" not in sys.modules


def test_tfds_splits_and_versions(tfds_folder):
    assert len(sources.open_images("tfds:named_photos:train[1:3]+test")) == 4
    source = sources.open_images("tfds:named_photos:1.*.*:test")
    assert source.describe()["split"] == "test" and len(source) == 2
    for wrong in ("named_photos:nope", "named_photos:train[", "named_photos:9.9.9", "imagenet2012"):
        assert wrong.split(":")[0] in refusal(sources.open_images, f"tfds:{wrong}")


def test_tfds_without_names_of_files_and_classes(tfds_folder):
    source = sources.open_images("tfds:plain_photos")
    found = contents(source)
    assert [key for key, *_ in found] == list("01234") and source.class_names == ()
    assert sorted(label for _, label, _ in found) == list(range(5))


def test_tfds_without_labels_or_of_floats_is_refused(tfds_folder, tmp_path, monkeypatch):
    assert "'label'" in refusal(sources.open_images, "tfds:bare_photos")
    # tfds stores images of floats as the bytes of another image.
    shutil.copytree(f"{tfds_folder}/plain_photos", tmp_path / "plain_photos")
    features = tmp_path / "plain_photos" / "1.2.0" / "features.json"
    features.write_text(features.read_text().replace('"uint8"', '"float32"').replace('"3"', '"1"'))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "of integers" in refusal(sources.open_images, "tfds:plain_photos")


# Python objects ----------------------------------------------------------------------------------


class Random:
    """Random access to five items; the class is also a factory."""

    def __init__(self, **changes):
        self._changes = changes

    def __len__(self):
        return 5

    def __getitem__(self, index):
        item = {"image": encoded(pixels(seed=index), "PNG"), "label": index % 3}
        return item | {name: of(index) for name, of in self._changes.items()}


@pytest.fixture
def module(monkeypatch):
    """A module 'my.photos' with sources in it."""
    made = types.ModuleType("my.photos")
    made.ready = Random()
    made.Random = Random
    made.named = lambda: Random(key=lambda k: f"photo/{k}:é")
    made.arrays = Random(image=lambda k: pixels(seed=k), label=lambda k: np.int64(k))
    made.classes = Random()
    made.classes.class_names = ["x", "y", "z"]
    made.number = 3
    made.empty = lambda: None
    monkeypatch.setitem(sys.modules, "my", types.ModuleType("my"))
    monkeypatch.setitem(sys.modules, "my.photos", made)
    return made


def test_python_objects_and_what_makes_them(module):
    for attribute in ("ready", "Random"):
        source = sources.open_images(f"grain:my.photos:{attribute}")
        images = [encoded(pixels(seed=k), "PNG") for k in range(5)]
        assert contents(source) == [(str(k), k % 3, images[k]) for k in range(5)]
        assert source.class_names == ()
        want = {"kind": "grain", "name": f"my.photos:{attribute}", "split": "", "number": 5}
        assert source.describe() == want
    assert sources.open_images("grain:my.photos:classes").class_names == ("x", "y", "z")
    arrays = sources.open_images("grain:my.photos:arrays")
    np.testing.assert_array_equal(arrays.example(3)[0], pixels(seed=3))
    assert arrays.about(3)[0] == 3 and type(arrays.about(3)[0]) is int
    named = sources.open_images("grain:my.photos:named")
    assert key(named, 2) == "2:photo/2:é" and named.find("2:photo/2:é") == named.example(2)[0]
    module.mapped = lambda: grain.MapDataset.source(Random()).map(lambda item: item | {"key": "k"})
    mapped = sources.open_images("grain:my.photos:mapped")
    assert len(mapped) == 5 and mapped.about(4) == (1, "4:k")
    with pytest.raises(IndexError):  # grain itself would go round
        mapped.example(5)[0]


def test_python_objects_that_do_not_fit_are_refused(module):
    module.broken = lambda: 1 / 0
    for name in ("nowhere:x", "photos:x", "photos:number", "photos:empty", "photos:broken"):
        assert name in refusal(sources.open_images, f"grain:my.{name}")
    for label in (-1, 3, 2.0, "1"):
        module.bad = Random(label=lambda k, label=label: label)
        module.bad.class_names = "xyz"
        source = sources.open_images("grain:my.photos:bad")
        message = refusal(source.about, 1)
        assert repr(label) in message and "image 1" in message
        assert source.find("1") == encoded(pixels(seed=1), "PNG")  # which says nothing of labels
    for image in (lambda k: "text", lambda k: 1 / 0):
        module.bad = Random(image=image)
        source = sources.open_images("grain:my.photos:bad")
        assert "record 1" in refusal(source.about, 1) == refusal(source.example, 1)
        refusal(source.find, "1")


# Keys of numbered sources ------------------------------------------------------------------------


def test_a_key_of_other_images_is_refused(module):
    named = sources.open_images("grain:my.photos:named")
    for key in ("2:photo/3:é", "2"):
        assert "'2:photo/2:é'" in refusal(named.find, key)
    plain = sources.open_images("grain:my.photos:ready")
    for key in ("5", "-1", "02", "2:", "2:x", " 2", "x", "", "٢", "9" * 5000, 2, None):
        refusal(plain.find, key)


# Built-in sets -----------------------------------------------------------------------------------


def write_fashion(folder):
    images_, labels = np.arange(3 * 28 * 28) % 251, [2, 0, 9]
    header = struct.pack(">IIII", 0x803, 3, 28, 28)
    (folder / "train-images-idx3-ubyte").write_bytes(header + bytes(images_.tolist()))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes(labels))
    return images_.reshape(3, 28, 28, 1).astype(np.uint8), labels


def test_fashion_mnist(tmp_path):
    pixels_, labels = write_fashion(tmp_path)
    source = sources.open_images(f"fashion_mnist:{tmp_path}")
    for index, (number, label, read) in enumerate(contents(source)):
        assert (number, label) == (str(index), labels[index]) and same(read, pixels_[index])
    assert len(source.class_names) == 10 and len(pickle.dumps(source)) < 500
    want = {"kind": "built-in", "name": "fashion_mnist", "split": "train", "number": 3}
    assert source.describe() == want
    crop, _ = crops.load_all_crops(source.example(1)[0], crops.CropSpec(28, ten=False))
    np.testing.assert_array_equal(crop[0], np.repeat(pixels_[1], 3, -1))
    refusal(len, sources.open_images("fashion_mnist:/nowhere"))


# All ---------------------------------------------------------------------------------------------


def test_all_sources_find_what_they_read_pickle_and_serve_threads(tmp_path, tfds_folder, module):
    write_tree(tmp_path)
    write_fashion(tmp_path)
    for spec in ("", "tfds:named_photos", "grain:my.photos:named", "fashion_mnist:"):
        spec = spec if "photos" in spec else f"{spec}{tmp_path}"
        with futures.ThreadPoolExecutor(8) as pool:  # on a source that nobody has asked yet
            fresh = sources.open_images(spec)
            keys = list(pool.map(lambda k, of=fresh: key(of, k % len(of)), range(64)))
            by_threads = list(pool.map(fresh.find, keys))
        source = sources.open_images(spec)
        assert len(set(keys)) == len(source)
        unpickled = pickle.loads(pickle.dumps(source))
        for number, (name, found) in enumerate(zip(keys, by_threads, strict=True)):
            wanted, _, right = source.example(number % len(source))
            assert name == right
            assert all(same(x, wanted) for x in (found, source.find(name), unpickled.find(name)))
        assert unpickled.describe() == source.describe()


def test_anything_else_is_refused_with_the_forms():
    for spec in ("", "nowhere", "tfds:", "tfds::train", "grain:x", "mnist:/x", "fashion_mnist:"):
        assert sources.FORMS in refusal(sources.open_images, spec)


def test_data_loads_no_model_and_no_accelerator_that_grain_does_not_load():
    program = """
import sys
import mirai_jax.data.crops, mirai_jax.data.manifest, mirai_jax.data.images
print(*{"jax", "flax", "grain", "tensorflow_datasets", "torch"} & set(sys.modules))
import grain
before = set(sys.modules)
import mirai_jax.data.pipeline, mirai_jax.data.records
print(*(name for name in set(sys.modules) - before if name.startswith(("jax", "flax"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.split(), done
