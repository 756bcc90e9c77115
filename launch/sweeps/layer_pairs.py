"""Student and teacher at different blocks: 8 -> 6 of 12, 8 -> 10, and the other way round.

    python -m launch.sweep --sweep=launch/sweeps/layer_pairs.py --parallel=2

Published, ImageNet 256, B (12 blocks), 80 epochs: the same block 8 on both sides is best (FID 5.22), any
other pair is worse, and student 8 with teacher 6 is the worst; their numbers are unknown. Other depths
take the same shares of it. layer.py has the pairs of equal blocks.
"""

from launch.overrides import product, seeds
from launch.sweeps.layer import depth

CONFIG = "configs/mirai_e.py"

PAIRS = ((8, 8), (8, 6), (8, 10), (6, 8), (10, 8))  # student, teacher; of 12 blocks


def get_sweep(scale: str):
    blocks = dict.fromkeys(tuple(round(n * depth(scale) / 12) for n in pair) for pair in PAIRS)
    ways = [
        {
            "name": f"{student}-to-{teacher}",
            "foresight[0].student_layer": student,
            "foresight[0].teacher_layer": teacher,
        }
        for student, teacher in blocks
    ]
    return product(ways, seeds(scale))
