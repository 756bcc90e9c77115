"""Sources of images: what is found, under which names, and what is refused."""

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import types
from concurrent import futures

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirai_jax.data import crops, sources
from mirai_jax.utils.errors import DataError

examples = settings(deadline=None, derandomize=True)


def pixels(height=6, width=7, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def put(root, **files):
    """Writes files, '__' in a name standing for a folder's '/'."""
    for name, raw in files.items():
        file = root.joinpath(*name.split("__"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)


def refusal(call, *args):
    with pytest.raises(DataError) as error:
        call(*args)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    return type(a) is type(b) and (a == b if isinstance(a, bytes) else np.array_equal(a, b))


def contents(source):
    numbers = range(len(source))
    for i in numbers:
        key, label, image = source.key(i), source.label(i), source.read(i)
        assert source.about(i) == (label, key)
        seen, *about = source.example(i)
        assert about == [label, key] and np.array_equal(seen, image)
    return [(source.key(i), source.label(i), source.read(i)) for i in numbers]


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
    for name in [*files, *others, *hidden]:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(files.get(name, b"?"))
    labels = {"B": 0, "a": 1, "é f": 2}
    return {key: (labels[key.split("/")[0]], raw) for key, raw in files.items()}, others


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path):
    files, others = write_tree(tmp_path)
    source = sources.open_images(str(tmp_path))
    # Classes by code points; folders by path ('-' comes before '/'), then files.
    assert source.class_names == ("B", "a", "é f")
    assert contents(source) == [(key, label, raw) for key, (label, raw) in files.items()]
    assert source.skipped == tuple(sorted(others))
    described = source.describe()
    assert described == {"kind": "folder", "name": tmp_path.name, "split": "", "number": 12}


def test_every_kind_of_file_can_be_cropped(tmp_path):
    files, _ = write_tree(tmp_path)
    source = sources.open_images(str(tmp_path))
    spec = crops.CropSpec(image_size=5, crop_range=1.2)
    for index, key in enumerate(files):
        if "broken" in key:
            refusal(crops.load_all_crops, source.read(index), spec)
            continue
        stored, notes = crops.load_all_crops(source.read(index), spec)
        assert stored.shape == (10, 5, 5, 3)
        assert notes == (("palette",) if key.endswith("GIF") else ())
        np.testing.assert_array_equal(stored[7], crops.load_crop(source.find(key), 7, spec))


def test_finding_by_key_lists_nothing(tmp_path, monkeypatch):
    files, _ = write_tree(tmp_path)

    def scandir(folder):
        raise AssertionError("listed")

    monkeypatch.setattr(os, "scandir", scandir)
    source = sources.open_images(str(tmp_path))
    for key, (_, raw) in files.items():
        assert source.find(key) == raw
        assert pickle.loads(pickle.dumps(source)).find(key) == raw
    assert len(pickle.dumps(source)) < 500
    with pytest.raises(AssertionError, match="listed"):
        len(source)


def test_listing_asks_the_system_about_folders_not_files(tmp_path, monkeypatch):
    put(tmp_path, **{f"a__{number}.png": b"" for number in range(400)})
    asked = []

    def watch(name, real):
        monkeypatch.setattr(os, name, lambda path, **how: asked.append(path) or real(path, **how))

    for name in ("stat", "lstat"):
        watch(name, getattr(os, name))
    assert len(sources.open_images(str(tmp_path))) == 400 and 0 < len(asked) < 100


def test_a_folder_that_moves_keeps_its_keys(tmp_path):
    write_tree(tmp_path / "one")
    before = contents(sources.open_images(str(tmp_path / "one")))
    (tmp_path / "one").rename(tmp_path / "two")
    assert contents(sources.open_images(str(tmp_path / "two") + "/")) == before
    assert sources.open_images(str(tmp_path / "two") + "/").describe()["name"] == "two"


def test_a_relative_folder_stays_when_the_program_moves(tmp_path, monkeypatch):
    write_tree(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    source = sources.open_images("one")
    monkeypatch.chdir("/")
    assert len(source) == 12 and pickle.loads(pickle.dumps(source)).find("B/a.JPEG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sources.open_images("~/one")) == 12


def test_linked_folders_and_files_are_followed(tmp_path):
    put(tmp_path, store__x__1_png=b"", store__x__2_png=b"")
    (tmp_path / "store/x/1_png").rename(tmp_path / "store/x/1.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "store")
    (root / "b").mkdir()
    (root / "b" / "one.png").symlink_to(tmp_path / "store/x/1.png")
    source = sources.open_images(str(root))
    assert [source.key(i) for i in range(len(source))] == ["a/x/1.png", "b/one.png"]
    assert source.read(1) == b""


@pytest.mark.parametrize("target", [".", "..", "../b"])
def test_a_circle_of_links_is_refused(tmp_path, target):
    put(tmp_path, **{"a__1.png": b"", "b__1.png": b""})
    (tmp_path / "a" / "link").symlink_to(target)
    (tmp_path / "b" / "link").symlink_to("../a")
    assert "links to a folder that it is in" in refusal(len, sources.open_images(str(tmp_path)))


def test_a_wrong_folder_is_told_what_is_expected(tmp_path):
    def message():
        return refusal(len, sources.open_images(str(tmp_path)))

    assert "holds none" in message() and "FOLDER/CLASS/IMAGE" in message()
    put(tmp_path, **{"1.png": b""})
    assert "no class folders" in message() and ".jpeg" in message()
    put(tmp_path, **{"a__notes.txt": b"", "b__1.png": b""})
    assert "class folder 'a' holds no image" in message()
    assert sources.open_images(str(tmp_path)).class_names == ("a", "b")
    put(tmp_path, **{"a__1.png": b""})
    with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb"):
        pass
    assert "not UTF-8" in message() and r"\xff" in message()
    gone = sources.open_images(str(tmp_path))
    shutil.rmtree(tmp_path)
    assert "folder '.' cannot be listed (No such file or directory)" in refusal(len, gone)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path, **{"a__1.png": b"", "a__2.png": b""})
    source = sources.open_images(str(tmp_path))
    assert len(source) == 2
    (tmp_path / "a" / "2.png").unlink()
    message = refusal(source.read, 1)
    assert "'a/2.png' cannot be read (No such file or directory)" in message
    refusal(source.find, "a")  # a folder


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x.png",
        "a/../../x.png",
        "a/..",
        "./a/1.png",
        "a//1.png",
        "a/",
        "a\0",
        3,
    ],
)
def test_keys_never_leave_the_folder(tmp_path, key):
    put(tmp_path, **{"root__a__1.png": b"", "x.png": b""})
    refusal(sources.open_images(str(tmp_path / "root")).find, key)


@examples
@given(st.text() | st.lists(st.sampled_from(["..", ".", "a", "1.png", ""])).map("/".join))
def test_any_key_is_an_image_of_the_folder_or_a_data_error(tmp_path_factory, key):
    root = tmp_path_factory.getbasetemp() / "keys"
    if not root.exists():
        put(root, **{"root__a__1.png": b"1", "root__1.png": b"1", "1.png": b"outside"})
    try:
        assert sources.open_images(str(root / "root")).find(key) == b"1"
    except DataError as error:
        assert "\n" not in str(error)


def test_an_index_out_of_range_is_an_index_error(tmp_path):
    put(tmp_path, **{"a__1.png": b""})
    source = sources.open_images(str(tmp_path))
    for ask in (source.label, source.key, source.read):
        for index in (-1, 1):
            with pytest.raises(IndexError):
                ask(index)


# tensorflow_datasets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Small data sets, prepared as ArrayRecord (and one otherwise) without TensorFlow."""
    import tensorflow_datasets as tfds

    def builder(name, features, of):
        """A builder class: tfds names a data set after it."""

        def info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features(tfds.features))
            )

        def generate(self, count):
            for number in range(count):
                yield number, of(number)

        body = {
            "VERSION": tfds.core.Version("1.2.0"),
            "code_path": None,  # else tfds looks for checksums beside this file
            "_info": info,
            "_split_generators": lambda self, _: {
                split: self._generate_examples(count)
                for split, count in (("train", 5), ("test", 2))
            },
            "_generate_examples": generate,
        }
        return types.new_class(
            name, (tfds.core.GeneratorBasedBuilder,), {}, lambda n: n.update(body)
        )

    def png(number):
        return io.BytesIO(encoded(pixels(seed=number), "PNG"))

    folder = str(tmp_path_factory.mktemp("tfds"))
    named = builder(
        "NamedPhotos",
        lambda f: {
            "image": f.Image(),
            "label": f.ClassLabel(names=["cat", "dog"]),
            "file_name": f.Text(),
        },
        lambda k: {"image": png(k), "label": k % 2, "file_name": f"img_{k}.png"},
    )
    plain = builder(
        "PlainPhotos",
        lambda f: {"image": f.Image(), "label": np.int64},
        lambda k: {"image": png(k), "label": k},
    )
    bare = builder("BarePhotos", lambda f: {"image": f.Image()}, lambda k: {"image": png(k)})
    for made in (named, plain, bare):
        made(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def tfds_dir(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_folder)


def test_tfds_without_tensorflow(tfds_dir):
    source = sources.open_images("tfds:named_photos")
    assert source.class_names == ("cat", "dog") and source.skipped == ()
    by_key = {key: (label, raw) for key, label, raw in contents(source)}
    assert len(source) == len(by_key) == 5
    seeds = set()
    for key, (label, raw) in by_key.items():  # tfds shuffles when it prepares
        seed = int(key.partition(":img_")[2].removesuffix(".png"))
        assert raw == encoded(pixels(seed=seed), "PNG") and label == seed % 2
        seeds.add(seed)
    assert seeds == set(range(5)) and [key.partition(":")[0] for key in by_key] == list("01234")
    want = {"kind": "tfds", "name": "named_photos/1.2.0", "split": "train", "number": 5}
    assert source.describe() == want
    assert "tensorflow" not in sys.modules
    np.testing.assert_array_equal(
        np.asarray(crops.decode(source.read(0))[0]),
        np.asarray(Image.open(io.BytesIO(source.read(0)))),
    )


def test_tfds_splits_and_versions(tfds_dir):
    assert len(sources.open_images("tfds:named_photos:test")) == 2
    assert len(sources.open_images("tfds:named_photos:train[1:3]+test")) == 4
    source = sources.open_images("tfds:named_photos:1.2.0:test")
    assert source.describe()["split"] == "test" and len(source) == 2
    assert len(sources.open_images("tfds:named_photos:1.*.*")) == 5
    assert "'nope'" in refusal(sources.open_images, "tfds:named_photos:nope")
    assert "train[" in refusal(sources.open_images, "tfds:named_photos:train[")


def test_tfds_without_names_of_files_and_classes(tfds_dir):
    source = sources.open_images("tfds:plain_photos")
    assert [source.key(i) for i in range(5)] == list("01234") and source.class_names == ()
    assert sorted(source.label(i) for i in range(5)) == list(range(5))
    message = refusal(sources.open_images, "tfds:bare_photos")
    assert "features are image" in message and "'label'" in message


def test_tfds_images_of_floats_are_refused(tfds_folder, tmp_path, monkeypatch):
    # tfds stores them as the bytes of another image.
    shutil.copytree(f"{tfds_folder}/plain_photos", tmp_path / "plain_photos")
    features = tmp_path / "plain_photos" / "1.2.0" / "features.json"
    features.write_text(features.read_text().replace('"uint8"', '"float32"').replace('"3"', '"1"'))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "of integers" in refusal(sources.open_images, "tfds:plain_photos")


def test_tfds_that_is_not_prepared_says_how(tfds_dir, tfds_folder, monkeypatch):
    for name in ("imagenet2012", "named_photos:9.9.9", "a/b", "N!"):
        message = refusal(sources.open_images, f"tfds:{name}")
        assert "not prepared on this machine" in message and "download_and_prepare()" in message
        assert repr(name) in message and "array_record" in message
    # Prepared, but not for random access.
    from tensorflow_datasets.core import dataset_builder

    def as_data_source(*args, **kwargs):
        raise NotImplementedError("Random access data source for file format tfrecord ...")

    monkeypatch.setattr(dataset_builder.DatasetBuilder, "as_data_source", as_data_source)
    assert "ArrayRecord" in refusal(sources.open_images, "tfds:named_photos")


# Python objects ----------------------------------------------------------------------------------


class Random:
    """Random access to five items; also its own factory."""

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
        assert contents(source) == [
            (str(k), k % 3, encoded(pixels(seed=k), "PNG")) for k in range(5)
        ]
        assert source.class_names == ()
        want = {"kind": "grain", "name": f"my.photos:{attribute}", "split": "", "number": 5}
        assert source.describe() == want
    assert sources.open_images("grain:my.photos:classes").class_names == ("x", "y", "z")
    arrays = sources.open_images("grain:my.photos:arrays")
    np.testing.assert_array_equal(arrays.read(3), pixels(seed=3))
    assert arrays.label(3) == 3 and type(arrays.label(3)) is int
    named = sources.open_images("grain:my.photos:named")
    assert named.key(2) == "2:photo/2:é" and named.find("2:photo/2:é") == named.read(2)


def test_an_image_with_all_that_belongs_to_it_is_fetched_once(module):
    """A source may decode whenever it is asked."""
    asked = []
    module.counted = Random(key=lambda k: asked.append(k) or str(k))
    source = sources.open_images("grain:my.photos:counted")
    source.example(3)
    source.about(4)
    assert asked == [3, 4]


def test_a_grain_data_set_is_a_source(module):
    import grain

    module.mapped = lambda: grain.MapDataset.source(Random()).map(lambda item: item | {"key": "k"})
    source = sources.open_images("grain:my.photos:mapped")
    assert len(source) == 5 and source.key(4) == "4:k" and source.label(4) == 1
    with pytest.raises(IndexError):  # grain itself would go round
        source.read(5)


def test_python_objects_that_do_not_fit_are_refused(module):
    def message(attribute, of="my.photos"):
        return refusal(sources.open_images, f"grain:{of}:{attribute}")

    assert "ModuleNotFoundError" in message("x", of="my.nowhere")
    assert "AttributeError" in message("x")
    assert "TypeError" in message("number")
    assert "NoneType" in message("empty") and "len and []" in message("empty")
    module.broken = lambda: 1 / 0
    assert "ZeroDivisionError" in message("broken")


@pytest.mark.parametrize("label", [-1, 3, 2.0, "1", None])
def test_labels_that_do_not_fit_are_refused(module, label):
    module.bad = Random(label=lambda k: label)
    module.bad.class_names = "xyz"
    source = sources.open_images("grain:my.photos:bad")
    message = refusal(source.label, 1)
    assert f"label {label!r} of image 1" in message
    assert source.read(1) == source.find(source.key(1))  # which say nothing of labels


def test_images_that_cannot_be_read_are_refused(module):
    module.text = Random(image=lambda k: "text")
    source = sources.open_images("grain:my.photos:text")
    assert "image 1 is a str" in refusal(source.read, 1) == refusal(source.find, "1")
    assert source.key(1) == "1"  # to say which one
    module.broken = Random(image=lambda k: 1 / 0)
    source = sources.open_images("grain:my.photos:broken")
    for ask in (source.label, source.key, source.read):
        assert "record 1 cannot be read (ZeroDivisionError" in refusal(ask, 1)
    refusal(source.find, "1")


# Keys of numbered sources ------------------------------------------------------------------------


def test_a_key_of_other_images_is_refused(module):
    named = sources.open_images("grain:my.photos:named")
    message = refusal(named.find, "2:photo/3:é")
    assert "'2:photo/2:é', not '2:photo/3:é'" in message
    refusal(named.find, "2")
    plain = sources.open_images("grain:my.photos:ready")
    for key in ("5", "-1", "02", "2:", "2:x", " 2", "x", "", "٢", "9" * 5000, 2, None):
        refusal(plain.find, key)


@examples
@given(st.text() | st.from_regex(r"\A[0-9]{1,20}(:.*)?\Z"))
@example("4")
def test_any_key_of_a_number_is_an_image_or_a_data_error(key):
    made = types.ModuleType("my_keys")
    made.ready = Random()
    sys.modules["my_keys"] = made
    try:
        source = sources.open_images("grain:my_keys:ready")
        assert source.find(key) == source.read(int(key)) and key in "01234"
    except DataError as error:
        assert "\n" not in str(error)
    finally:
        del sys.modules["my_keys"]


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
    for index in range(3):
        assert same(source.read(index), pixels_[index]) and source.label(index) == labels[index]
        assert source.key(index) == str(index) and same(source.find(str(index)), pixels_[index])
    assert len(source.class_names) == 10 and len(pickle.dumps(source)) < 500
    want = {"kind": "built-in", "name": "fashion_mnist", "split": "train", "number": 3}
    assert source.describe() == want and str(tmp_path) not in str(want)
    crop, _ = crops.load_all_crops(source.read(1), crops.CropSpec(28, ten=False))
    np.testing.assert_array_equal(crop[0], np.repeat(pixels_[1], 3, -1))
    assert "holds no train-images" in refusal(len, sources.open_images("fashion_mnist:/nowhere"))


def test_mnist_is_all_of_mnist():
    source = sources.open_images("mnist")
    assert len(source) == 5000 and source.class_names == tuple("0123456789")
    labels = [source.label(i) for i in range(5000)]
    assert np.bincount(labels).tolist() == [500] * 10
    assert source.read(4999).shape == (28, 28, 1) and source.read(4999).dtype == np.uint8


# All ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tfds", "grain", "fashion_mnist"])
def test_all_sources_find_what_they_read_pickle_and_serve_threads(kind, tmp_path, tfds_dir, module):
    spec = {"tfds": "tfds:named_photos", "grain": "grain:my.photos:named"}.get(kind)
    if kind == "folder":
        write_tree(tmp_path)
        spec = str(tmp_path)
    elif kind == "fashion_mnist":
        write_fashion(tmp_path)
        spec = f"fashion_mnist:{tmp_path}"
    with futures.ThreadPoolExecutor(8) as pool:  # on a source that nobody has asked yet
        fresh = sources.open_images(spec)
        keys = list(pool.map(lambda k: fresh.key(k % len(fresh)), range(64)))
        by_threads = list(pool.map(fresh.find, keys))
    source = sources.open_images(spec)
    assert keys == [source.key(k % len(source)) for k in range(64)]
    assert len(set(keys)) == len(source)
    unpickled = pickle.loads(pickle.dumps(source))
    for number, (key, found) in enumerate(zip(keys, by_threads, strict=True)):
        wanted = source.read(number % len(source))
        for other in (found, source.find(key), unpickled.find(key)):
            assert same(other, wanted)
    assert len(unpickled) == len(source)
    assert unpickled.describe() == source.describe()


@pytest.mark.parametrize(
    "spec",
    ["", "nowhere", "/nowhere", "tfds:", "tfds::train", "grain:", "grain:x", "grain:x:", "mnist:",
     "mnist:/x", "mnist ", "fashion_mnist:", "MNIST", "cifar10", "a\0b", "\ud800"],
)  # fmt: skip
def test_anything_else_is_told_the_forms(spec):
    message = refusal(sources.open_images, spec)
    for form in ("FOLDER", "tfds:NAME", "grain:package.module:attribute", "fashion_mnist"):
        assert form in message


@settings(examples, max_examples=60)
@given(
    st.text()
    | st.builds(
        "{}{}".format,
        st.sampled_from(["tfds:", "grain:", "mnist:", "fashion_mnist:", "grain:my:", "./"]),
        st.text() | st.from_regex(r"\A[\w/.]+(:[\w\[\]%.:]+)?\Z"),
    )
)
def test_any_spec_is_a_source_or_a_data_error(tfds_folder, spec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", tfds_folder)
        try:
            assert isinstance(sources.open_images(spec), sources.ImageSource)
        except DataError as error:
            assert "\n" not in str(error)


def test_crops_and_images_load_no_accelerator_and_no_data_sets():
    program = """
import sys
import mirai_jax.data.crops, mirai_jax.data.sources
print(*{"jax", "flax", "grain", "tensorflow_datasets", "torch"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.split(), done
