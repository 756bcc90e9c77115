"""A VQ tokenizer (LlamaGen's network and losses), trained on images of your own.

    python -m mirai_jax.tokenize --config=configs/tokenizer.py[:scale]

Its workdir is what `--tokenizer` of extract and sample and `tokenizer.path` of a run take. The scales:

    demo           5,000 MNIST digits at 32 pixels, 8x8 tokens (also without a colon)
    fashion_mnist  60,000 images at 32 pixels, 8x8 tokens
    folder         --config.data.images=FOLDER with a folder a class; any size
    vq16           LlamaGen's recipe at 256 pixels, on a folder; 71.9 M parameters
"""

import ml_collections


def get_config(scale: str = "") -> ml_collections.ConfigDict:
    """Every field of a run of mirai_jax.tokenize, with its unit and meaning; here as for vq16.

    Raises:
        ValueError: there is no such scale.
    """
    scale = scale or "demo"
    if scale not in SCALES:
        raise ValueError(f"scale '{scale}' is none of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.name = "tokenizer"
    config.scale = scale

    config.seed = 0  # of parameters, data order and crops
    config.num_steps = 400_000  # updates in the whole run (official: 40 epochs of ImageNet)
    config.batch_size = 128  # images an update, over all devices
    config.ema_decay = 0.9999  # of the weights that the finished run holds
    config.log_every = 100  # steps between progress lines
    config.measure_every = 5_000  # steps between measurements and pictures of held-out images
    config.checkpoint_every = 5_000  # steps between checkpoints
    config.keep_checkpoints = 2  # the newest that are kept
    config.inception = ""  # file of Inception-v3's weights, for FID (see docs/evaluation.md);
    #                        '': the Fréchet distance is EfficientNet-Lite0's
    config.init_from = ""  # weights to begin with: LlamaGen's .pt, a converted folder or a workdir
    config.train = "all"  # all, or decoder: the codes stay those of init_from

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    tokenizer.image_size = (256, 256)  # (height, width) in pixels, multiples of the downsampling
    tokenizer.multipliers = (1, 1, 2, 2, 4)  # channels of each level, finest first, times width;
    #                                          each level but the last halves the resolution
    tokenizer.width = 128  # channels of the finest level, a multiple of 32
    tokenizer.z_channels = 256  # width between encoder and codebook
    tokenizer.vocab_size = 16384  # codes
    tokenizer.code_width = 8  # length of a row of the codebook
    tokenizer.dtype = "bfloat16"  # of the convolutions: float32 or bfloat16; parameters are float32
    tokenizer.start = "random"  # of the codebook: random, or kmeans over the first images' latents
    tokenizer.restart_after = 0  # steps after which a latent of the batch replaces a code that was
    #                              not used in them, again and again; 0: never, as officially
    tokenizer.free_steps = 0  # first steps, in which latents are decoded as they are; restarts then
    #                           make the codebook of them
    tokenizer.init = "official"  # of the weights: as officially; identity: each block begins as the
    #                              identity and layers keep their input's size, which learns faster
    tokenizer.lookup = "straight"  # how gradients pass the lookup: straight, from row to latent, as
    #                                officially; distance: as in DiVeQ (arXiv 2509.26469), which
    #                                learns faster

    config.loss = loss = ml_collections.ConfigDict()
    loss.reconstruction = "l2"  # l2 or l1, of pixels in [-1, 1]
    loss.reconstruction_weight = 1.0
    loss.perceptual_weight = 1.0  # of features of EfficientNet-Lite0, or LPIPS; 0: none
    loss.lpips = ()  # files of LPIPS, which is the official loss: torchvision's vgg16-397923af.pth and
    #                  vgg.pth of LlamaGen or of the package lpips; (): EfficientNet-Lite0
    loss.perceptual_stages = (1, 2, 3)  # whose features, 1 to 7
    loss.commit_weight = 0.25  # of the loss that keeps latents near their codes
    loss.entropy_weight = 0.0  # of the loss that spreads the codes (needs memory: tokens * codes)

    config.discriminator = discriminator = ml_collections.ConfigDict()
    discriminator.weight = 0.5  # of its loss and of the tokenizer's against it; 0: none
    discriminator.start = 20_000  # the step from which on that weight holds; 0 before
    discriminator.loss = "hinge"  # hinge or non_saturating
    discriminator.adaptive = False  # weight times the ratio of gradients at the last layer
    discriminator.width = 64  # channels of its first layer
    discriminator.num_layers = 3  # that halve the resolution

    config.optimizer = optimizer = ml_collections.ConfigDict()  # as in base.py, of both networks
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"
    optimizer.warmup_steps = 0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0

    config.data = data = ml_collections.ConfigDict()
    data.name = "images"  # mnist, fashion_mnist (grey, in memory), or images (colour)
    data.path = ""  # fashion_mnist: the folder of its IDX files, or 'tfds'
    data.images = ""  # images: a folder with a folder a class, or as in mirai_jax/data/images.py
    data.held_out = 2_000  # images kept out of training and measured on
    data.crop_range = 1.25  # random crops of images up to this factor larger than they need be
    data.flip = True  # mirror every other image, by chance
    data.exif = "ignore"  # ignore, as officially, or apply: photos of cameras and phones are turned
    #                       upright; extract's --exif says the same
    data.num_workers = 8  # processes that read and decode; 0: threads of this process

    SCALES[scale](config)
    return config


def _demo(config):
    config.num_steps = 1_000  # 7 epochs
    config.batch_size = 32
    config.ema_decay = 0.99
    config.log_every = 20
    config.measure_every = 250
    config.checkpoint_every = 250
    config.tokenizer.update(
        image_size=(32, 32), multipliers=(1, 1, 2), width=32, z_channels=64, vocab_size=128,
        dtype="float32", start="kmeans", restart_after=50,
    )  # fmt: skip
    config.loss.perceptual_weight = 0.0
    config.discriminator.weight = 0.0
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=50)
    config.data.update(name="mnist", held_out=500, num_workers=0)


def _fashion_mnist(config):
    _demo(config)
    config.num_steps = 4_000  # 2 epochs
    config.measure_every = 1_000
    config.checkpoint_every = 500
    config.tokenizer.vocab_size = 256
    config.data.update(name="fashion_mnist", path="/usr/share/datasets/fashion-mnist")


def _folder(config):
    _demo(config)
    config.num_steps = 8_000
    config.batch_size = 8  # more updates, which matter more at first than their noise
    config.measure_every = 2_000
    config.checkpoint_every = 500
    config.tokenizer.update(
        image_size=(32, 32), vocab_size=512, free_steps=200, init="identity", lookup="distance"
    )  # fmt: skip
    config.optimizer.learning_rate = 2e-3
    config.data.update(
        name="images", exif="apply", held_out=200, crop_range=1.1, num_workers=2
    )  # fmt: skip


SCALES = {
    "demo": _demo,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "vq16": lambda config: None,
}
