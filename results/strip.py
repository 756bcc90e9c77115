"""Writes samples.png, a row a run: `python results/strip.py RUN RUN`, of workdirs with their checkpoints.

Two samples of the EMA for each class, with the run's seed as sampling seed, without guidance and with scale 2;
above them held-out images, as they are and through the tokenizer of the first run.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

from mirai_jax.models import batched
from mirai_jax.sampling.painter import Painter
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training import components, restore, sources_of_samples
from mirai_jax.utils import pictures

EACH = 2  # samples of a class


def main(workdirs: list[str]) -> None:
    settings = restore.read_settings("RUN", workdirs[0])
    held_out = components.held_out_images(settings)
    labels = np.repeat(np.arange(settings.generator.num_classes), EACH)
    some = [np.flatnonzero(held_out.labels == label)[i % EACH] for i, label in enumerate(labels)]
    real = held_out.images[some]
    rows = {"real": np.broadcast_to(real, (*real.shape[:-1], 3))}
    for workdir in workdirs:
        source = sources_of_samples.of_workdir(workdir)
        seed = restore.read_settings("RUN", workdir).seed
        if len(rows) == 1:
            tokenizer = source.tokenizer, source.tokenizer_params
            again = batched.decode_codes(*tokenizer, batched.encode_images(*tokenizer, real))
            rows["its tokens"] = np.broadcast_to(again, (*again.shape[:-1], 3))
        for guidance in (1.0, 2.0):
            painter = Painter(source, SampleOptions(guidance), seed, batch_size=len(labels))
            name = f"{pathlib.Path(workdir).name}, guidance {guidance:g}"
            rows[name] = next(painter.stream([(labels, np.arange(len(labels)))]))
    grid = pictures.sample_grid(np.concatenate(list(rows.values())), list(rows), side=32)
    Image.fromarray(grid).save(pathlib.Path(__file__).with_name("samples.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
