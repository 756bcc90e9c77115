"""Numbers of the official PyTorch code, float32: every *.npz of the folder $MIRAI_GOLDEN.

A file's kind is the start of its name; all sizes are read from the file. Parameters and arrays are
under the names the official code gives them; docs/faithfulness.md says how they were made.
"""

import os
import pathlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mirai_jax import foresight, step
from mirai_jax.models import preprocessing, teacher, vit, vit_sizes, vq
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.sampling import sampler
from mirai_jax.tokenizing import step as tokenizing
from mirai_jax.weights import torch_names

FOLDER = pathlib.Path(os.environ.get("MIRAI_GOLDEN", pathlib.Path(__file__).parent / "data"))
GRID = (16, 16)


_SLOW = ("tokenizer_training_a",)  # tokenizer_training_gan_a does all that it does, and more


def cases(kind: str) -> list:
    """The files of a kind as test parameters; one that always fails if a whole folder has none."""
    marks = lambda path: [pytest.mark.slow] * (path.stem in _SLOW)
    found = sorted(FOLDER.glob(f"{kind}_*.npz"))
    return [pytest.param(path, id=path.stem, marks=marks(path)) for path in found]


KINDS = ("generator", "sampling", "trajectory_e", "trajectory_i", "trajectory_static", "llamagen_repa",
         "vq", "tokenizer_training", "dinov2", "dinov3", "mae")  # fmt: skip


def test_folder_has_cases():
    """The project's own folder has all kinds; another one may hold some of them."""
    missing = [kind for kind in KINDS if not cases(kind)]
    assert not missing or ("MIRAI_GOLDEN" in os.environ and len(missing) < len(KINDS)), missing


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def part(data: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def without_projectors(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in state.items() if not k.startswith("projectors.")}


def generator_config(data: dict[str, np.ndarray], rows: int) -> GeneratorConfig:
    """`rows` of the label table tells whether there is a null class."""
    num_classes = int(data["nc"])
    return GeneratorConfig(
        num_layers=int(data["n_layer"]),
        num_heads=int(data["n_head"]),
        width=int(data["dim"]),
        vocab_size=int(data["vocab"]),
        num_classes=num_classes,
        grid=GRID,
        token_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
        class_dropout=0.1 if rows == num_classes + 1 else 0.0,
    )


def term_e(data: dict[str, np.ndarray], **fields) -> foresight.Term:
    offsets = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0))
    depth = int(data["depth"])
    return foresight.Term(
        offsets=offsets[: int(data["heads"])],
        student_layer=depth,
        teacher_layer=depth,
        projector_width=int(data["pd"]),
        schedule=(),
        **fields,
    )


def term_i(data: dict[str, np.ndarray], **fields) -> foresight.Term:
    return foresight.Term(
        name="bidirectional",
        source="bidirectional",
        offsets=((0, 0),),
        student_layer=int(data["depth"]),
        projector_width=int(data["pd"]),
        start_epoch=0,
        schedule=(),
        **fields,
    )


def close(actual, expected, relative=1e-4, what=""):
    """Largest difference within `relative` of the largest expected magnitude, and no NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
    assert error <= relative, f"{what}: off by {error:.2e} relative, {relative:.0e} allowed"


@pytest.mark.parametrize("path", cases("generator"))
def test_generator(path):
    data = load(path)
    state = part(data, "params/")
    config = generator_config(data, len(state["cls_embedding.embedding_table.weight"]))
    params = torch_names.from_torch(config, without_projectors(state))
    depth = int(data["depth"])
    codes, labels = data["codes"].astype(np.int32), data["labels"].astype(np.int32)
    logits, taps = Generator(config, taps=(depth,)).apply({"params": params}, codes[:, :-1], labels)
    close(logits, data["logits"], what="logits")
    close(taps[depth], data["hidden_at_depth"], what="hidden")
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
    close(cross_entropy, data["cross_entropy"], what="cross-entropy")

    term = term_e(data)
    projections = foresight.apply_heads(
        term,
        data["projections"].shape[-1],
        "float32",
        torch_names.projectors_from_torch(state),
        taps[depth],
    )
    close(jnp.stack(projections), data["projections"], what="projections")
    losses = foresight.alignment_losses(term, projections, data["teacher_hidden"], GRID)
    # A foresight loss is a mean cosine, of order 1 and here near 0: absolute.
    np.testing.assert_allclose(losses, data["foresight_e"], rtol=0, atol=1e-6)
    losses = foresight.alignment_losses(
        term_i(data), projections[:1], data["bidirectional_features"], GRID
    )
    np.testing.assert_allclose(losses, data["foresight_i"], rtol=0, atol=1e-6)


class StoredFeatures:
    """Mirai-I's teacher in a trajectory: its outputs are stored, one batch a step."""

    def __init__(self, feature_width: int):
        self.feature_width = feature_width

    def apply(self, variables, image):
        return image


