"""Where images come from: folders, parquet files, tars, the Hugging Face Hub, tensorflow_datasets,
Python objects and the small built-in sets.

Extraction reads a source by number; each image has a key that is stored with its codes. Training
finds an image by that key, without listing or loading anything else. Every source pickles: worker
processes open it again.
"""

import abc
import contextlib
import functools
import hashlib
import importlib
import itertools
import operator
import os
import pathlib
import re
from typing import Any

import numpy as np

from mirai_jax.data import folders, packed, parquet, small_sets, tars
from mirai_jax.data.image_source import ImageSource, hashes_of
from mirai_jax.utils import files, hub, paths
from mirai_jax.utils.errors import DataError, Unreadable, first_line

FORMS = (
    "FOLDER (with a folder of images for each class), parquet:GLOB, wds:GLOB, "
    "hf:OWNER/NAME[@REVISION][:SPLIT], tfds:NAME[:SPLIT], grain:package.module:attribute, mnist and "
    "fashion_mnist[:FOLDER]"
)
_PACKED = re.compile(r"(?P<kind>parquet|wds):(?P<pattern>.+)", re.DOTALL)
# A version is part of the name: imagenet2012:5.1.0, or 5.*.*
_TFDS = re.compile(r"tfds:(?P<name>[^:]+(:(\d+|\*)(\.(\d+|\*)){2})?)(:(?P<split>.+))?")
_GRAIN = re.compile(r"grain:(?P<module>[\w.]+):(?P<attribute>\w+)")
_BUILT_IN = re.compile(r"mnist|fashion_mnist(:.+)?", re.DOTALL)
_NUMBERED = re.compile(r"([0-9]{1,18})(:.*)?", re.DOTALL)


def open_images(spec: str) -> ImageSource:
    """Opens a source of images.

    Args:
        spec: one of
            FOLDER: a folder with a folder of images for each class, as torchvision's ImageFolder;
            parquet:GLOB, wds:GLOB: parquet files as the Hugging Face Hub has them, and WebDataset's
                tars; see `parquet.ParquetImages` and `tars.TarImages`. GLOB may be their folder;
            hf:OWNER/NAME[@REVISION][:SPLIT]: such files of a data set of the Hub;
            tfds:NAME[:SPLIT]: a data set that tensorflow_datasets has prepared as ArrayRecord,
                split 'train' unless given; nothing is ever downloaded;
            grain:package.module:attribute: random access (len and []) to items {'image': encoded
                bytes or uint8 pixels, 'label': int, optionally 'key': str}, or a callable that
                returns it; it may have class_names;
            mnist, fashion_mnist[:FOLDER]: the training images of `small_sets.load_images`.
    """
    if found := _PACKED.fullmatch(spec):
        suffix, made = _KINDS[found["kind"]]
        return made(spec, packed.find_files(spec, found["pattern"], suffix))
    if spec.startswith("hf:"):
        listed = hub.data_files(spec, _packed_files)
        return _KINDS["parquet" if listed[0].endswith(".parquet") else "wds"][1](spec, listed)
    if found := _TFDS.fullmatch(spec):
        return _Tfds(spec, found["name"], found["split"] or "train")
    if found := _GRAIN.fullmatch(spec):
        return _Grain(spec, found["module"], found["attribute"])
    if _BUILT_IN.fullmatch(spec):
        name, _, path = spec.partition(":")
        return _BuiltIn(spec, name, path)
    if spec and paths.is_dir(spec):
        return _Folder(spec, os.path.abspath(paths.local(spec)))
    raise DataError(f"images {spec!r} is none of these: {FORMS}")


_KINDS = {"parquet": (".parquet", parquet.ParquetImages), "wds": (".tar", tars.TarImages)}


def _packed_files(folder: str) -> list[str]:
    """The parquet files in a folder, or else its tars."""
    for suffix, _ in _KINDS.values():
        with contextlib.suppress(DataError):
            return packed.find_files(folder, folder, suffix)
    return []


# A folder ----------------------------------------------------------------------------------------


