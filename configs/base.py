"""Every field of a run, once, with its unit and meaning; and the scales.

A variant's file (llamagen.py, mirai_e.py, mirai_i.py) calls `base.get_config(scale)` and overrides
what differs. The scale is the part after the colon: `--config=configs/mirai_e.py:imagenet_b`.

    demo            5,000 MNIST digits, 8x8 tokens; minutes on a laptop (also without a colon)
    fashion_mnist   60,000 Fashion-MNIST images, 8x8 tokens; minutes: the scale of results/
    fashion_mnist_medium
                    the same, 16x16 tokens, 21 M parameters: for a GPU
    folder          your images, --config.data.images=FOLDER with a folder a class; classes and
                    tokens follow from them (docs/your_images.md)
    imagenet_b, imagenet_l, imagenet_xl, imagenet_xxl, imagenet_3b
                    ImageNet 256, 16x16 tokens of VQ-16: the paper's recipe for each size
    imagenet_b_384 ... imagenet_3b_384
                    the same on 384x384 pixels, 24x24 tokens
"""

import ml_collections


def get_config(scale: str = "") -> ml_collections.ConfigDict:
    """The LlamaGen baseline at a scale.

    Raises:
        ValueError: the scale is unknown.
    """
    scale = scale or "demo"
    if scale not in SCALES:
        raise ValueError(
            f"scale '{scale}' is unknown; after the colon goes one of {', '.join(SCALES)}"
        )
    config = ml_collections.ConfigDict()
    config.name = "base"  # the variant; with the scale it names the default workdir
    config.scale = scale

    config.seed = 0  # of parameters, data order, dropout and samples
    config.num_steps = 400_320  # updates in the whole run; 80 epochs of ImageNet
    config.batch_size = 256  # images an update, over all devices
    config.ema_decay = 0.9999  # of the parameters' moving average, from step 0; 0: no average
    config.log_every = 100  # steps between progress lines
    config.sample_every = 10_000  # steps between sample grids; 0: only at the end
    config.checkpoint_every = 10_000  # steps between checkpoints
    config.keep_checkpoints = 2  # the newest that are kept
    config.keep_every = 0  # steps: checkpoints at multiples of it are kept for ever; 0: none are
    config.init_from = ""  # weights a new run begins with: a workdir, a converted folder or a
    #                        PyTorch file of a generator; '': fresh ones. Classes and grid may
    #                        differ: classes of equal names keep their rows, others get fresh ones
    config.init_rows = ()  # further rows of the class table to take from init_from: (new, old)
    #                        pairs of classes, by name or number
    config.freeze = ()  # patterns of parameters that are not trained, such as 'generator/layers/*'
    config.accumulate = 1  # parts of a batch computed one after the other, for less memory
    config.nonfinite = "stop"  # at a loss that is not finite: stop, or skip the update, count it,
    #                            and stop after 20 in a row
    config.hang_limit = 1800  # seconds without a finished step (at the start: without an image read
    #                           or encoded) after which a run reports where it hangs and ends
    #                           (another host may be gone); 0: never
    config.profile_steps = ()  # (first, last) step of a profile in the workdir's profile/; (): none

    # Where foresight comes from: a tuple of terms, see `term`. () is LlamaGen.
    config.foresight = ()

    config.model = model = ml_collections.ConfigDict()
    model.size = "B"  # B, L, XL, XXL, 3B, or '' for the three numbers below
    model.num_layers = 0  # transformer blocks; 0: what the size says
    model.num_heads = 0  # attention heads; 0: what the size says
    model.width = 0  # channels; 0: what the size says
    model.vocab_size = 16384  # tokens in the codebook
    model.num_classes = 1000  # labels; the null class comes on top. 0: those of data.images
    model.grid = (16, 16)  # (height, width) of an image in tokens. (0, 0): those of
    #                        tokenizer.image_size
    model.token_dropout = 0.1  # probability, on the embedded tokens
    model.residual_dropout = 0.1  # probability, on attention's output
    model.ffn_dropout = 0.1  # probability, on the FFN's output
    model.class_dropout = 0.1  # probability of the null class; 0: no null class, no guidance
    model.dtype = "bfloat16"  # of matrix products: float32 or bfloat16; parameters are float32
    model.unroll = 1  # blocks an iteration of the layer loop: more compiles longer; all: no loop
    model.remat = "none"  # what the backward pass computes again, for less memory: none, dots (all
    #                       but products with weights) or full (all but a block's input)
    model.attention = "auto"  # xla, or auto: fused kernels where the platform has them; a long run
    #                           times both at its start (docs/performance.md)

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 1e-4  # at its highest
    optimizer.schedule = "constant"  # constant, or cosine to zero at num_steps
    optimizer.warmup_steps = 0  # linear ramp from zero
    optimizer.b1 = 0.9  # AdamW's first decay
    optimizer.b2 = 0.95  # AdamW's second decay
    optimizer.eps = 1e-8  # AdamW's epsilon
    optimizer.weight_decay = 0.05  # decoupled
    optimizer.decayed = "matrices"  # what it acts on: matrices (and embeddings), or all parameters
    optimizer.clip_norm = 1.0  # largest global gradient norm; 0: no clipping

    # Low-rank adapters of the weights of init_from, which are frozen then. Trained are the adapters of
    # wqkv, wo, w1, w2 and w3, the class table and the foresight heads.
    config.lora = lora = ml_collections.ConfigDict()
    lora.rank = 0  # 0: no adapters
    lora.alpha = 16.0  # their product counts alpha / rank times

    config.data = data = ml_collections.ConfigDict()
    data.name = "images"  # mnist, fashion_mnist (in memory), folder (data.images, in memory if it
    #                       fits), or images (on disk; the fields below)
    data.path = ""  # folder of shards of codes (python -m mirai_jax.extract), or of IDX files;
    #                 'tfds' lets tfds fetch fashion_mnist
    data.images = ""  # where the images themselves are, for a teacher that takes them and for
    #                   codes made online: a folder with a folder a class, parquet:GLOB, wds:GLOB,
    #                   hf:OWNER/NAME[@REVISION][:SPLIT], tfds:NAME[:SPLIT], or grain:MODULE:SOURCE
    #                   (docs/image_sources.md)
    data.codes = "stored"  # stored, or online: the tokenizer runs in the step, on the crop itself
    data.crops = "stored"  # one of ten fixed crops; centre: of two, the middle and its mirror
    #                        image; random: the short side becomes image_size, then any crop along
    #                        the long one, mirrored by chance. Not stored: of a folder, or online
    data.crop_range = 1.1  # online: stored crops are taken from the centre image_size * this
    data.flip = True  # whether mirrored crops take part
    data.exif = "ignore"  # ignore, as officially, or apply: photos of cameras and phones are turned
    #                       upright. It acts on a folder and on online codes; for stored codes,
    #                       extract --exif decides
    data.held_out = 0  # images kept out of training (mnist; fashion_mnist has its own 10,000)
    data.held_out_share = 0.0  # share of the images kept out of training by a hash of their names,
    #                            so that more images move no other; not of mnist, fashion_mnist.
    #                            Of stored codes every record is read at the start
    data.min_images = 1  # of a folder or online: classes with fewer images are left out
    data.balanced = False  # whether all classes are drawn equally often
    data.num_workers = 8  # processes that read and decode; 0: threads of this process

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    tokenizer.name = "vq16"  # patch (k-means over patches, fitted at the start), vq16, vq8, or vq
    #                          (the shape its file has)
    tokenizer.path = (
        ""  # weights of all but patch: LlamaGen's .pt, a converted folder, or a workdir
    )
    #                      of mirai_jax.tokenize; only sample grids and online codes need them
    tokenizer.image_size = 256  # pixels a side of the images it sees, or (height, width)
    tokenizer.patch = 4  # pixels a side of a patch (patch only)

    # The frozen bidirectional encoder that terms of source 'bidirectional' look at.
    config.teacher = teacher = ml_collections.ConfigDict()
    teacher.name = "dinov2_vitb14"  # dinov2_vit{s,b,l,g}14[_reg4], dinov3_vit{s,b,l}16,
    #                                 mae_vit{s,b,l}16; dinov2, dinov3 or mae (the shape its file
    #                                 has, heads 64 wide); efficientnet_lite0; or MODULE:CLASS, an
    #                                 encoder of yours (docs/training.md)
    teacher.path = ""  # its weights: the published .pth, a converted folder, or a finished
    #                    workdir of mirai_jax.teach (then with name dinov2 and image_size 0)
    teacher.image_size = 0  # pixels a side of what the encoder is shown; 0: one patch a token (not
    #                         efficientnet_lite0). Features of other patches are resampled to tokens
    teacher.layer = 0  # block whose output is used; 0: the last
    teacher.norm = "auto"  # the final norm after it: final, none, or auto (final, but none for mae)
    teacher.last = 1  # the mean over this many blocks up to teacher.layer
    teacher.block = 0  # block-causal: a patch sees its own and earlier blocks of this many tokens
    #                    of the raster; 0: everything
    teacher.zscore = 0.0  # alpha of (x - alpha * mean) / deviation over the image's places; 0: off
    teacher.stage = 5  # stage whose feature map is used (efficientnet_lite0: 1 to 7)
    teacher.dtype = "auto"  # of every teacher's products: float32 (official: outside autocast),
    #                         bfloat16, or auto: bfloat16 on TPUs, where float32 takes three times
    #                         as long, else float32
    teacher.cached = False  # compute all features once, before training (data sets in memory)

    # Devices: the product must be their number; one entry may be -1, "what is left".
    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # ways to split the batch
    mesh.fsdp = 1  # ways to split the batch and the parameters
    mesh.tensor = 1  # ways to split heads and FFN columns

    # How the sample grids of a run are drawn (from the EMA).
    config.sample = sample = ml_collections.ConfigDict()
    sample.guidance = 2.0  # logits are uncond + guidance * (cond - uncond); 1: none
    sample.interval = -1  # guide the first token and the t-th after it while t - 1 <= interval
    sample.temperature = 1.0  # divides the logits
    sample.top_k = 0  # keep the k likeliest tokens; 0: all
    sample.top_p = 1.0  # keep the likeliest tokens that make up p; 1: all
    sample.greedy = False  # always the likeliest token
    sample.schedule = (
        "constant"  # of the guidance: constant, or growing from 1: linear, power_cosine
    )
    sample.power = 2.75  # of power_cosine; see SampleOptions in mirai_jax/sampling/sampler.py
    sample.cache_dtype = "model"  # of the keys and values kept: model.dtype, or int8: half the
    #                               memory of bfloat16, rounded (docs/performance.md)
    sample.classes = 10  # rows of the grid: the first classes, at most all of them
    sample.per_class = 8  # images of each

    # Weights & Biases (extra `wandb`); its variables, such as WANDB_ENTITY, hold too.
    config.wandb = wandb = ml_collections.ConfigDict()
    wandb.project = ""  # where the run is followed; '': nowhere

    # At the end of a run on labelled images: a classifier trained on the real ones judges this many
    # samples. 0: none.
    config.judged_samples = 0

    # While it trains, over all devices; the last step is always measured. Off at 0 steps, and where
    # there is nothing to compare with.
    config.validate_every = 0  # steps between measurements of the held-out loss
    config.validation_path = ""  # shards of held-out codes (python -m mirai_jax.extract); '': the
    #                              images that data.held_out or data.held_out_share holds out
    config.evaluate_every = 0  # steps between FIDs of samples
    config.evaluate_samples = 2_000  # images drawn for it, as mirai_jax.sample draws them
    config.evaluate_guidance = 0.0  # their scale; 0: sample.guidance
    config.evaluate_reference = ""  # real images or statistics (see mirai_jax.evaluate); '': the
    #                                 images that a data set in memory holds out
    config.evaluate_inception = ""  # Inception's weights; '': EfficientNet-Lite0's features, whose
    #                                 distance is another number than FID and has another name

    SCALES[scale](config)
    return config


