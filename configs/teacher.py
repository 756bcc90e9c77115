"""An encoder for Mirai-I, trained on the data set itself instead of taken from a file.

    python -m mirai_jax.teach --config=configs/teacher.py[:scale]          first, once
    python -m mirai_jax.main --config=configs/mirai_i.py[:scale] --config.teacher.name=dinov2 \\
        --config.teacher.path=runs/teacher-SCALE --config.teacher.image_size=0

It is for data where DINOv2 does not fit or is not available: the same vision transformer, its patches
those of the tokenizer, so that it has one feature vector a token. It sees the images that the
generator trains on, never the held-out ones. The scales are the small ones of configs/base.py: demo
(also without a colon), fashion_mnist, fashion_mnist_medium.
"""

import ml_collections

from configs import base


def get_config(scale: str = "") -> ml_collections.ConfigDict:
    """Every field of a run of mirai_jax.teach, with its unit and meaning.

    Raises:
        ValueError: there is no such scale.
    """
    scale = scale or "demo"
    if scale not in SCALES:
        raise ValueError(
            f"scale '{scale}' has no encoder to train; after the colon goes one of "
            f"{', '.join(SCALES)} (at the imagenet scales DINOv2 is the teacher)"
        )
    generator = base.get_config(scale)  # what the encoder will be the teacher of
    config = ml_collections.ConfigDict()
    config.name = "teacher"
    config.scale = scale

    config.seed = 0  # of parameters, data order, augmentation and masks
    config.num_steps = 1_400  # updates in the whole run
    config.batch_size = 64  # images an update, over all devices
    config.log_every = 25  # steps between progress lines
    config.evaluate_every = 350  # steps between measurements on the held-out images
    config.checkpoint_every = 350  # steps between checkpoints
    config.keep_checkpoints = 2  # the newest that are kept

    # What the encoder learns from: labels (a linear classifier of the averaged patch features),
    # masked (no labels: the codes of hidden patches, as BEiT), or both (the sum of their losses).
    config.objective = "labels"
    config.label_smoothing = 0.1  # probability that goes to all classes alike
    config.masked_share = 0.4  # of an image's patches that are hidden (masked and both)
    config.shift = 2  # pixels by which an image is moved at most, each way; black comes in
    config.flip = False  # mirror every other image, by chance

    config.network = network = ml_collections.ConfigDict()
    network.width = 128  # channels, a multiple of 64: attention heads are 64 wide
    network.num_layers = 4  # transformer blocks
    network.dtype = "float32"  # of matrix products: float32 or bfloat16; parameters are float32

    config.optimizer = optimizer = generator.optimizer  # as in base.py
    optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100)

    config.data = data = ml_collections.ConfigDict()
    data.name = generator.data.name  # mnist or fashion_mnist
    data.path = generator.data.path  # folder of IDX files, or 'tfds' (fashion_mnist)
    data.held_out = generator.data.held_out  # mnist: images kept out of training
    data.num_workers = 0  # processes that read; 0: threads of this process

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    tokenizer.image_size = generator.tokenizer.image_size  # pixels a side
    tokenizer.patch = generator.tokenizer.patch  # pixels a side of a patch, the encoder's too
    tokenizer.vocab_size = generator.model.vocab_size  # codes (masked and both)

    SCALES[scale](config)
    return config


def _fashion_mnist(config):
    config.num_steps = 2_800  # 3 epochs
    config.log_every = 50
    config.evaluate_every = 700
    config.checkpoint_every = 700
    config.flip = True


def _fashion_mnist_medium(config):
    config.num_steps = 9_360  # 40 epochs
    config.batch_size = 256
    config.log_every = 50
    config.evaluate_every = 936
    config.checkpoint_every = 936
    config.flip = True
    config.network.update(width=384, num_layers=6, dtype="bfloat16")
    config.optimizer.update(learning_rate=5e-4, warmup_steps=500)


SCALES = {
    "demo": lambda config: None,
    "fashion_mnist": _fashion_mnist,
    "fashion_mnist_medium": _fashion_mnist_medium,
}
