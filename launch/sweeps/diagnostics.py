"""One change at a time to Mirai-E: level, borders, source, block, K, weight and start.

    python -m launch.sweep --sweep=launch/sweeps/diagnostics.py --scale=fashion_mnist --parallel=2

One seed each; compare with seed 0 of Mirai-E in variants.py (K = 3, internal, 2-D, wrap, two thirds of
the depth, weight 2). At the scale fashion_mnist these runs are shorter; compare with the checkpoint of
the same step, since nothing in a run depends on where it ends (the learning rate is constant). The
paper's axes with several seeds are the other files (docs/sweeps.md lists them).
"""

from configs import base
from launch.overrides import Entry
from launch.sweeps import k, layer
from mirai_jax.config.terms import two_thirds

STEPS = {"fashion_mnist": 2_000}  # where it differs from the config's

MIRAI_E, MIRAI_I = "configs/mirai_e.py", "configs/mirai_i.py"


def change(name: str, config: str = MIRAI_E, **fields) -> Entry:
    """An entry: the config with these fields of its first foresight term."""
    return {"name": name, "config": config, **{f"foresight[0].{f}": v for f, v in fields.items()}}


def get_sweep(scale: str):
    term, blocks = base.term(base.get_config(scale)), layer.depth(scale)
    quarters = range(blocks // 4, blocks + 1, blocks // 4)
    layers = [n for n in quarters if n != two_thirds(blocks)]
    runs = [
        # What is aligned, and along what.
        change("output-2d", level="output"),
        change("output-1d", level="output", layout="1d", offsets=(0, 1, 2)),
        change("borders-mask", borders="mask"),
        change("source-bidirectional", source="bidirectional"),
        # Where, how far, how strongly and from when on.
        *(change(f"layer-{n}", student_layer=n, teacher_layer=n) for n in layers),
        change("k-1", offsets=k.OFFSETS[1]),
        change("k-9", offsets=k.OFFSETS[9]),
        *(change(f"weight-{w:g}", weights=(w,)) for w in (0.5, 1.0, 4.0)),
        change(f"start-{2.5 * term.start_epoch:g}", start_epoch=2.5 * term.start_epoch),
    ]
    return [{**run, "seed": 0, **steps(scale)} for run in runs]


def steps(scale: str) -> dict[str, int]:
    """The field of a run's length where it is shorter than the scale's."""
    return {"num_steps": STEPS[scale]} if scale in STEPS else {}