def term(config: ml_collections.ConfigDict, **fields) -> ml_collections.ConfigDict:
    """One foresight term: the official Mirai-E, with `fields` over it.

    Small scales take narrower projectors (2048 would be most of the step), and where they have
    fewer epochs, start at an earlier one.
    """
    published = config.scale.startswith("imagenet")
    start_epoch, projector_width = _TERMS.get(config.scale, (15.0, 2048))
    t = ml_collections.ConfigDict()
    t.name = ""  # of its metrics and parameters; '': after its source
    t.source = "ema"  # ema, bidirectional (the teacher), or checkpoint (a pretrained generator)
    t.level = "internal"  # internal (align states) or output (predict tokens, no source needed)
    t.layout = "2d"  # 2d offsets are (rows, columns), 1d ones are raster steps
    t.offsets = ((0, 0), (0, 1), (1, 0))  # K of them, one head each
    t.targets = "own"  # own, or shuffled: of another image of the batch (a control)
    t.window = 1  # source bidirectional: how many features, its own and the next, a target averages
    t.window_along = "positions"  # places of a window: positions of the raster, or rows below
    t.borders = "wrap"  # 2d: wrap (flattened shift, as published) or mask (drop what leaves)
    t.anchor = "consumed"  # a position is named by the token it has consumed (code), or the one
    #                        it predicts: 'predicted' (paper)
    t.weights = (2.0,)  # one a head, or one for all
    t.reduction = "sum"  # over heads: sum (code) or mean (paper)
    t.student_layer = 0  # block whose output is aligned; 0: two thirds of the depth
    t.teacher_layer = 0  # block of the generator that gives targets; 0: two thirds of its depth
    t.start_epoch = start_epoch  # epoch at which the term starts
    t.schedule = (
        ((80.0, 0.5),) if published else ()
    )  # (time, multiplier) pairs: from that time on the weights times it
    t.schedule_unit = "epochs"  # of these times: epochs, or shares of num_steps (0 to 1)
    t.projector = "mlp"  # mlp, or transformer: two causal blocks like the generator's
    t.projector_width = projector_width  # hidden channels of an mlp
    t.projector_init = "normal"  # of an mlp: normal (official), or torch, PyTorch's default
    t.checkpoint = ""  # the pretrained generator (source checkpoint): workdir, or its weights
    t.update(fields)
    return t


