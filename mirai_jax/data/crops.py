"""Decodes an image and cuts the crops whose codes are trained on.

Extraction turns crops into codes; training rebuilds the crop that stored codes came from. Both call
the functions here, so both see the same pixels.
"""

import dataclasses
import io
import re
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mirai_jax.utils.errors import DataError, first_line

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF")  # Pillow's names
NOTES = (  # what `decode` may note about an image
    "animated", "16-bit", "palette", "cmyk", "alpha",
    "exif orientation ignored", "exif orientation applied",
)  # fmt: skip
_ORIENTATION, _BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 274, 258, 262, 284, 339  # TIFF tags
_UPRIGHT = {  # what undoes each orientation except 1, which is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Size = int | tuple[int, int]  # of an image in pixels: the side of a square, or (height, width)


def sides(size: Size) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _shortest(size: Size) -> Size:
    """A square as its side: how crops that were stored before other sizes existed are named."""
    height, width = sides(size)
    return height if height == width else (height, width)


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """Which crops are cut from an image.

    Attributes:
        image_size: S, the size of a crop; sides of 1 to 4096 pixels.
        crop_range: the ten crops are cut from a centre crop of sides int(S * crop_range); 1 to 10.
        ten: ten crops; if False, the centre crop of size S and its mirror image.
        exif: 'ignore' leaves an image as it is stored, as PyTorch's usual loaders do; 'apply' turns
            it by its EXIF orientation. (Pillow always turns TIFF files.)
    """

    image_size: Size = 256
    crop_range: float = 1.1
    ten: bool = True
    exif: str = "ignore"

    def __post_init__(self):
        size, crop_range = self.image_size, self.crop_range
        for field, valid in (
            ("image_size", all(type(s) is int and 1 <= s <= 4096 for s in _listed(size))),
            ("crop_range", type(crop_range) in (int, float) and 1 <= crop_range <= 10),
            ("ten", type(self.ten) is bool),
            ("exif", self.exif in ("ignore", "apply")),
        ):
            if not valid:
                raise DataError(f"crop spec: {field} is {getattr(self, field)!r}, out of its range")
        object.__setattr__(self, "image_size", _shortest(size))

    @property
    def count(self) -> int:
        """C, how many crops an image gives."""
        return 10 if self.ten else 2

    @property
    def centre(self) -> int:
        """The number of the crop of the middle, not mirrored."""
        return self.count // 2 - 1

    @property
    def resized(self) -> Size:
        """R, the size of the centre crop that all crops are cut from."""
        scale = self.crop_range if self.ten else 1
        return _shortest(tuple(int(side * scale) for side in sides(self.image_size)))

    @classmethod
    def from_dict(cls, fields: Any) -> "CropSpec":
        """The reverse of `dataclasses.asdict`; raises DataError for anything else."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or fields.keys() != set(names):
            raise DataError(f"a crop spec has the fields {', '.join(names)}, not {fields!r:.200}")
        size = fields["image_size"]
        return cls(**{**fields, "image_size": tuple(size) if isinstance(size, list) else size})


def _listed(size: Any) -> tuple:
    return size if isinstance(size, tuple) and len(size) == 2 else (size,)


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """Any crop along the long side of the whole image, mirrored or not, for codes made online.

    A crop's number is one draw from 0 to `count` - 1: its lowest bit mirrors, the others give the
    share of the way along the long side.
    """

    image_size: Size = 256
    exif: str = "ignore"  # as in CropSpec
    count: ClassVar[int] = 2**32

    def __post_init__(self):
        object.__setattr__(self, "image_size", _shortest(self.image_size))


def upright(number: int, count: int) -> int:
    """The crop, one of `count` of an image, that crop `number` is or that it mirrors."""
    if count == RandomCrops.count:
        return number - number % 2
    return number % max(1, count // 2)


# From bytes to pixels ----------------------------------------------------------------------------


def decode(raw: bytes | np.ndarray, exif: str = "ignore") -> tuple[Image.Image, tuple[str, ...]]:
    """Decodes an image to RGB as Pillow does; of an animation or a stack of pages, the first image.

    Args:
        raw: a file in one of FORMATS; or pixels, uint8 (H, W), (H, W, 1) or (H, W, 3).
        exif: as in CropSpec.

    Returns:
        The image (mode RGB), and those of NOTES that apply: alpha is composited on white, 16-bit
        grey is scaled from 0 .. 65535 to 0 .. 255. Plain colour and grey images get no note.

    Raises:
        DataError: damaged, truncated, empty, of another format, of more pixels than Pillow's
            MAX_IMAGE_PIXELS, or of a kind whose range of values is unknown.
    """
    if isinstance(raw, np.ndarray):
        return _from_pixels(raw), ()
    try:
        return _to_rgb(Image.open(io.BytesIO(raw), formats=FORMATS), exif)
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:  # its message holds an address in memory
        raise DataError(f"not an image of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged bytes Pillow raises a dozen kinds
        raise DataError(f"image cannot be decoded ({first_line(error)})") from error


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not pixels.size or not (colour or pixels.ndim == 2):
        raise DataError(
            f"pixels are {pixels.dtype} {pixels.shape}: allowed is uint8 (H, W), (H, W, 1) or "
            "(H, W, 3)"
        )
    return Image.fromarray(pixels).convert("RGB")


def _to_rgb(image: Image.Image, exif: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Loads an opened image and converts it; returns it with its notes."""
    _check_pixel_count(*image.size)
    # Of bytes in an order, unlike BMP's 16 bits a pixel.
    sixteen_bit = image.mode.startswith("I") or bool(re.search(r";16[BLN]", str(image.tile)))
    if _is_misread(image):
        raise DataError(f"{image.format} image: this kind of pixels cannot be read safely")
    animated = getattr(image, "is_animated", False)
    is_tiff = image.format == "TIFF"
    tiff_orientation = image.tag_v2.get(_ORIENTATION) if is_tiff else None
    image.load()  # turns TIFF files, and reads what a PNG file has after its pixels
    orientation = tiff_orientation if is_tiff else _orientation(image)

    palette, cmyk = image.mode in ("P", "PA"), image.mode == "CMYK"
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{image.format} image: its values exceed 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    alpha = image.has_transparency_data
    if alpha:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    turned = orientation in _UPRIGHT
    applied = turned and (is_tiff or exif == "apply")
    if applied and not is_tiff:
        image = image.transpose(_UPRIGHT[orientation])

    found = (animated, sixteen_bit, palette, cmyk, alpha, turned and not applied, applied)
    return image, tuple(note for note, holds in zip(NOTES, found, strict=True) if holds)


def _check_pixel_count(width: int, height: int) -> None:
    # Up to twice the limit, Pillow only warns; no thread can safely make an error of its warnings.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"image of {width}x{height} pixels: allowed are {limit} pixels")


def _is_misread(image: Image.Image) -> bool:
    """Whether Pillow would silently get the pixels wrong, or their range of values is unknown."""
    if image.format == "PNG":  # Pillow compares a transparent colour with values scaled to 8 bits
        return "transparency" in image.info and image.mode != "P" and ";" in image.tile[0][3]
    if image.format == "TIFF" and image.mode != "F":
        tags, bits = image.tag_v2, max(image.tag_v2.get(_BITS, (1,)))
        signed = 2 in tags.get(_SAMPLE_FORMAT, ()) and bits <= 16
        white_is_zero, planes = tags.get(_PHOTOMETRIC) == 0, tags.get(_PLANES) == 2
        return bits == 12 or signed or (bits > 8 and (white_is_zero or planes))
    return image.mode == "F"


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block: the pixels are whole, their orientation unknown
        return None


# From pixels to crops ----------------------------------------------------------------------------


def center_crop(image: Image.Image, size: Size) -> np.ndarray:
    """ADM's centre crop, pixel for pixel: the shorter side becomes `size`, the longer one is cut.

    Of a size that is not square, the image is made to cover it, and what juts out is cut.

    With Pillow up to 12, as the official codes were made, ADM's own code gives the same pixels;
    with Pillow 13 it does not for some shapes (its `resize` takes the two axes in another order).

    Returns:
        uint8 (height, width, 3) of an image of mode RGB.

    Raises:
        DataError: an image so long and narrow that, resized, it exceeds Pillow's MAX_IMAGE_PIXELS.
    """
    rows, columns = sides(size)
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixel_count(width, height)
    pixels = np.asarray(_resize(image, width, height, Image.Resampling.BICUBIC))
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns].copy()


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes across, then down: the order shows, and Pillow 13 changed it for some shapes."""
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def crop(resized_RxRx3: np.ndarray, index: int, spec: CropSpec) -> np.ndarray:
    """One crop of an image that `center_crop` resized to spec.resized.

    Args:
        resized_RxRx3: uint8; or several such images, (..., R, R, C).
        index: of ten crops, in the order of torchvision's TenCrop: top left, top right, bottom
            left, bottom right and centre of the image, then the same five of its mirror image.
            Of two, the image and its mirror image.

    Returns:
        uint8 (..., S, S, C).
    """
    if not 0 <= index < spec.count:
        raise DataError(f"crop {index} does not exist: allowed are 0 to {spec.count - 1}")
    mirrored, place = divmod(index, spec.count // 2)
    image = resized_RxRx3[..., ::-1, :] if mirrored else resized_RxRx3
    (rows, columns), of = sides(spec.image_size), sides(spec.resized)
    low, right = of[0] - rows, of[1] - columns
    middle = round(low / 2), round(right / 2)  # halves to even, as torchvision
    top, left = ((0, 0), (0, right), (low, 0), (low, right), middle)[place]
    return image[..., top : top + rows, left : left + columns, :].copy()


def all_crops(resized_RxRx3: np.ndarray, spec: CropSpec) -> np.ndarray:
    """All crops of an image, as `crop` numbers them: uint8 (C, S, S, 3)."""
    return np.stack([crop(resized_RxRx3, index, spec) for index in range(spec.count)])


def random_crop(image: Image.Image, number: int, size: Size) -> np.ndarray:
    """A crop of an image whose shorter side becomes `size`, as torchvision's Resize does it (bicubic).

    Of a size that is not square, the image is made to cover it.

    Args:
        number: see `RandomCrops`.

    Returns:
        uint8 (height, width, 3) of an image of mode RGB.

    Raises:
        DataError: an image so long and narrow that, resized, it exceeds Pillow's MAX_IMAGE_PIXELS.
    """
    rows, columns = sides(size)
    tall = image.height * columns > image.width * rows
    if tall:
        width, height = columns, columns * image.height // image.width
    else:
        width, height = rows * image.width // image.height, rows
    _check_pixel_count(width, height)
    pixels = np.asarray(_resize(image, width, height, Image.Resampling.BICUBIC))
    places = 1 + (height - rows if tall else width - columns)
    first = (number >> 1) * places // (RandomCrops.count >> 1)
    found = pixels[first : first + rows] if tall else pixels[:, first : first + columns]
    return (found[:, ::-1] if number & 1 else found).copy()


def load_crop(raw: bytes | np.ndarray, index: int, spec: CropSpec | RandomCrops) -> np.ndarray:
    """Decodes an image and cuts crop `index`: uint8 (height, width, 3)."""
    image, _ = decode(raw, spec.exif)
    if isinstance(spec, RandomCrops):
        return random_crop(image, index, spec.image_size)
    return crop(center_crop(image, spec.resized), index, spec)


def load_all_crops(raw: bytes | np.ndarray, spec: CropSpec) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decodes an image and cuts all its crops; crop k is the very pixels of load_crop(raw, k, spec).

    Returns:
        uint8 (C, S, S, 3), and the notes of `decode`.
    """
    image, notes = decode(raw, spec.exif)
    return all_crops(center_crop(image, spec.resized), spec), notes
