"""Where the targets come from: the causal EMA or a bidirectional encoder, all else alike.

    python -m launch.sweep --sweep=launch/sweeps/source.py --parallel=2

Both have the three positions of Mirai-E, and the encoder also the same position alone, as in Mirai-I.
Published, ImageNet 256, B, 80 epochs, FID: EMA 5.22; encoders for Mirai-I: DINOv2-B 4.77, DINOv3-B 5.02,
MAE-B 6.34 (`--set=teacher.name=dinov3_vitb16` or `mae_vitb16`). On ImageNet the encoder needs
`--set=data.images=...` and `--set=teacher.path=...`. A static pretrained generator is a source too, but
it must be trained first:
    python -m mirai_jax.main --config=configs/mirai_e.py --config.foresight[0].source=checkpoint \\
        --config.foresight[0].checkpoint=runs/llamagen-demo --workdir=runs/static
"""

from launch.overrides import chain, over, product, seeds


def get_sweep(scale: str):
    future = product(
        over("config", ["configs/mirai_e.py"]),
        over("foresight[0].source", ["ema", "bidirectional"]),
    )
    return product(chain(future, over("config", ["configs/mirai_i.py"])), seeds(scale))
