"""Images from a generator and a tokenizer on all local devices, which never wait for the host."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mirai_jax.models import batched
from mirai_jax.models import tokenizer as tokenizer_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.vit import resize_bicubic
from mirai_jax.sampling import sampler

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is sampled from.

    Attributes:
        config: of the generator.
        params: its parameters, float32.
        tokenizer: decodes.
        tokenizer_params: its parameters.
        about: where they came from, for the protocol.
    """

    config: GeneratorConfig
    params: Any
    tokenizer: Any
    tokenizer_params: Any
    about: dict[str, Any]


class Painter:
    """Draws images: (labels, indices) -> uint8, over all local devices.

    Each device runs the same programs, one that draws the codes of `batch_size` images and one that
    decodes a few of them, so that their number and what else is drawn do not change an image. A
    batch is drawn while the one before is brought to the host.
    """

    def __init__(
        self,
        source: Source,
        options: sampler.SampleOptions,
        seed: int,
        batch_size: int,
        resize: int = 0,
        devices: list[jax.Device] | None = None,
    ):
        self._devices = batched.LocalDevices(devices)
        mesh, self._batch = self._devices.mesh, batch_size * self._devices.count
        self._params = self._devices.copy(source.params)
        self._tokenizer_params = self._devices.copy(source.tokenizer_params)
        # Decoded at once on each device; the same for every batch size, since another one rounds
        # otherwise.
        side = source.config.grid[0] * source.tokenizer.downsample
        chunk = min(16, batched.images_at_once(side, side))
        split = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("batch"), check_vma=False)
        draw = functools.partial(_codes, source.config, options, seed, chunk)
        self._draw = jax.jit(split(draw, in_specs=(P(), P("batch"), P("batch"))))
        decode = functools.partial(_pixels, source.tokenizer, resize)
        self._decode = jax.jit(split(decode, in_specs=(P(), P("batch"))))

    def __call__(self, labels_N: np.ndarray, indices_N: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        return next(self.stream([(labels_N, indices_N)]))

    def stream(self, asked: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        """The images of each of the (labels, indices), in order: uint8 (N, H, W, 3).

        Batches run across their borders, and the devices go on, by a batch at most, while the
        caller uses what it was given.
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
        """Begins to draw a batch, or less, which is filled up: one shape, one compilation.

        Returns:
            Its images for `fetch`, while the devices are still at them.
        """
        filled = [np.resize(x, self._batch).astype(np.int32) for x in (labels, indices)]
        chunks = self._draw(self._params, *self._devices.split(filled))
        images = [self._decode(self._tokenizer_params, chunk) for chunk in chunks]
        for some in images:
            some.copy_to_host_async()
        return images

    def fetch(self, begun: list[jax.Array]) -> np.ndarray:
        """uint8 (batch, H, W, 3): waits for what was begun."""
        chunks = [np.asarray(x).reshape(self._devices.count, -1, *x.shape[1:]) for x in begun]
        images = np.concatenate(chunks, axis=1)[:, : self._batch // self._devices.count]
        return images.reshape(-1, *images.shape[2:])


def _one_ahead(begun: Iterable[_T]) -> Iterator[_T]:
    """The same, each when the next was begun."""
    before = []
    for now in begun:
        yield from before
        before = [now]
    yield from before


def _codes(
    config: GeneratorConfig,
    options: sampler.SampleOptions,
    seed: int,
    chunk: int,
    params: Any,
    labels_B: jax.Array,
    indices_B: jax.Array,
) -> list[jax.Array]:
    """One device's codes, in chunks of (chunk, L): the last is filled up."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    keys = sampler.image_keys(key, indices_B)
    codes_BxL = sampler.generate(config, params, labels_B, keys, options)
    count = len(codes_BxL)
    return [codes_BxL[np.arange(k, k + chunk) % count] for k in range(0, count, chunk)]


def _pixels(module: Any, resize: int, params: Any, codes_BxL: jax.Array) -> jax.Array:
    # As the official sampling script brings 384 to 256: torch's bicubic, of what the decoder gives
    # before it is clipped.
    method = "decode_unclipped" if hasattr(module, "decode_unclipped") else "decode"
    images = module.apply({"params": params}, codes_BxL, method=method)
    if resize:
        images = resize_bicubic(images, (resize, resize))
    images = tokenizer_lib.to_uint8(images)
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
