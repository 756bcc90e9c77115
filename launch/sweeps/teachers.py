"""Mirai-I with other frozen encoders: EfficientNet-Lite0 in finer maps, and encoders trained here.

    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist
    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist --config.objective=masked \\
        --workdir=runs/teacher_masked-fashion_mnist
    python -m launch.sweep --sweep=launch/sweeps/teachers.py --scale=fashion_mnist --parallel=2

One seed each; compare with seed 0 of Mirai-I in variants.py, whose encoder is EfficientNet-Lite0 (trained
on ImageNet), after as many steps as diagnostics.py trains. The encoders trained here are the vision
transformer on the data set itself, with its labels and without. Published for Mirai-I (ImageNet 256, B,
80 epochs, FID): DINOv2-B 4.77, DINOv3-B 5.02, MAE-B 6.34, none 6.36.
"""

from launch.sweeps import diagnostics
from mirai_jax.utils.errors import ConfigError

CONFIG = "configs/mirai_i.py"


def get_sweep(scale: str):
    if scale.startswith("imagenet"):
        raise ConfigError("these encoders are for the small scales; ImageNet has DINOv2")
    own = {"teacher.name": "dinov2", "teacher.image_size": 0}
    runs = [
        {"name": "own-labels", **own, "teacher.path": f"runs/teacher-{scale}"},
        {"name": "own-masked", **own, "teacher.path": f"runs/teacher_masked-{scale}"},
        {"name": "efficientnet-128", "teacher.image_size": 128},
    ]
    return [{**run, "seed": 0, **diagnostics.steps(scale)} for run in runs]
