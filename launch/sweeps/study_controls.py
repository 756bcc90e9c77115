"""The study's stage 2: what of Mirai-E's gain is self-distillation, and does it need the image?

    python -m launch.sweep --sweep=launch/sweeps/study_controls.py --scale=fashion_mnist

Three heads at the same position, and Mirai-E with the states of another image as targets; three seeds.
Compare with LlamaGen and Mirai-E of the same seeds in study_direction.py, whose recipe this is.
"""

from launch.overrides import over, product
from launch.sweeps.study_direction import LONG, START
from launch.sweeps.study_rates import MIRAI_E


def get_sweep(scale: str):
    del scale  # its numbers fit fashion_mnist alone
    heads = {f"foresight[{i}].start_epoch": START for i in range(3)}
    arms = [
        {"name": "same-position", "config": "configs/mirai_e_same.py", **heads},
        {
            "name": "shuffled-e",
            "config": MIRAI_E,
            "foresight[0].targets": "shuffled",
            "foresight[0].start_epoch": START,
        },
    ]
    return [{**run, **LONG} for run in product(over("seed", range(3)), arms)]
