"""The study's stage 1: LlamaGen, Mirai-E, and Mirai-E whose heads look into the past, five seeds.

    python -m launch.sweep --sweep=launch/sweeps/study_direction.py --scale=fashion_mnist

Six epochs of a cosine to zero, assessed at nine points. The learning rate of each arm is its best of
stage 0 (study_rates.py): 4e-3 for both. Future against past is the study's one primary test.
"""

from launch.overrides import over, product
from launch.sweeps.study_rates import BASELINE, MIRAI_E, START_SHARE, recipe

PAST = ((0, 0), (0, -1), (-1, 0))
START = START_SHARE * 6  # epochs
LONG = {**recipe(6), "optimizer.learning_rate": 4e-3}


def get_sweep(scale: str):
    del scale  # its numbers fit fashion_mnist alone
    start = {"foresight[0].start_epoch": START}
    arms = [
        {"name": "llamagen", "config": BASELINE},
        {"name": "future", "config": MIRAI_E, **start},
        {"name": "past", "config": MIRAI_E, **start, "foresight[0].offsets": PAST},
    ]
    return [{**run, **LONG} for run in product(over("seed", range(5)), arms)]