def run_trajectory(path, term, teacher=None, **optimizer):
    """Trains as the official script does and compares every step, then what is left at the end.

    Args:
        teacher: of a `bidirectional` term.
        optimizer: fields that no array of the file gives.
    """
    data = load(path)
    given = {"beta1": "b1", "beta2": "b2", "adam_eps": "eps"}  # else the official defaults
    optimizer |= {ours: float(data[name]) for name, ours in given.items() if name in data}
    pretrained, frozen = (), {"bidirectional": {}}
    if saved := part(data, "teacher/"):
        config = generator_config(data, len(saved["cls_embedding.embedding_table.weight"]))
        pretrained = ((term.name, config),)
        frozen[term.name] = torch_names.from_torch(config, saved)
    state = part(data, "init/")
    config = generator_config(data, len(state["cls_embedding.embedding_table.weight"]))
    recipe = step.Recipe(
        generator=config,
        terms=(term,),
        optimizer=OptimizerConfig(
            learning_rate=float(data["lr"]),
            weight_decay=float(data["weight_decay"]),
            clip_norm=float(data["clip"]),
            **optimizer,
        ),
        ema_decay=float(data.get("ema_decay", 0.0)),
        teacher=teacher,
        pretrained_configs=pretrained,
    )
    params = {
        "generator": torch_names.from_torch(config, without_projectors(state)),
        "foresight": {term.name: torch_names.projectors_from_torch(state)},
    }
    train_state = step.init_state(recipe, jax.random.key(0), jax.tree.map(jnp.asarray, params))
    train_step = helpers.make_train_step(recipe)
    for i, codes in enumerate(data["codes"]):
        batch = {"codes": jnp.asarray(codes), "label": jnp.asarray(data["labels"][i], jnp.int32)}
        if "features" in data:
            batch["image"] = jnp.asarray(data["features"][i])
        train_state, metrics = train_step(train_state, frozen, batch, i)
        close(metrics["cross_entropy"], data["primary"][i], what=f"step {i}: cross-entropy")
        close(metrics["loss"], data["total"][i], what=f"step {i}: total")
        close(metrics["grad_norm"], data["grad_norm"][i], what=f"step {i}: gradient norm")
        np.testing.assert_allclose(
            [metrics[name] for name in term.metric_names],
            data["foresight"][i],
            rtol=0,
            atol=1e-4,
            err_msg=f"step {i}: foresight",
        )
    ema = torch_names.to_torch(config, train_state.ema)
    for name, expected in part(data, "final_ema/").items():
        close(ema[name], expected, what=f"final EMA {name}")
    student = torch_names.to_torch(config, train_state.params["generator"])
    for name, expected in part(data, "final/").items():
        close(student[name], expected, what=f"final {name}")
    projectors = torch_names.projectors_to_torch(train_state.params["foresight"][term.name])
    for name, expected in part(data, "final_projectors/").items():
        close(projectors[f"projectors.{name}"], expected, what=f"final projector {name}")


@pytest.mark.parametrize("path", cases("trajectory_e"))
def test_trajectory_e(path):
    data = load(path)
    weights = (float(data["coefficient"]),)
    # One step an epoch, so that the warm-up is counted in steps.
    run_trajectory(path, term_e(data, weights=weights, start_epoch=int(data["warmup_steps"])))


@pytest.mark.parametrize("path", cases("trajectory_i"))
def test_trajectory_i(path):
    data = load(path)
    run_trajectory(
        path,
        term_i(data, weights=(float(data["coefficient"]),)),
        teacher=StoredFeatures(data["features"].shape[-1]),
    )


@pytest.mark.slow  # trajectory_e has its step
@pytest.mark.parametrize("path", cases("trajectory_static"))
def test_trajectory_static(path):
    data = load(path)
    weights, start = (float(data["coefficient"]),), int(data["warmup_steps"])
    run_trajectory(path, term_e(data, source="checkpoint", weights=weights, start_epoch=start))


@pytest.mark.parametrize("path", cases("llamagen_repa"))
def test_llamagen_repa(path):
    data = load(path)
    run_trajectory(
        path,
        term_i(data, anchor="predicted", weights=(float(data["coefficient"]),)),
        teacher=StoredFeatures(data["features"].shape[-1]),
        decayed="all",
    )


