"""The sample grids of a run inside the page."""

import base64
import io
from collections.abc import Mapping

from PIL import Image

from mirai_jax.utils import files

_WIDEST = 1000  # pixels of a grid, at most
_SMALL = 150_000  # bytes of a PNG that is taken as it is
_MOST = 40  # grids of a run


def embed(samples: Mapping[int, files.AnyPath], room: int) -> tuple[list[tuple[int, str]], int]:
    """[(step, data URI)] of evenly spaced grids, the first and the last among them, in about `room`
    characters; and how many are left out, for want of room or because they cannot be read."""
    steps = list(samples)
    if not steps:
        return [], 0
    last, end = _uri(samples[steps[-1]]), len(steps) - 1
    count = max(1, min(len(steps), _MOST, room // (len(last) or _SMALL)))
    wanted = sorted({end - round(i * end / max(1, count - 1)) for i in range(count)})
    uris = ((steps[i], last if i == end else _uri(samples[steps[i]])) for i in wanted)
    found = [(step, uri) for step, uri in uris if uri]
    return found, len(steps) - len(found)


def _uri(path: files.AnyPath) -> str:
    """A PNG as it is, or a smaller picture of it; '' where it is damaged."""
    data, kind = path.read_bytes(), "png"
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        if len(data) > _SMALL or max(picture.size) > _WIDEST:
            picture = picture.convert("RGB")
            picture.thumbnail((_WIDEST, _WIDEST))
            file, kind = io.BytesIO(), "webp"
            picture.save(file, "WEBP", quality=85)
            data = file.getvalue()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises of bad bytes
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
