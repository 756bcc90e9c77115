"""Sampling: KV-cached, the whole sequence in one jit, with classifier-free guidance.

Image i is drawn from its own key, `fold_in(key, i)`, whatever batch it is in.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.models import decoding, kv_cache
from mirai_jax.models.generator import GeneratorConfig

GUIDANCE_SCHEDULES = ("constant", "linear", "power_cosine")


@dataclasses.dataclass(frozen=True)
class SampleForm:
    """What a program that draws tokens is compiled for: `SampleOptions` without the scales of its guidance.

    Attributes:
        guided: whether logits are `uncond + scale * (cond - uncond)`; False runs no unconditional half.
        others: as those of `SampleOptions`.
    """

    guided: bool
    interval: int
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    cache_dtype: str


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How tokens are drawn from logits (official file: autoregressive/models/generate.py).

    Attributes:
        guidance: logits are `uncond + guidance * (cond - uncond)`; 1 runs no unconditional half.
        interval: the first token is always guided, the t-th after it only while t - 1 <= interval;
            -1 guides every token.
        temperature: logits are divided by it, before the filters.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability exceeds p, of equally
            likely ones those of the lowest codes; 1 keeps all.
        greedy: take the likeliest token.
        schedule: of the guidance over the tokens t = 0 ... L - 1. 'constant'; or 1 + (guidance - 1) w, where
            'linear' has w = t / (L - 1), and 'power_cosine' w = (1 - cos(pi (t / L)^power)) / 2, as RAR
            samples (bytedance/1d-tokenizer, modeling/rar.py).
        power: of 'power_cosine': a larger one leaves more of the first tokens unguided. RAR has scales of
            16, 15.5, 6.9 and 8 with powers of 2.75, 2.5, 1.5 and 1.2 (B, L, XL, XXL).
        cache_dtype: of the keys and values that are kept: 'model' (as computed), or 'int8', rounded.
    """

    guidance: float = 1.0
    interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    schedule: str = "constant"
    power: float = 2.75
    cache_dtype: str = "model"

    def __post_init__(self):
        for name, value, good, allowed in (
            ("guidance", self.guidance, 1 <= self.guidance < float("inf"), "1 (none) or more"),
            ("interval", self.interval, self.interval >= -1, "-1 (always) or more"),
            ("temperature", self.temperature, self.temperature > 0, "more than 0"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1 (all)"),
            (
                "schedule",
                self.schedule,
                self.schedule in GUIDANCE_SCHEDULES,
                f"one of {', '.join(GUIDANCE_SCHEDULES)}",
            ),
            ("power", self.power, 0 < self.power < float("inf"), "more than 0"),
            (
                "cache_dtype",
                self.cache_dtype,
                self.cache_dtype in kv_cache.DTYPES,
                f"one of {', '.join(kv_cache.DTYPES)}",
            ),
        ):
            if not good:
                raise ValueError(f"sample.{name} is {value}; it must be {allowed}")

    @property
    def form(self) -> SampleForm:
        """All but how strong the guidance is, which `scales` gives: one program serves many scales."""
        shared = {field.name for field in dataclasses.fields(SampleForm)} - {"guided"}
        fields = {name: getattr(self, name) for name in shared}
        return SampleForm(guided=self.guidance > 1, **fields)

    def scales(self, length: int) -> np.ndarray:
        """The guidance of each of `length` tokens, float32; `interval` is apart from it."""
        t = np.arange(length)
        share = {
            "constant": np.ones(length),
            "linear": t / max(length - 1, 1),
            "power_cosine": (1 - np.cos(np.pi * (t / length) ** self.power)) / 2,
        }[self.schedule]
        return np.float32(1 + (self.guidance - 1) * share)


def filter_logits(logits_BxV: jax.Array, options: SampleOptions | SampleForm) -> jax.Array:
    """Temperature, then top-k, then top-p; what is dropped becomes -inf. float32 in and out."""
    logits = logits_BxV / options.temperature
    if options.top_k:
        smallest = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if options.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # The first token past the threshold is kept: a token goes if those before it exceed p.
        before = jnp.pad(cumulative[..., :-1], ((0, 0), (1, 0)))
        kept = before <= options.top_p
        last = jnp.where(kept, descending, jnp.inf).min(axis=-1, keepdims=True)
        # In bfloat16 many are as likely as the last one: no more of them than belong to the set.
        ties = logits == last
        room = kept.sum(axis=-1, keepdims=True) - (logits > last).sum(axis=-1, keepdims=True)
        dropped = (logits < last) | (ties & (jnp.cumsum(ties, axis=-1) > room))
        logits = jnp.where(dropped, -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnames=("config", "options", "heads_in_row"))
def generate(
    config: GeneratorConfig,
    params: Any,
    labels_B: jax.Array,
    keys_B: jax.Array,
    options: SampleOptions = SampleOptions(),
    given_BxL: jax.Array | None = None,
    heads_in_row: int = 1,
) -> jax.Array:
    """`draw`, as `options` say; compiled for each of them."""
    scales_L = jnp.asarray(options.scales(config.length))
    return draw(config, params, labels_B, keys_B, options.form, scales_L, given_BxL, heads_in_row)


def draw(
    config: GeneratorConfig,
    params: Any,
    labels_B: jax.Array,
    keys_B: jax.Array,
    form: SampleForm,
    scales_L: jax.Array,
    given_BxL: jax.Array | None = None,
    heads_in_row: int = 1,
) -> jax.Array:
    """Draws whole images of tokens, to be traced.

    Args:
        config, params: of the generator (the EMA's parameters, as a rule).
        labels_B: int, classes in [0, num_classes).
        keys_B: typed PRNG keys, one an image.
        scales_L: float32, the guidance of each token, from `SampleOptions.scales`; it has no part where
            `form` is not guided.
        given_BxL: int32 codes that stand in place of drawn ones, -1 where one is drawn; None: all are.
            A drawn code depends on the given ones before it alone.
        heads_in_row: how the cache lies in memory, from `decoding.heads_in_row`.

    Returns:
        int32 (B, L) codes in raster order.

    Raises:
        ValueError: guidance is asked of a generator without a null class.
    """
    if form.guided and not config.has_null_class:
        raise ValueError(
            "sample.guidance must be 1, for the generator has no null class (model.class_dropout is 0)"
        )
    count = labels_B.shape[0]
    if form.guided:
        labels_B = jnp.concatenate([labels_B, jnp.full_like(labels_B, config.null_class)])
    prepared = decoding.prepare(config, params)

    def step(carry, at):
        codes, cache = carry
        position, given = at
        twice = jnp.concatenate([codes, codes]) if form.guided else codes
        logits, cache = decoding.decode(config, prepared, twice, labels_B, cache, position)
        if form.guided:
            conditional, unconditional = logits[:count], logits[count:]
            logits = unconditional + scales_L[position] * (conditional - unconditional)
            if form.interval >= 0:
                # Token t after the first is drawn at position t: guided while t - 1 <= interval.
                logits = jnp.where(position - 1 <= form.interval, logits, conditional)
        logits = filter_logits(logits, form)
        if form.greedy:
            codes = jnp.argmax(logits, axis=-1)
        else:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, position)
            codes = jax.vmap(jax.random.categorical)(keys, logits)
        codes = codes.astype(jnp.int32)
        if given is not None:
            codes = jnp.where(given < 0, codes, given)
        return (codes, cache), codes

    codes, cache, drawn = jnp.zeros(count, jnp.int32), None, []
    for start, stop in decoding.segments(config.length):
        if cache is None:
            size = labels_B.shape[0], stop, heads_in_row
            cache = decoding.empty_cache(config, *size, form.cache_dtype)
        cache = decoding.grow(cache, stop)
        given = None if given_BxL is None else given_BxL[:, start:stop].T
        at = jnp.arange(start, stop), given
        (codes, cache), codes_SxB = jax.lax.scan(step, (codes, cache), at)
        drawn.append(codes_SxB)
    return jnp.concatenate(drawn).T


def image_keys(key: jax.Array, indices: np.ndarray) -> jax.Array:
    """The keys of images `indices`: `fold_in(key, i)`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(indices))
