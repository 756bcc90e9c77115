"""The study's stage 3: a finished LlamaGen as teacher, which the student cannot change through an EMA.

    python -m launch.sweep --sweep=launch/sweeps/study_static.py --scale=fashion_mnist

Offsets into the future and into the past, three seeds. The teacher of all runs is LlamaGen of seed 0 in
study_direction.py, which must have run before; recipe, start and baseline are those of that sweep.
"""

from launch.overrides import over, product
from launch.sweeps.study_direction import LONG, PAST, START
from launch.sweeps.study_rates import MIRAI_E


def get_sweep(scale: str):
    teacher = {
        "config": MIRAI_E,
        "foresight[0].source": "checkpoint",
        "foresight[0].checkpoint": f"runs/sweeps/study_direction-{scale}/llamagen-seed=0",
        "foresight[0].start_epoch": START,
    }
    arms = [{"name": "static-future"}, {"name": "static-past", "foresight[0].offsets": PAST}]
    return [{**run, **teacher, **LONG} for run in product(over("seed", range(3)), arms)]
