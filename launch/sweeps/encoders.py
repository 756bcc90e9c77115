"""Mirai-I with other frozen encoders: DINOv2, DINOv3 and MAE, all ViT-B.

    python -m launch.sweep --sweep=launch/sweeps/encoders.py --scale=imagenet_b --set=data.path=codes/imagenet \\
        --set=data.images=imagenet/train --set=tokenizer.path=vq_ds16_c2i.pt \\
        --set=evaluate_reference=VIRTUAL_imagenet256_labeled.npz \\
        --set=evaluate_inception=pt_inception-2015-12-05-6726825d.pth \\
        --slurm --gpus=8 --partition=long

Published, ImageNet 256, B, 80 epochs, FID: DINOv2-B 4.77, DINOv3-B 5.02, MAE-B 6.34, without an encoder
6.36. The files are looked for where the command is given, under their published names. At small scales these
are stages of EfficientNet-Lite0, which needs no file; teachers.py has encoders trained on the data set.
"""

from launch.overrides import over, product, seeds, zipped

CONFIG = "configs/mirai_i.py"

FILES = {
    "dinov2_vitb14": "dinov2_vitb14_pretrain.pth",
    "dinov3_vitb16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "mae_vitb16": "mae_pretrain_vit_base.pth",
}


def get_sweep(scale: str):
    if scale.startswith("imagenet"):
        return zipped(over("teacher.name", FILES), over("teacher.path", FILES.values()))
    return product(over("teacher.stage", [3, 5, 7]), seeds(scale))
