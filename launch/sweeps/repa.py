"""LlamaGen-REPA against Mirai-I, and Mirai-I with what differs between their losses, one at a time.

    python -m launch.sweep --sweep=launch/sweeps/repa.py --parallel=2

Published for Mirai-I (ImageNet 256, B, 80 epochs): FID 4.77, LlamaGen 6.36; LlamaGen-REPA is not in the paper.
configs/llamagen_repa.py lists all differences: the anchor, the block and the weight are tried here; the
optimizer and the crops come with the whole config. On ImageNet the runs need `--set=data.path=...`,
`--set=data.images=...`, `--set=tokenizer.path=...` and `--set=teacher.path=...`.
"""

from launch.overrides import product, seeds
from launch.sweeps.diagnostics import MIRAI_I, change
from launch.sweeps.layer import depth


def get_sweep(scale: str):
    ways = [
        {"name": "llamagen", "config": "configs/llamagen.py"},
        {"name": "mirai-i", "config": MIRAI_I},
        {"name": "llamagen-repa", "config": "configs/llamagen_repa.py"},
        change("mirai-i-predicted", MIRAI_I, anchor="predicted"),
        change("mirai-i-third", MIRAI_I, student_layer=max(1, round(depth(scale) / 3))),
        change("mirai-i-weight", MIRAI_I, weights=(0.5,)),
    ]
    return product(ways, seeds(scale))