def channels_last(images_bchw: np.ndarray) -> np.ndarray:
    return images_bchw.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("path", cases("vq"))
def test_vq(path):
    data = load(path)
    state, config = part(data, "params/"), vq_config(data)
    assert vq.config_of(state) == config
    variables = {"params": torch_names.from_torch(config, state)}
    module, images = vq.VQModel(config), channels_last(data["image_bchw"])
    latents = module.apply(variables, images, method="latents")
    close(latents, channels_last(data["latent_bchw"]), 1e-4, "latents")
    codes = jax.jit(lambda x: module.apply(variables, x, method="encode"))(images)
    np.testing.assert_array_equal(codes, data["codes"])
    grid = module.grid(images.shape[1:3])
    decoded = module.apply(variables, codes, grid, method="decode_unclipped")
    close(decoded, channels_last(data["reconstruction_bchw"]), 1e-4, "reconstruction")
    back = torch_names.to_torch(config, variables["params"])
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("path", cases("dinov2"))
def test_dinov2(path):
    data = load(path)
    state = part(data, "params/")
    heads, patch = int(data["num_heads"]), int(data["patch_size"])
    config = vit_sizes.config_of(state, heads)
    assert (config.width, config.num_layers) == (int(data["embed_dim"]), int(data["depth"]))
    assert (config.registers, config.patch) == (int(data["registers"]), patch)
    params = torch_names.from_torch(config, state)
    shown = channels_last(data["preprocessed_bchw"])
    size = shown.shape[1:3]
    images = preprocessing.preprocess(channels_last(data["raw_image_bchw"]), size)
    close(images, shown, 1e-5, "preprocessed image")
    grid = (size[0] // patch, size[1] // patch)
    positions = preprocessing.resample_positions(params["pos_embed"], config.pos_grid, grid)
    close(positions, data["resampled_pos_embed"], 1e-5, "position embedding")
    patches, prefix = vit.VisionTransformer(config).apply({"params": params}, images)
    features = data["patch_features"]
    close(patches.reshape(features.shape), features, 1e-4, "patch features")
    close(prefix[:, 0], data["cls_feature"], 1e-4, "class feature")
    back = torch_names.to_torch(config, params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def encoder(data: dict[str, np.ndarray]):
    """Config and parameters, whose names make the round trip; and the preprocessed images."""
    state = part(data, "params/")
    config = vit_sizes.config_of(state, int(data["num_heads"]))
    assert (config.width, config.num_layers) == (int(data["embed_dim"]), int(data["depth"]))
    assert (config.registers, config.patch) == (int(data["registers"]), int(data["patch_size"]))
    assert config.epsilon == float(data["norm_eps"])
    params = torch_names.from_torch(config, state)
    back = torch_names.to_torch(config, params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
    raw, shown = channels_last(data["raw_image_bchw"]), channels_last(data["preprocessed_bchw"])
    assert raw.shape == shown.shape
    images = preprocessing.preprocess(raw, shown.shape[1:3])
    close(images, shown, 1e-5, "preprocessed image")
    return config, params, images


def flat(features_BxhxwxD) -> np.ndarray:
    batch, *_, width = features_BxhxwxD.shape
    return features_BxhxwxD.reshape(batch, -1, width)


@pytest.mark.parametrize("path", cases("dinov3"))
def test_dinov3(path):
    data = load(path)
    config, params, images = encoder(data)
    assert config.family == "dinov3"
    assert vit_sizes.config_of(part(data, "params/")) == config  # the periods show the heads
    run = lambda x, *layer, **how: vit.VisionTransformer(config).apply(
        {"params": params}, x, *layer, **how
    )
    patches, prefix = run(images)
    close(flat(patches), data["patch_features"], 1e-4, "patch features")
    close(prefix[:, 0], data["cls_feature"], 1e-4, "class feature")
    close(prefix[:, 1:], data["storage_features"], 1e-4, "storage features")
    normalised = flat(teacher.spatial_zscore(patches, 0.6))
    close(normalised, data["spatial_zscore_features"], 1e-4, "normalised features")

    layer = int(data["layer"]) + 1
    patches, prefix = run(images, layer)
    close(flat(patches), data["layer_features"], 1e-4, "features of a block")
    close(prefix[:, 0], data["layer_cls_feature"], 1e-4, "class feature of a block")
    patches, _ = run(images, layer, norm=False)
    close(flat(patches), data["layer_features_prenorm"], 1e-4, "features without the norm")
    patches, _ = run(channels_last(data["odd_image_bchw"]))
    close(flat(patches), data["odd_patch_features"], 1e-4, "features of an odd size")

    grid = tuple(side // config.patch for side in images.shape[1:3])
    rotations = vit.Rotations(config.width // config.num_heads)
    fresh, variables = rotations.init_with_output(jax.random.key(0), grid)
    close(variables["params"]["periods"], params["rope_embed"]["periods"], 1e-6, "periods")
    for tables in (fresh, rotations.apply({"params": params["rope_embed"]}, grid)):
        close(tables[0], data["rope_sin"], 1e-5, "sines")
        close(tables[1], data["rope_cos"], 1e-5, "cosines")


@pytest.mark.parametrize("path", cases("mae"))
def test_mae(path):
    data = load(path)
    config, params, images = encoder(data)
    assert config.family == "mae"
    grid = tuple(side // config.patch for side in images.shape[1:3])
    positions = preprocessing.resample_positions(params["pos_embed"], config.pos_grid, grid)
    close(positions, data["resampled_pos_embed"], 1e-5, "position embedding")
    run = lambda **how: vit.VisionTransformer(config).apply({"params": params}, images, **how)
    patches, prefix = run()
    close(flat(patches), data["patch_features"], 1e-4, "patch features")
    close(prefix[:, 0], data["cls_feature"], 1e-4, "class feature")
    close(flat(run(norm=False)[0]), data["patch_features_prenorm"], 1e-4, "without the norm")


def vq_config(data: dict[str, np.ndarray]) -> vq.VQConfig:
    return vq.VQConfig(
        multipliers=tuple(int(m) for m in data["ch_mult"]),
        width=int(data["ch"]),
        z_channels=int(data["z_channels"]),
        vocab_size=int(data["codebook_size"]),
        code_width=int(data["embed_dim"]),
    )


_OF_NORM = {"weight": "scale", "running_mean": "mean", "running_var": "var"}


def discriminator_from_torch(state: dict[str, np.ndarray]) -> dict:
    """'main.3.weight' is ('params', 'main_3', 'scale') of a norm, of a convolution its 'kernel'."""
    tree: dict = {"params": {}, "batch_stats": {}}
    for name, array in state.items():
        module, leaf = name.replace("main.", "main_").rsplit(".", 1)
        if array.ndim == 4:
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
        leaf = _OF_NORM.get(leaf, leaf)
        kind = "batch_stats" if leaf in ("mean", "var") else "params"
        if leaf != "num_batches_tracked":
            tree[kind].setdefault(module, {})[leaf] = jnp.asarray(array)
    return tree


def updated(actual, expected, before, what):
    """The same tensor within 1e-4, and the same way from where it was within 5%, as the files promise
    for all that they do not name undetermined. In norm: Adam moves single elements by their rounding.
    """
    error = np.linalg.norm(np.float64(actual) - expected)
    moved = np.linalg.norm(np.float64(expected) - before)
    size = np.linalg.norm(expected)
    good = error <= 1e-4 * size and error <= 0.05 * moved + 1e-6 * size  # of an average's rounding
    assert good, f"{what}: size {size:.2e}, moved {moved:.2e}, off by {error:.2e}"


@pytest.mark.usefixtures("quick_compilation")  # most of its time; as of all that follow
@pytest.mark.parametrize("path", cases("sampling"))
def test_sampling(path):
    data = load(path)
    model = load(path.with_name(path.name.replace("sampling_", "generator_")))
    state = without_projectors(part(model, "params/"))
    config = generator_config(model, len(state["cls_embedding.embedding_table.weight"]))
    params = torch_names.from_torch(config, state)
    labels = jnp.asarray(data["labels"], jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(labels))
    greedy = [name for name in data if name.startswith("greedy_")]
    filtered = [name for name in data if name.startswith("probs_")]
    assert greedy and filtered
    draw = jax.jit(sampler.draw, static_argnames=("config", "form"))
    for name in greedy:  # greedy_cfg3_interval100
        guidance, _, interval = name.removeprefix("greedy_cfg").partition("_interval")
        options = sampler.SampleOptions(
            guidance=float(guidance), interval=int(interval or -1), greedy=True
        )
        scales = options.scales(config.length)
        codes = draw(config, params, labels, keys, options.form, scales)
        np.testing.assert_array_equal(codes, data[name], err_msg=name)
    for name in filtered:  # probs_topk20_topp0.9_temp1.3
        fields = dict(zip(("top_k", "top_p", "temperature"), name.split("_")[1:], strict=True))
        options = sampler.SampleOptions(
            top_k=int(fields["top_k"].removeprefix("topk")),
            top_p=float(fields["top_p"].removeprefix("topp")),
            temperature=float(fields["temperature"].removeprefix("temp")),
        )
        probabilities = jax.nn.softmax(sampler.filter_logits(jnp.asarray(data["logits"]), options))
        np.testing.assert_allclose(probabilities, data[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("path", cases("tokenizer_training"))
def test_tokenizer_training(path):
    data = load(path)
    init, init_disc = part(data, "init/"), part(data, "init_disc/")
    steps, images = int(data["steps"]), data["images"].transpose(0, 1, 3, 4, 2)
    codes = data["codes"].reshape(steps, -1)
    recipe = tokenizing.Recipe(
        network=vq_config(data),
        optimizer=OptimizerConfig(
            learning_rate=float(data["lr"]),
            b1=float(data["beta1"]),
            b2=float(data["beta2"]),
            eps=float(data["adam_eps"]),
            weight_decay=float(data["weight_decay"]),
            clip_norm=float(data["clip"]),
        ),
        image_size=images.shape[2:4],
        ema_decay=float(data["ema_decay"]),
        reconstruction_weight=float(data["reconstruction_weight"]),
        perceptual_weight=float(data["perceptual_weight"]),
        commit_weight=float(data["commit_loss_beta"]),
        entropy_weight=float(data["entropy_loss_ratio"]),
        discriminator_weight=float(data["disc_weight"]),
        discriminator_start=int(data["disc_start"]),
        discriminator_width=int(data["disc_dim"]),
        discriminator_layers=int(data["disc_num_layers"]),
        adaptive=bool(data["disc_adaptive_weight"]),
        # The official usage counts the last 65,536 lookups.
        usage_window=-(-int(data["codebook_used_length"]) // codes.shape[1]),
    )
    params = jax.tree.map(jnp.asarray, torch_names.from_torch(recipe.network, init))
    state = tokenizing.init_state(recipe, jax.random.key(0), params)
    state = state.replace(
        discriminator=discriminator_from_torch(init_disc),
        last_used_V=state.last_used_V.at[0].set(0),  # its buffer begins with code 0
    )
    train_step = jax.jit(tokenizing.train_step, static_argnums=0)
    encode = jax.jit(lambda p, x: recipe.module.apply({"params": p}, x, method="encode"))
    names = {
        "reconstruction_loss": "rec_loss",
        "codebook_loss": "vq_loss",
        "commit_loss": "commit_loss",
        "entropy_loss": "entropy_loss",
        "codebook_use": "codebook_usage",
        "loss": "generator_loss",
        "adversarial_loss": "generator_adv_loss",
        "discriminator_loss": "discriminator_adv_loss",
        "logits_real": "logits_real",
        "logits_fake": "logits_fake",
        "logits_fake_tokenizer": "logits_fake_generator",
        "grad_norm": "generator_grad_norm",
        "discriminator_grad_norm": "discriminator_grad_norm",
    }
    for i in range(steps):
        np.testing.assert_array_equal(encode(state.params, images[i]).reshape(-1), codes[i])
        state, metrics = train_step(recipe, state, {}, {"image": images[i]})
        for ours, theirs in names.items():
            # The official float32 run is itself this far from its equal in float64.
            rounding = np.abs(data[theirs] - data[f"float64/{theirs}"]).max()
            np.testing.assert_allclose(
                metrics[ours],
                data[theirs][i],
                rtol=1e-4,
                atol=2 * rounding,
                err_msg=f"step {i}: {theirs}",
            )
    for prefix, tree in (("final/", state.params), ("final_ema/", state.ema)):
        made = torch_names.to_torch(recipe.network, tree)
        for name in part(data, prefix).keys() - {"quantize.codebook_used", *data["undetermined"]}:
            updated(made[name], data[prefix + name], init[name], prefix + name)
    final_disc = part(data, "final_disc/")
    final = jax.tree.leaves_with_path(discriminator_from_torch(final_disc))
    before, made = discriminator_from_torch(init_disc), state.discriminator
    assert jax.tree.structure(made) == jax.tree.structure(before)
    skipped = {name.replace("main.", "main_") for name in data["undetermined_disc"]}
    for (where, expected), actual, old in zip(
        final, jax.tree.leaves(made), jax.tree.leaves(before), strict=True
    ):
        _, module, leaf = (key.key for key in where)
        theirs = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        if f"{module}.{theirs}" not in skipped:
            updated(actual, expected, old, f"final_disc/{module}.{leaf}")
