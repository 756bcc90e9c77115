"""Mirai-I and its neighbours, one run each: block-causal encoders, LlamaGen-REPA, static teachers, windows.

    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist
    python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist --config.objective=masked \\
        --workdir=runs/teacher_masked-fashion_mnist
    python -m launch.sweep --sweep=launch/sweeps/neighbours.py --scale=fashion_mnist --parallel=2

One seed each, as short as the runs of diagnostics.py. The two encoders are trained on the data set itself,
with its labels and without. `static-...` take this sweep's LlamaGen as teacher: they are its last runs, and
with `--parallel` the same command starts them again if they began too early. The axes with several seeds are
blocks.py, repa.py, static.py and followup.py.
"""

from configs import base
from launch.sweeps.diagnostics import MIRAI_E, MIRAI_I, change, steps
from launch.sweeps.k import OFFSETS
from mirai_jax.utils.errors import ConfigError

ENCODERS = {"labels": "teacher", "masked": "teacher_masked"}


def get_sweep(scale: str):
    if scale.startswith("imagenet"):
        raise ConfigError("these encoders are for the small scales; ImageNet has DINOv2")
    height, width = base.get_config(scale).model.grid
    own = {"teacher.name": "dinov2", "teacher.image_size": 0}
    runs = [
        {"name": "llamagen", "config": "configs/llamagen.py"},
        *(
            {
                "name": f"{objective}-b={size}", "config": MIRAI_I, **own,
                "teacher.path": f"runs/{folder}-{scale}", "teacher.block": size,
            }
            for objective, folder in ENCODERS.items()
            for size in (0, height * width // 2, 2 * width, width, 1)
        ),
        {"name": "mirai-i", "config": MIRAI_I},
        {"name": "llamagen-repa", "config": "configs/llamagen_repa.py"},
        change("window-row", MIRAI_I, window=width),
        change("window-rows-2", MIRAI_I, window=2, window_along="rows"),
        change("transformer", MIRAI_I, projector="transformer"),
        *(
            change(
                f"static-k={k}", MIRAI_E, source="checkpoint", offsets=OFFSETS[k],
                checkpoint=f"runs/sweeps/neighbours-{scale}/llamagen",
            )
            for k in (3, 9)
        ),
    ]  # fmt: skip
    return [{**run, "seed": 0, **steps(scale)} for run in runs]
