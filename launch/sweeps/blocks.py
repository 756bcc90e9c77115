"""How much of the future the targets of Mirai-I know: the frozen encoder, block-causal.

    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist
    python -m launch.sweep --sweep=launch/sweeps/blocks.py --scale=fashion_mnist --parallel=2

The tokens of the raster come in blocks of b, and a patch attends to patches of the same and of earlier
blocks only: b is one token, one row, two, four, half of the image, and all of it (the encoder as it is).
Published: the smaller b, the worse the FID, monotonically, so that the gain of Mirai-I is foresight. At
the small scales the encoder is the vision transformer trained on the data set itself, for convolutions
see across blocks; on ImageNet it needs `--set=data.images=...` and `--set=teacher.path=...`.
"""

from configs import base
from launch.overrides import product, seeds

CONFIG = "configs/mirai_i.py"


def get_sweep(scale: str):
    height, width = base.get_config(scale).model.grid
    tokens = height * width
    sizes = sorted({1, width, 2 * width, 4 * width, tokens // 2, tokens})
    runs = [{"name": f"b={size}", "teacher.block": size} for size in sizes]
    if not scale.startswith("imagenet"):
        own = {"teacher.name": "dinov2", "teacher.image_size": 0}
        own["teacher.path"] = f"runs/teacher-{scale}"
        runs = [{**run, **own} for run in runs]
    return product(runs, seeds(scale))
