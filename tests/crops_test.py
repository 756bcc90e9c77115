"""Decoding and cropping: against references in plain NumPy, and never silently wrong."""

import dataclasses
import functools
import io
import math
import struct
import zlib
from concurrent import futures

import helpers
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirai_jax.data import crops
from mirai_jax.utils.errors import DataError

examples = settings(deadline=None, derandomize=True)
SMALL = crops.CropSpec(image_size=8, crop_range=1.4)  # cut from 11 x 11
refusal = functools.partial(helpers.refusal, error=DataError)


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def encoded(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    options |= {"lossless": True, "exact": True} if kind == "WEBP" else {}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(raw, exif="ignore"):
    """Pixels and notes."""
    image, notes = crops.decode(raw, exif)
    assert image.mode == "RGB"
    return np.asarray(image), notes


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def png(rows, width, depth, colour, transparent=b""):
    """A PNG file of packed rows; colour 0 is grey, 2 colour."""

    def chunk(name, body):
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    transparent = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparent + body + chunk(b"IEND", b"")


def tiff(array, order="<", **tags):
    """An uncompressed TIFF file of one strip; tags named t262=1 and so on replace the usual ones."""
    height, width, samples = (*array.shape, 1)[:3]
    body = array.astype(array.dtype.newbyteorder(order)).tobytes()
    fields = {256: width, 257: height, 258: 8 * array.dtype.itemsize, 259: 1, 278: height}
    fields |= {262: 2 if samples == 3 else 1, 277: samples, 279: len(body)}
    fields |= {int(tag[1:]): tags[tag] for tag in tags}
    fields[273] = 8 + 2 + 12 * (len(fields) + 1) + 4  # where the strip starts
    entries = b"".join(
        struct.pack(order + "HHI", tag, 3, 1) + struct.pack(order + "HH", value, 0)
        for tag, value in sorted(fields.items())
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(fields)) + entries + bytes(4) + body


# The centre crop ---------------------------------------------------------------------------------


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def resize_rows(image, size, kernel, support):
    """Resizes axis 0 with antialiasing, in 22 bits of fixed point."""
    length = len(image)
    if size == length:
        return image
    scale = length / size
    stretch = max(scale, 1.0)
    out = np.empty((size, *image.shape[1:]), np.uint8)
    for row in range(size):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - support * stretch + 0.5))
        last = min(length, int(centre + support * stretch + 0.5))
        weights = np.array([kernel((k - centre + 0.5) / stretch) for k in range(first, last)])
        weights = weights / sum(weights)
        fixed = np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(fixed, image[first:last].astype(np.int64), 1) + (1 << 21)
        out[row] = np.clip(total >> 22, 0, 255)
    return out


def resize(image, height, width, kernel, support):
    """Across, then down: the order shows."""
    columns = resize_rows(image.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resize_rows(columns, height, kernel, support)


def adm_center_crop(image, size):
    while min(image.shape[:2]) >= 2 * size:
        image = resize(image, image.shape[0] // 2, image.shape[1] // 2, box, 0.5)
    scale = size / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    image = resize(image, height, width, bicubic, 2.0)
    y, x = (height - size) // 2, (width - size) // 2
    return image[y : y + size, x : x + size]


@settings(examples, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 14), st.integers(0, 99))
@example(11, 11, 11, 0)  # nothing to resize
@example(44, 91, 11, 0)  # halved twice
@example(38, 2, 1, 0)  # a shape whose height Pillow 13 would resize first
def test_center_crop_is_adms(height, width, size, seed):
    image = pixels(height, width, seed=seed)
    got = crops.center_crop(Image.fromarray(image), size)
    assert got.dtype == np.uint8 and got.shape == (size, size, 3)
    np.testing.assert_array_equal(got, adm_center_crop(image, size))


# The crops ---------------------------------------------------------------------------------------


@settings(examples, max_examples=60)
@given(st.integers(1, 12), st.floats(1, 3), st.booleans(), st.integers(0, 99))
def test_crops_against_slices(size, crop_range, ten, seed):
    spec = crops.CropSpec(size, crop_range, ten)
    image = pixels(spec.resized, spec.resized, seed=seed)
    far, middle = spec.resized - size, int(round((spec.resized - size) / 2.0))
    places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)] if ten else [(0, 0)]
    sides = image, np.fliplr(image)
    want = [side[y : y + size, x : x + size] for side in sides for y, x in places]
    np.testing.assert_array_equal(crops.all_crops(image, spec), want)
    for index in range(spec.count):
        one = crops.crop(image, index, spec)
        np.testing.assert_array_equal(one, want[index])
        assert one.flags.c_contiguous and not np.shares_memory(one, image)
    for index in (-1, spec.count):
        refusal(crops.crop, image, index, spec)


