"""The baseline and Mirai's three forms, three seeds each (on ImageNet one, as published).

    python -m launch.sweep --sweep=launch/sweeps/variants.py --parallel=2

Published, ImageNet 256, B, 80 epochs, FID: LlamaGen 6.36, Mirai-E 5.22, Mirai-I 4.77; E and I together is
not in the paper. docs/sweeps.md has the command for ImageNet.
"""

from launch.overrides import over, product, seeds

VARIANTS = ("llamagen", "mirai_e", "mirai_i", "mirai_e_i")


def get_sweep(scale: str):
    return product(  # seed by seed: a stopped sweep has whole comparisons
        seeds(scale),
        over("config", [f"configs/{variant}.py" for variant in VARIANTS]),
    )
