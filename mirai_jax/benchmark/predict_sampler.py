"""How long sampling takes on one chip: a prediction from the compiled sampler (benchmark/predict.py).

The sampler is a loop over positions for each length of the cache (models/decoding.py): the time of a token
grows with the places of the cache, and is predicted for each loop.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mirai_jax.benchmark import hlo, predict, rates
from mirai_jax.config.schema import Settings
from mirai_jax.models import decoding
from mirai_jax.models import generator as generator_lib
from mirai_jax.sampling import sampler
from mirai_jax.utils.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens drawn with a cache of `places` positions, and milliseconds of one: lower and upper end."""

    places: int
    tokens: int
    milliseconds: tuple[float, float]


def compile_sampler(settings: Settings, batch_size: int, device: jax.Device) -> str:
    """The sampler of a config for one device, compiled ahead of time, as text.

    Args:
        batch_size: images drawn at once.
    """
    config, where = settings.generator, jax.sharding.SingleDeviceSharding(device)

    def draw(params, labels, keys):
        in_row = decoding.heads_in_row(config, device.platform)
        return sampler.generate(config, params, labels, keys, settings.sample, heads_in_row=in_row)

    shapes = jax.eval_shape(
        lambda: (
            generator_lib.init_params(config, jax.random.key(0)),
            jnp.zeros(batch_size, jnp.int32),
            jax.random.split(jax.random.key(0), batch_size),
        )
    )
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.jit(draw).lower(*jax.tree.map(place, shapes)).compile().as_text()


def segments(text: str, chip: rates.Chip, length: int) -> list[Segment]:
    """The loops of a compiled sampler of `length` tokens; a segment of one token is none, and left out.

    Raises:
        TrainingError: the program has other loops.
    """
    program, found = hlo.Program(text), []
    loops = iter(program.loops())
    for start, stop in decoding.segments(length):
        if stop - start == 1:  # the compiler writes it out
            continue
        body = next((body for body, turns in loops if turns == stop - start), None)
        if body is None:
            raise TrainingError(
                f"the compiled sampler has no loop of {stop - start} turns; sampling is not predicted"
            )
        prediction = predict.of_operations(program, program.executed(body), chip)
        found.append(Segment(stop, stop - start, prediction.total))
    return found


def lines(text: str, chip: rates.Chip, settings: Settings, batch_size: int) -> list[str]:
    """A table for the screen of what `compile_sampler` returned."""
    found = segments(text, chip, settings.generator.length)
    batch = [sum(part.tokens * part.milliseconds[end] for part in found) for end in (0, 1)]
    hours = [50_000 / batch_size * ms / 3.6e6 for ms in batch]
    one_more = sum(part.tokens for part in found) < settings.generator.length
    between = predict.between
    return [
        f"sampling on one chip, {batch_size} images at once, guidance {settings.sample.guidance:g}: "
        f"milliseconds a token, predicted {chip.basis}",
        *(f"  {x.places:>5} places{between(*x.milliseconds, '8.2f')}" for x in found),
        f"  50,000 images in {between(*hours, '.2g')} hours, without the tokenizer's decoder"
        + " and the last token" * one_more,
    ]
