"""Mirai's gain without what should cause it, three seeds each.

    python -m launch.sweep --sweep=launch/sweeps/controls.py --scale=fashion_mnist --parallel=2

Mirai-E without the future (past offsets; the EMA at the same position, with the weight of all three
heads), the image (targets of another one) and the grid (the next positions of the raster, an axis of the
paper too). Mirai-I without the image. And the start, which differs between the two: Mirai-E from the
first step on, Mirai-I as late as Mirai-E. Compare each run with the same seed of variants.py, after as
many steps as diagnostics.py trains.
"""

from configs import base
from launch.overrides import product, seeds
from launch.sweeps.diagnostics import MIRAI_I, change, steps


def get_sweep(scale: str):
    term = base.term(base.get_config(scale))
    changes = [
        change("past-only", offsets=((0, 0), (0, -1), (-1, 0))),
        change("same-position", offsets=((0, 0),), weights=(term.weights[0] * len(term.offsets),)),
        change("shuffled-e", targets="shuffled"),
        change("shuffled-i", MIRAI_I, targets="shuffled"),
        change("early-e", start_epoch=0.0),
        change("late-i", MIRAI_I, start_epoch=term.start_epoch),
        change("internal-1d", layout="1d", offsets=(0, 1, 2)),
    ]
    return product(seeds(scale), [{**run, **steps(scale)} for run in changes])