def _demo(config):
    config.num_steps = 1_800  # 13 epochs
    config.batch_size = 32
    config.ema_decay = 0.995
    config.log_every = 20
    config.sample_every = 600
    config.checkpoint_every = 300
    config.judged_samples = 1_000
    config.model.update(
        size="", num_layers=4, num_heads=4, width=96, vocab_size=128, num_classes=10, grid=(8, 8),
        dtype="float32", unroll=4,
    )  # fmt: skip
    # A dozen epochs of a small model: there is nothing yet for dropout to prevent.
    config.model.update(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=50)
    config.data.update(name="mnist", held_out=500, num_workers=0)
    config.tokenizer.update(name="patch", image_size=32, patch=4)
    config.teacher.update(name="efficientnet_lite0", image_size=64, stage=5)


def _fashion_mnist(config):
    _demo(config)
    config.num_steps = 3_000  # 1.6 epochs
    config.log_every = 25
    config.sample_every = 1_000
    config.checkpoint_every = 500
    config.keep_every = 500  # what `mirai_jax.evaluate --workdir` looks at
    config.judged_samples = 0  # it judges, too
    config.model.update(width=128, vocab_size=256)
    config.optimizer.warmup_steps = 100
    config.data.update(name="fashion_mnist", path="/usr/share/datasets/fashion-mnist", held_out=0)


