"""Images from a generator and a tokenizer on all local devices, which never wait for the host."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mirai_jax.models import batched, decoding
from mirai_jax.models import tokenizer as tokenizer_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.preprocessing import resize_bicubic
from mirai_jax.sampling import keys, sampler


@dataclasses.dataclass(frozen=True)
class Source:
    """A generator, with float32 parameters, and the tokenizer that decodes its codes."""

    config: GeneratorConfig
    params: Any
    tokenizer: Any
    tokenizer_params: Any
    about: dict[str, Any]  # where they came from and their checksums, for the protocol


@dataclasses.dataclass(frozen=True)
class Given:
    """What is kept of an image: its codes (L,) int32, -1 where codes are drawn; and two pictures,
    uint8 (2, H, W, 3), the image and what is kept of it."""

    codes_L: np.ndarray
    pictures: np.ndarray


class Painter:
    """Draws images over all local devices: (labels, indices) -> uint8 pixels.

    Each of them keeps what is `given`.

    Every device runs the same two programs: one draws the codes of `batch_size` images, the other
    decodes a few of them. So neither the number of devices nor the other images change an image. The
    devices draw a batch while the one before is copied to the host.
    """

    def __init__(
        self,
        source: Source,
        options: sampler.SampleOptions,
        seed: int,
        batch_size: int,
        resize: int = 0,
        devices: list[jax.Device] | None = None,
        given: Given | None = None,
    ):
        self._devices = batched.LocalDevices(devices)
        mesh, self._batch = self._devices.mesh, batch_size * self._devices.count
        self._params = self._devices.copy(source.params)
        self._tokenizer_params = self._devices.copy(source.tokenizer_params)
        # Images decoded at once on each device. The number does not depend on the batch size:
        # another number would round differently.
        sides = (tokens * source.tokenizer.downsample for tokens in source.config.grid)
        chunk = min(16, batched.images_at_once(*sides))
        in_row = decoding.heads_in_row(source.config, mesh.devices.flat[0].platform)
        self._draw = _drawing(mesh, source.config, options.form, seed, chunk, in_row)
        self._decode = _decoding(mesh, source.tokenizer, resize)
        self._scales_L = options.scales(source.config.length)
        self._given_L = given.codes_L if given else None

    @property
    def batch(self) -> int:
        """Images drawn at once, over all devices."""
        return self._batch

    def load(self, params: Any) -> None:
        """Takes other weights of the same generator; None frees them."""
        self._params = self._devices.copy(params)

    def stream(self, asked: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        """Yields the images of each of the (labels, indices), in order: uint8 (N, H, W, 3).

        Batches run across their borders. While the caller uses one array the devices draw on, by a
        batch at most.
        """
        if not asked:
            return
        labels, indices = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        starts = range(0, len(labels), self._batch)
        begun = (
            self.begin(labels[start : start + self._batch], indices[start : start + self._batch])
            for start in starts
        )
        images = (image for batch in _one_ahead(begun) for image in self.fetch(batch))
        for _, some in asked:
            yield np.stack(list(itertools.islice(images, len(some))))

    def begin(self, labels: np.ndarray, indices: np.ndarray) -> list[jax.Array]:
        """Starts to draw a batch for `fetch`, filled up if it is smaller: one shape, one compilation."""
        filled = [np.resize(x, self._batch).astype(np.int32) for x in (labels, indices)]
        filled = self._devices.split(filled)
        chunks = self._draw(self._params, *filled, self._scales_L, self._given_L)
        images = [self._decode(self._tokenizer_params, chunk) for chunk in chunks]
        for some in images:
            some.copy_to_host_async()
        return images

    def fetch(self, begun: list[jax.Array]) -> np.ndarray:
        """Waits for a batch: uint8 (batch, H, W, 3)."""
        chunks = [np.asarray(x).reshape(self._devices.count, -1, *x.shape[1:]) for x in begun]
        images = np.concatenate(chunks, axis=1)[:, : self._batch // self._devices.count]
        return images.reshape(-1, *images.shape[2:])


def _one_ahead(begun: Iterable[Any]) -> Iterator[Any]:
    """Yields the same batches, each after the next one was begun."""
    before = []
    for now in begun:
        yield from before
        before = [now]
    yield from before


# Painters share programs: a sweep over scales of guidance compiles one.
@functools.lru_cache(maxsize=8)
def _drawing(
    mesh: Mesh,
    config: GeneratorConfig,
    form: sampler.SampleForm,
    seed: int,
    chunk: int,
    heads_in_row: int,
) -> Callable:
    """`_codes` for each device's share of the labels and indices."""
    codes = functools.partial(_codes, config, form, seed, chunk, heads_in_row)
    return _split(codes, mesh, (P(), P("batch"), P("batch"), P(), P()))


@functools.lru_cache(maxsize=8)
def _decoding(mesh: Mesh, tokenizer: Any, resize: int) -> Callable:
    """`_pixels` for each device's share of the codes."""
    return _split(functools.partial(_pixels, tokenizer, resize), mesh, (P(), P("batch")))


def _split(program: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    specs = {"in_specs": in_specs, "out_specs": P("batch")}
    return jax.jit(jax.shard_map(program, mesh=mesh, **specs, check_vma=False))


def _codes(
    config: GeneratorConfig,
    form: sampler.SampleForm,
    seed: int,
    chunk: int,
    heads_in_row: int,
    params: Any,
    labels_B: jax.Array,
    indices_B: jax.Array,
    scales_L: jax.Array,
    given_L: jax.Array | None,
) -> list[jax.Array]:
    """One device's codes, in chunks of (chunk, L): the last is filled up."""
    keys_B = keys.image_keys(seed, keys.SAMPLES, indices_B)
    shape = len(labels_B), config.length
    given_BxL = None if given_L is None else jnp.broadcast_to(given_L, shape)
    images = config, params, labels_B, keys_B
    codes_BxL = sampler.draw(*images, form, scales_L, given_BxL, heads_in_row)
    count = len(codes_BxL)
    return [codes_BxL[np.arange(k, k + chunk) % count] for k in range(0, count, chunk)]


def _pixels(module: Any, resize: int, params: Any, codes_BxL: jax.Array) -> jax.Array:
    # The official sampling script resizes 384 to 256 so: torch's bicubic, before pixels are clipped.
    method = "decode_unclipped" if hasattr(module, "decode_unclipped") else "decode"
    images = module.apply({"params": params}, codes_BxL, method=method)
    if resize:
        images = resize_bicubic(images, (resize, resize))
    images = tokenizer_lib.to_uint8(images)
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