class _Folder(ImageSource):
    """ROOT/CLASS/.../IMAGE, listed at the first use of a number."""

    def __init__(self, spec: str, root: str):
        self._spec, self._root = spec, root

    def __len__(self) -> int:
        return len(self._listing[0])

    def about(self, index: int) -> tuple[int, str]:
        self._check(index)
        keys, labels, _ = self._listing
        return int(labels[index]), keys[index]

    def example(self, index: int) -> tuple[bytes, int, str]:
        label, key = self.about(index)
        return self.find(key), label, key

    def find(self, key: str) -> bytes:
        if not isinstance(key, str) or {"", ".", ".."} & set(key.split("/")):
            raise DataError(f"image key {key!r} is no path inside a folder of images")
        try:
            return files.patiently(pathlib.Path(self._root, key).read_bytes)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise Unreadable(
                f"{self._spec!r}: {key!r} cannot be read ({first_line(error)})"
            ) from error

    def listing(self) -> str:
        keys, labels, _ = self._listing
        lines = (f"{label} {key}\n" for key, label in zip(keys, labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def labels(self) -> np.ndarray:
        return self._listing[1]

    def hashes(self) -> np.ndarray:
        return hashes_of(self._listing[0])

    def describe(self) -> dict[str, Any]:
        name = os.path.basename(self._root)
        return {"kind": "folder", "name": name, "split": "", "number": len(self)}

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        classes, _ = folders.scan(self._spec, self._root)
        if not classes:
            raise DataError(f"images {self._spec!r} must hold folders of images, one a class")
        return tuple(classes)

    @property
    def skipped(self) -> tuple[str, ...]:
        return self._listing[2]

    @functools.cached_property
    def _listing(self) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
        """Keys and labels of the images, and the keys of the other files."""
        keys, labels, skipped = [], [], folders.scan(self._spec, self._root)[1]
        for label, class_name in enumerate(self.class_names):
            before = len(keys)
            # By folder, then by file: the order of torchvision's ImageFolder.
            for folder, names in sorted(folders.walk(self._spec, self._root, class_name)):
                for name in names:
                    (keys if folders.is_image(name) else skipped).append(f"{folder}/{name}")
            if len(keys) == before:
                raise DataError(
                    f"images {self._spec!r}: class folder {class_name!r} holds no image "
                    f"({' '.join(folders.SUFFIXES)})"
                )
            labels += [label] * (len(keys) - before)
        for key in itertools.chain(keys, skipped):
            try:
                key.encode()
            except UnicodeEncodeError as error:  # it could not be stored with the codes
                name = os.fsencode(key)
                raise DataError(f"images {self._spec!r}: {name!r} is not UTF-8") from error
        return keys, np.array(labels, np.int32), tuple(sorted(skipped))


# Numbered records --------------------------------------------------------------------------------


class _Numbered(ImageSource):
    """Images by number. A key is the number, or number:name where images have names."""

    def __init__(self, spec: str):
        self._spec = spec

    def __reduce__(self):
        return open_images, (self._spec,)

    @abc.abstractmethod
    def _record(self, index: int) -> tuple[Any, Any, str | None]:
        """Image, label and name of record `index`; may raise anything."""

    def about(self, index: int) -> tuple[int, str]:
        return self.example(index)[1:]

    def example(self, index: int) -> tuple[bytes | np.ndarray, int, str]:
        image, label, name = self._get(index)
        return image, self._label(index, label), _key(index, name)

    def find(self, key: str) -> bytes | np.ndarray:
        found = _NUMBERED.fullmatch(key) if isinstance(key, str) else None
        if not found or not int(found[1]) < len(self):
            raise DataError(f"images {self._spec!r}: none of {len(self)} has the key {key!r}")
        index = int(found[1])
        image, _, name = self._get(index)
        if (actual := _key(index, name)) != key:
            raise DataError(f"images {self._spec!r}: image {index} is {actual!r}, not {key!r}")
        return image

    def _label(self, index: int, label: Any) -> int:
        last = len(self.class_names) - 1 if self.class_names else 2**31 - 1
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number <= last:
            raise DataError(f"{self._spec!r}: label {label!r} of image {index} is not 0 to {last}")
        return number

    def _get(self, index: int) -> tuple[bytes | np.ndarray, Any, str | None]:
        self._check(index)
        try:
            image, label, name = files.patiently(lambda: self._record(index))
            if not isinstance(image, bytes | np.ndarray):
                raise TypeError(f"its image is a {type(image).__name__}, not bytes or pixels")
            return image, label, name
        except Exception as error:  # from the data set's code and files
            raise Unreadable(
                f"images {self._spec!r}: record {index} cannot be read "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error


def _key(index: int, name: str | None) -> str:
    return str(index) if name is None else f"{index}:{name}"


class _Tfds(_Numbered):
    """A data set that tensorflow_datasets has prepared, read without TensorFlow."""

    def __init__(self, spec: str, name: str, split: str):
        super().__init__(spec)
        import tensorflow_datasets as tfds  # here, because it takes seconds to import

        try:
            # From files alone: the data set's own code could start a download.
            folder = os.environ.get("TFDS_DATA_DIR")
            builder = tfds.core.read_only_builder.builder_from_files(
                name, data_dir=folder and paths.plain(folder)
            )
            self._source = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except Exception as error:  # tfds does not wrap what its parts raise
            raise DataError(
                f"images {spec!r} cannot be opened ({first_line(error)}); if they are not prepared "
                "as ArrayRecord files on this machine, run Python's tensorflow_datasets.builder("
                f"{name!r}, file_format='array_record').download_and_prepare() once, under the same "
                "TFDS_DATA_DIR"
            ) from error
        features = builder.info.features
        if (
            not {"image", "label"} <= set(features)
            or not isinstance(features["image"], tfds.features.Image)
            or features["image"].np_dtype == np.float32  # stored as the bytes of another image
        ):
            raise DataError(
                f"images {spec!r}: its features are {', '.join(sorted(features))}: needed are "
                "'image', of integers, and 'label'"
            )
        named = isinstance(features["label"], tfds.features.ClassLabel)
        self.class_names = tuple(features["label"].names) if named else ()
        self._name, self._split = builder.info.full_name, split

    def __len__(self) -> int:
        return len(self._source)

    def describe(self) -> dict[str, Any]:
        return {"kind": "tfds", "name": self._name, "split": self._split, "number": len(self)}

    def _record(self, index: int) -> tuple[Any, Any, str | None]:
        record = self._source[index]
        name = record.get("file_name")
        if isinstance(name, bytes):
            name = name.decode(errors="backslashreplace")
        return record["image"], record["label"], name


class _Grain(_Numbered):
    """Any object with len and [] that a module has or makes."""

    def __init__(self, spec: str, module: str, attribute: str):
        super().__init__(spec)
        try:
            source = getattr(importlib.import_module(module), attribute)
            if isinstance(source, type) or not _is_random_access(source):
                source = source()
        except Exception as error:  # from the user's code
            raise DataError(
                f"images {spec!r} cannot be opened ({type(error).__name__}: {first_line(error)})"
            ) from error
        if not _is_random_access(source):
            raise DataError(f"images {spec!r} is a {type(source).__name__}, without len and []")
        self._source, self._name = source, f"{module}:{attribute}"
        self.class_names = tuple(map(str, getattr(source, "class_names", ())))

    def __len__(self) -> int:
        return len(self._source)

    def describe(self) -> dict[str, Any]:
        return {"kind": "grain", "name": self._name, "split": "", "number": len(self)}

    def _record(self, index: int) -> tuple[Any, Any, str | None]:
        item = self._source[index]
        return item["image"], item["label"], item.get("key")


def _is_random_access(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


class _BuiltIn(_Numbered):
    """The training images of `small_sets.load_images`, loaded at their first use."""

    def __init__(self, spec: str, name: str, path: str):
        super().__init__(spec)
        self._name, self._path = name, path

    def __len__(self) -> int:
        return len(self._loaded.labels)

    def describe(self) -> dict[str, Any]:
        return {"kind": "built-in", "name": self._name, "split": "train", "number": len(self)}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._loaded.class_names

    @functools.cached_property
    def _loaded(self) -> small_sets.LabelledImages:
        return small_sets.load_images(self._name, self._path, split="train", image_size=28)

    def _record(self, index: int) -> tuple[Any, Any, str | None]:
        return self._loaded.images[index], self._loaded.labels[index], None
