"""Trains a tokenizer, which then serves as `tokenizer.path`: `python -m mirai_jax.tokenize` calls `tokenize`.

The workdir is that of a run (see training/workdir.py); samples/ holds held-out images above their
reconstructions. When the run is finished it has the EMA of the tokenizer in the converted folder
`tokenizer` (see weights/pretrained.py).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mirai_jax import sharding
from mirai_jax.data import folders
from mirai_jax.evaluation import metrics as metrics_lib
from mirai_jax.evaluation.image_streams import of_array
from mirai_jax.evaluation.network import Network
from mirai_jax.tokenizing import figures
from mirai_jax.tokenizing import images as images_lib
from mirai_jax.tokenizing import settings as settings_lib
from mirai_jax.tokenizing.codebook import kmeans_start
from mirai_jax.tokenizing.settings import TokenizerRunConfig, TokenizerRunSettings
from mirai_jax.tokenizing.step import (
    TokenizerState,
    init_state,
    make_reconstruct,
    make_train_step,
    perplexity,
)
from mirai_jax.training import local, loop
from mirai_jax.training.checkpoint import Checkpoints
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.training.stopwatch import progress_line
from mirai_jax.utils import pictures
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import efficientnet, frozen, lpips, pretrained

Log = Callable[[str], None]

FID, EFFICIENTNET = "held_out_fid", "held_out_frechet_efficientnet"
_SHOWN = 10  # held-out images in a picture
_FEATURES_AT_ONCE = 32  # images on a device, of the network that measures


def _build(
    settings: TokenizerRunSettings, workdir: pathlib.Path, devices: list[jax.Device]
) -> local.Built:
    data, recipe = settings.data, settings.recipe
    images = images_lib.load(
        data.name, data.path, data.images, recipe.image_size, data.held_out, data.crop_range, data.flip,
        data.exif, batch_size=settings.batch_size, seed=settings.seed, num_workers=data.num_workers,
    )  # fmt: skip
    height, width = recipe.module.grid(recipe.image_size)
    tokens, vocab_size = images.count * height * width, recipe.network.vocab_size
    if vocab_size > tokens:
        raise ConfigError(
            f"tokenizer.vocab_size is {vocab_size}; it must be at most {tokens}, the tokens of all "
            f"{images.count:,} training images"
        )
    initial, perceptual, identity = None, {}, dict(images.identity)
    if settings.init_from:
        module, initial = frozen.load_vq_file("init_from", settings.init_from)
        if module.config != recipe.network:
            raise ConfigError(
                f"init_from is {settings.init_from!r}, a {module.config}; the fields of tokenizer "
                f"say {recipe.network}"
            )
        identity["init_from"] = pretrained.checksum(initial)
    identity["loss.lpips"] = "none"
    if recipe.perceptual_weight and recipe.lpips:
        perceptual = lpips.load(settings.lpips)
        identity["loss.lpips"] = pretrained.checksum(perceptual)
    elif recipe.perceptual_weight:
        perceptual = efficientnet.load_efficientnet_lite0()
    judge = Network(settings.inception, _FEATURES_AT_ONCE)
    task = TokenizerTask(settings, images, initial, perceptual, judge, workdir, devices)
    lines = [
        *filter(None, [folders.ignored(images.skipped)]),
        f"data: {data.name}, {images.count:,} images, {len(images.held_out):,} more are held out",
        f"tokens: {height}x{width} an image, {vocab_size:,} codes",
    ]
    return local.Built(task, identity, None, lines)


def _how_to_use(workdir: pathlib.Path) -> str:
    return (
        f"its tokenizer: --config.tokenizer.name=vq --config.tokenizer.path={workdir}, or "
        f"--tokenizer={workdir}"
    )


class TokenizerTask(local.LocalTask):
    """A tokenizer, measured on the held-out images by its EMA.

    Args:
        initial: parameters to begin with, or None for fresh ones.
        perceptual: parameters of EfficientNetLite0 or Lpips, or {} where no loss needs them.
        judge: whose features measure.
    """

    def __init__(
        self,
        config: TokenizerRunSettings,
        images: images_lib.Images,
        initial: Any,
        perceptual: Any,
        judge: Network,
        workdir: pathlib.Path,
        devices: list[jax.Device],
    ):
        super().__init__(config, images.batches, workdir, devices, pretrained.TOKENIZER)
        self._recipe, self._initial = config.recipe, initial
        self._held_out, self._pictures = images.held_out, workdir / "samples"
        self._perceptual = sharding.place(perceptual, self._replicated)
        self._train_step = make_train_step(self._recipe, self._replicated, self._split)
        self._reconstruct = make_reconstruct(self._recipe, self._replicated, self._split)
        self._judge, self._distance = judge, FID if config.inception else EFFICIENTNET
        self._of_originals: metrics_lib.Moments | None = None
        self._picture: np.ndarray | None = None

    def init(self, key: jax.Array) -> TokenizerState:
        return init_state(self._recipe, key)

    def size(self, shapes: TokenizerState) -> str:
        count = parameter_overview.count_parameters
        disc = shapes.discriminator
        more = f", {count(disc['params']):,} in the discriminator" if disc else ""
        return f"{count(shapes.params):,} in the tokenizer{more}"

    def begin(self, checkpoints: Checkpoints, log: Log, warn: Log) -> tuple[TokenizerState, int]:
        state, step = super().begin(checkpoints, log, warn)
        params, config = self._initial, self._config
        if step:
            return state, step
        if params is not None:
            log(f"began with the weights of {config.init_from}")
        elif config.start == "kmeans":
            log("k-means over the latents of the first images gives the codebook")
            params = jax.device_get(state.params)
            rows = kmeans_start(self._recipe, params, self.batches, config.seed)
            params = {**params, "quantize": {"embedding": rows}}
        if params is not None:
            place = lambda: sharding.place(params, self._replicated)
            state = state.replace(params=place(), ema=place())
        return state, 0

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return super().put({"image": batch["image"]})

    def step(self, state: TokenizerState, batch: Any, variant: Any) -> tuple[TokenizerState, dict]:
        with jax.set_mesh(self._mesh):
            return self._train_step(state, self._perceptual, batch)

    def measures(self, step: int) -> bool:
        return step % self._config.measure_every == 0 or step == self._config.num_steps

    samples = measures

    def measure(self, state: TokenizerState) -> dict[str, float]:
        """{'held_out_...': of all held-out images}, reconstructed by the EMA; and the next picture."""
        made, codes = self._reconstructed(state.ema)
        error = np.square(self._held_out.astype(np.float32) - made).mean(axis=(1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
        shown = np.linspace(0, len(made), min(_SHOWN, len(made)), endpoint=False).astype(int)
        both = np.concatenate([self._held_out[shown], made[shown]])
        self._picture = pictures.sample_grid(both, ["original", "reconstruction"])
        if self._of_originals is None:
            self._of_originals = self._moments(self._held_out)
        distance = metrics_lib.distance(self._of_originals, self._moments(made))
        vocab_size = self._recipe.network.vocab_size
        return {
            "held_out_psnr": float(psnr.mean()),
            "held_out_codebook_use": len(np.unique(codes)) / vocab_size,
            "held_out_perplexity": float(perplexity(codes, vocab_size)),
            self._distance: distance,
        }

    def _reconstructed(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """The held-out images after the tokenizer, uint8, and their codes (N, L)."""
        size, parts = self._config.batch_size, []
        for start in range(0, len(self._held_out), size):
            some = self._held_out[start : start + size]
            filled = np.resize(some, (size, *some.shape[1:]))  # one program serves all
            with jax.set_mesh(self._mesh):
                out = self._reconstruct(params, self.put({"image": filled}))
            parts.append([np.asarray(each)[: len(some)] for each in out])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _moments(self, images: np.ndarray) -> metrics_lib.Moments:
        """Of the pooled features that `evaluate` takes too."""
        quiet = lambda what: None
        return self._judge.features(of_array("held-out images", images), quiet).moments

    def sample(self, run: loop.Run, step: int) -> None:
        pictures.save_picture(self._pictures / f"step_{step:07d}.png", self._picture)

    def line(self, step: int, values: Mapping[str, float], left: float | None) -> str:
        measures = [
            f"loss {values['loss']:.4f}",
            f"PSNR {values['psnr']:.2f}",
            f"codes {values['codebook_use']:.0%}",
            *_measured(values),
            f"grad {values['grad_norm']:.2f}",
        ]
        return progress_line(step, self._config.num_steps, measures, values, left)

    def finish(self, run: loop.Run) -> str:
        """Writes the tokenizer and the figure."""
        config, recipe = self._config, self._recipe
        source = {
            "file": run.workdir.name,
            "entry": f"EMA of mirai_jax.tokenize at step {config.num_steps}",
            "image_size": "x".join(map(str, recipe.image_size)),
            "data": config.data.name,
        }
        params = jax.device_get(run.state.ema)
        made = pretrained.Weights("tokenizer", recipe.network, params, None, source)
        pretrained.save(self._made, made)
        if self._picture is None:  # stopped after the last step, whose measurements are logged
            self.measure(run.state)
        metrics = read_metrics(run.workdir)
        title = f"{config.name}-{config.scale}"
        figures.tokenizer_figure(self._summary, title, metrics, self._picture)
        known = "; ".join(_measured(metrics[-1]))
        return f"{known}; figure: {self._summary}\n{_how_to_use(run.workdir)}"


def _measured(values: Mapping[str, float]) -> list[str]:
    known = {
        "held_out_psnr": "held out: PSNR {:.2f}",
        "held_out_codebook_use": "codes {:.0%}",
        FID: "FID {:.2f}",
        EFFICIENTNET: "Fréchet {:.1f} (EfficientNet-Lite0)",
    }
    return [text.format(values[name]) for name, text in known.items() if name in values]


tokenize = functools.partial(
    local.run, settings_lib.read, TokenizerRunConfig, pretrained.TOKENIZER, _how_to_use, _build
)