def test_a_crop_alone_is_that_of_all_crops_also_in_threads():
    raw = encoded(pixels(40, 31), "JPEG")
    stored, notes = crops.load_all_crops(raw, SMALL)
    assert notes == () and stored.shape == (10, 8, 8, 3)
    with futures.ThreadPoolExecutor(4) as pool:
        rebuilt = list(pool.map(lambda k: crops.load_crop(raw, k, SMALL), 5 * list(range(10))))
    np.testing.assert_array_equal(rebuilt, np.concatenate(5 * [stored]))


@settings(examples, max_examples=60)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 14), st.integers(0, 2**32 - 1),
    st.integers(0, 99),
)  # fmt: skip
def test_a_random_crop_lies_along_the_long_side_of_the_resized_image(
    height, width, size, number, seed
):
    image = pixels(height, width, seed=seed)
    got = crops.load_crop(image, number, crops.RandomCrops(size))
    # torchvision's Resize: the shorter side is `size`, the other is rounded down.
    sides = [int(size * side / min(height, width)) for side in (height, width)]
    resized = resize(image, *sides, bicubic, 2.0)
    places = max(sides) - size + 1
    first = int(number // 2 / 2**31 * places)
    y, x = (first, 0) if height > width else (0, first)
    want = resized[y : y + size, x : x + size]
    np.testing.assert_array_equal(got, want[:, ::-1] if number % 2 else want)
    assert got.flags.c_contiguous


def test_the_default_spec_is_the_official_one_and_a_wrong_field_is_named():
    spec = crops.CropSpec()
    assert (spec.image_size, spec.resized, spec.count, spec.exif) == (256, 281, 10, "ignore")
    good = dataclasses.asdict(spec)
    assert crops.CropSpec.from_dict(good) == spec
    for field, value in (
        ("image_size", 0), ("image_size", True), ("image_size", 2.0), ("crop_range", 0.99),
        ("crop_range", math.nan), ("ten", 1), ("exif", "Apply"), ("size", 3),
    ):  # fmt: skip
        message = refusal(crops.CropSpec.from_dict, good | {field: value})
        assert field in message and repr(value) in message
    refusal(crops.CropSpec.from_dict, None)


# Kinds of images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG"])
def test_plain_colour_and_grey_get_no_note(kind):
    for image in (pixels(5, 7), pixels(5, 7, 0)):
        raw = encoded(image, kind)
        got, notes = decoded(raw)
        assert notes == ()
        want = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")) if kind == "JPEG" else image
        np.testing.assert_array_equal(got, want if want.ndim == 3 else grey(want))


def test_pixels_are_taken_as_they_are():
    image = pixels(5, 7)
    for raw in (image[:, ::-1], image[..., :1], image[..., 0]):
        got, notes = decoded(raw)
        np.testing.assert_array_equal(got, raw if raw.shape[-1] == 3 else grey(image[..., 0]))
        assert notes == ()
    np.testing.assert_array_equal(
        crops.load_crop(image, 3, SMALL), crops.load_crop(encoded(image, "PNG"), 3, SMALL)
    )
    for wrong in (image / 255, image[:0], image[..., :2], image[None], pixels(3, 3, 4)):
        refusal(crops.decode, wrong)


def test_palettes():
    indices, colours = pixels(5, 7, 0) % 4, pixels(4, 1, seed=1)[:, 0]
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette(colours.tobytes())
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        got, notes = decoded(encoded(image, kind))
        np.testing.assert_array_equal(got, colours[indices])
        assert notes == ("palette",)
    want = np.where((indices == 2)[..., None], 255, colours[indices])  # on white
    for kind in ("PNG", "GIF"):
        got, notes = decoded(encoded(image, kind, transparency=2))
        np.testing.assert_array_equal(got, want)
        assert notes == ("palette", "alpha")


@pytest.mark.parametrize("kind, channels", [("PNG", 2), ("PNG", 4), ("TIFF", 4), ("WEBP", 4)])
def test_alpha_is_composited_on_white(kind, channels):
    image = pixels(9, 9, channels)
    image[0, :, -1], image[1, :, -1] = 0, 255
    got, notes = decoded(encoded(image, kind))
    alpha = image[..., -1:] / 255
    want = np.broadcast_to(alpha * image[..., :-1] + (1 - alpha) * 255, got.shape)
    np.testing.assert_allclose(got, want, atol=1)
    np.testing.assert_array_equal(got[:2], want[:2])
    assert notes == ("alpha",)


def test_cmyk():
    for kind, options, tolerance in (("JPEG", {"quality": 100}, 4), ("TIFF", {}, 1)):
        image = Image.new("CMYK", (16, 16), (0, 102, 255, 51))
        got, notes = decoded(encoded(image, kind, **options))
        np.testing.assert_allclose(got, np.broadcast_to((204, 122, 0), got.shape), atol=tolerance)
        assert notes == ("cmyk",)


def test_16_bits_are_scaled_not_clipped():
    values = np.random.RandomState(0).randint(0, 65536, (5, 7, 4)).astype(np.uint16)
    first, colour = values[..., 0], values[..., :3]
    first[0, :4] = 0, 255, 256, 65535
    files = [encoded(first, kind) for kind in ("PNG", "TIFF", "PPM")]
    files += [encoded(first.astype(np.int32), "TIFF"), *(tiff(first, order) for order in "<>")]
    coloured = [png([row.astype(">u2").tobytes() for row in colour], 7, 16, 2)]
    coloured += [tiff(colour, order) for order in "<>"]
    for raw in files + coloured:
        got, notes = decoded(raw)
        want, atol = (colour / 257, 1) if raw in coloured else (grey(np.round(first / 257)), 0)
        np.testing.assert_allclose(got, want, atol=atol)
        assert notes == ("16-bit",)


def test_what_has_no_known_range_or_is_misread_by_pillow_is_refused():
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for raw in (
        encoded(np.ones((2, 2), np.float32), "TIFF"),
        b"Pf 1 1 -1\n" + bytes(4),
        tiff(np.ones((2, 2), np.int8), t339=2),  # signed
        tiff(np.ones((2, 2), np.int16), t339=2),
        tiff(values, t262=0),  # white is zero
        tiff(values, t258=12, t256=5),  # 12 bits
        tiff(np.zeros((2, 2, 3), np.uint16), t284=2),  # planes
        png([bytes(2)] * 4, 4, 4, 0, b"\0\3"),  # a transparent colour of 4 bits
        png([bytes(6)], 1, 16, 2, bytes(6)),
    ):
        assert "cannot be read safely" in refusal(crops.decode, raw)
    for value in (-1, 65536):
        assert "65535" in refusal(crops.decode, encoded(np.array([[0, value]], np.int32), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "blue", "lime")]
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    got, notes = decoded(raw)
    np.testing.assert_array_equal(got, np.broadcast_to([255, 0, 0], (6, 9, 3)))
    assert notes == (("animated", "palette") if kind == "GIF" else ("animated",))


# What undoes the orientations 1 to 8: mirrored (-1) or not, then quarter turns.
UPRIGHT = ((1, 0), (-1, 0), (1, 2), (-1, 2), (-1, 1), (1, 3), (-1, 3), (1, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(kind):
    for orientation, (mirrored, turns) in enumerate(UPRIGHT, 1):
        exif = Image.Exif()
        exif[274] = orientation
        raw = encoded(pixels(5, 7), kind, exif=exif)
        image = np.asarray(Image.open(io.BytesIO(raw))) if kind == "JPEG" else pixels(5, 7)
        upright = np.rot90(image[:, ::mirrored], turns)
        for how in ("ignore", "apply"):
            got, notes = decoded(raw, how)
            applied = how == "apply" or kind == "TIFF"  # which Pillow always turns
            np.testing.assert_array_equal(got, upright if applied else image)
            note = f"exif orientation {'applied' if applied else 'ignored'}"
            assert notes == ((note,) if orientation > 1 else ())


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_exif_block_does_not_cost_the_image():
    for rest in (b"MM\0*", b"XX\0*\0\0\0\x08", b"II*\0\xff\xff"):
        for kind in ("JPEG", "PNG", "WEBP"):
            raw = encoded(Image.new("RGB", (8, 8), "red"), kind, exif=b"Exif\0\0" + rest)
            assert decoded(raw, "apply")[1] == ()


def test_what_is_no_image_is_refused():
    for raw in (b"", b"text", b"\xff\xd8\xff", png([b""], 0, 8, 2), b"P6 0 4 255\n", "text"):
        refusal(crops.decode, raw)
    # Formats that no data set uses, some of which run other programs, are not tried.
    for raw in (b"%!PS-Adobe-3.0 EPSF-3.0\n", encoded(pixels(4, 4), "TGA")):
        refusal(crops.decode, raw)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it finds in damaged files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_a_truncated_file_is_refused_unless_all_its_pixels_are_there(kind):
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    raw = encoded(pixels(9, 11), kind, **options)
    whole, _ = decoded(raw)
    refusals = 0
    for end in [*range(0, len(raw), 1 + len(raw) // 60), *range(len(raw) - 16, len(raw))]:
        try:
            got, _ = decoded(raw[:end])
        except DataError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            np.testing.assert_array_equal(got, whole)
    assert refusals > 50 or refusals > len(raw) - 16


@pytest.mark.filterwarnings("ignore")  # of the smaller image, Pillow only warns
def test_images_of_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for side in (400, 500):
        assert "pixels" in refusal(crops.decode, encoded(Image.new("L", (side, side)), "PNG"))
    assert "pixels" in refusal(crops.center_crop, Image.new("RGB", (400, 1)), 281)
