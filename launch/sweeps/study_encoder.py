"""The study's stage 4: is it the encoder's knowledge of the future that helps Mirai-I?

    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist --config.objective=masked \\
        --workdir=runs/teacher_masked-fashion_mnist
    python -m launch.sweep --sweep=launch/sweeps/study_encoder.py --scale=fashion_mnist

Mirai-I as it is, and with the same encoder block-causal, a block being one row of the grid; three seeds, from
the first step on. The encoder is the first command's, trained without labels and without a mask. Compare with
LlamaGen of the same seeds in study_direction.py; the learning rate was not chosen for Mirai-I.
"""

from launch.overrides import over, product
from launch.sweeps.diagnostics import MIRAI_I
from launch.sweeps.study_direction import LONG


def get_sweep(scale: str):
    own = {"teacher.name": "dinov2", "teacher.image_size": 0, "config": MIRAI_I}
    own["teacher.path"] = f"runs/teacher_masked-{scale}"
    arms = [{"name": f"encoder-{n}", "teacher.block": b} for n, b in (("whole", 0), ("row", 8))]
    return [{**run, **own, **LONG} for run in product(over("seed", range(3)), arms)]