def _fashion_mnist_medium(config):
    _fashion_mnist(config)
    config.num_steps = 18_720  # 80 epochs
    config.batch_size = 256
    config.ema_decay = 0.999
    config.log_every = 50
    config.sample_every = 2_340  # 10 epochs
    config.checkpoint_every = 2_340
    config.keep_every = 2_340
    config.model.update(
        num_layers=12, num_heads=6, width=384, grid=(16, 16), dtype="bfloat16", unroll=1,
        token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1,
    )  # fmt: skip
    config.optimizer.update(learning_rate=5e-4, warmup_steps=500)
    config.tokenizer.patch = 2
    config.teacher.image_size = 256  # 16x16 features


def _folder(config):
    _demo(config)
    config.num_steps = 2_000
    config.log_every = 50
    config.sample_every = 1_000
    config.checkpoint_every = 500
    config.model.update(width=128, vocab_size=512, num_classes=0, grid=(0, 0))
    # Folders are often small, and soon known by heart.
    config.model.update(token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1)
    config.optimizer.warmup_steps = 100
    config.data.update(name="folder", crops="centre", exif="apply", held_out=0, held_out_share=0.05)
    with config.tokenizer.ignore_type():  # a tuple takes both sides, or one number for a square
        config.tokenizer.image_size = (32, 32)


def _imagenet(size, pixels=256):
    def override(config):
        # The paper's curves are read at 20, 40, 60, 80 and 300 epochs of 5,004 steps.
        config.checkpoint_every = 10_008
        config.keep_every = config.evaluate_every = 100_080
        config.validate_every = 5_004
        config.evaluate_samples = 50_000
        config.model.size = size
        config.model.grid = (pixels // 16, pixels // 16)
        config.tokenizer.image_size = pixels
        config.sample.guidance = 2.0 if size in ("B", "L") else 1.75
        config.model.remat = "dots"  # half the memory
        if size in ("B", "L"):
            # No loop over the blocks, whose backward pass would find all that it needs copied into stacks:
            # for accelerators, where deeper generators, which would compile too long, stay loops. On a
            # CPU, or at another size or dtype, remat="dots" is as fast or needs less memory.
            config.model.unroll = 12 if size == "B" else 24
            if size == "B" and pixels == 256:
                config.model.remat = "none"  # in bfloat16 Mirai-E's 256 images need 29 GiB
        if size in ("XXL", "3B"):  # 23 and 50 GB of parameters, EMA and optimizer state
            config.mesh.update(data=1, fsdp=-1)
            config.model.remat = "full"

    return override


# Of each small scale's terms: start_epoch (early in a run: published is a fifth), projector_width.
_TERMS = {
    "demo": (1.0, 192),
    "fashion_mnist": (0.3, 256),
    "folder": (1.0, 256),
    "fashion_mnist_medium": (15.0, 768),
}

SCALES = {
    "demo": _demo,
    "fashion_mnist": _fashion_mnist,
    "fashion_mnist_medium": _fashion_mnist_medium,
    "folder": _folder,
    **{f"imagenet_{size.lower()}": _imagenet(size) for size in ("B", "L", "XL", "XXL", "3B")},
    **{
        f"imagenet_{size.lower()}_384": _imagenet(size, 384)
        for size in ("B", "L", "XL", "XXL", "3B")
    },
}
