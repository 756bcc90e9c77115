"""Images -> ArrayRecord shards of codes: `python -m mirai_jax.extract`.

    python -m mirai_jax.extract --images=imagenet/train --tokenizer=vq_ds16_c2i.pt --out=codes/imagenet

Every record holds the codes of all crops of one image, its label, and the key of the image, by which
training finds it again. The folder also gets manifest.json (what was extracted from what),
report.json (each image that is not in the shards, and each that was neither plain RGB nor grey) and
reconstructions.png (images above what their stored codes decode to: look at it).

Shard k holds the k-th `images_per_shard` images of the source, in its order. A shard appears under
its name when it is whole and has been read back. After any stop, the same command resumes, and it
ends with the same bytes. With several hosts, give each `--process_index` of `--process_count`.

Codes that others have made are packed the same way. With the images that they were made of, in the
order of their folder, the records get the keys by which a teacher finds them:

    python -m mirai_jax.extract --codes=imagenet_code_c2i_flip_ten_crop --images=imagenet/train \\
        --tokenizer=vq_ds16_c2i.pt --out=codes/imagenet
"""

import functools
import os
import re

from absl import flags

from mirai_jax.data.crops import CropSpec
from mirai_jax.extraction import job, shards
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError

_IMAGES = flags.DEFINE_string(
    "images", None, "Folder with a folder a class, parquet:GLOB, wds:GLOB, hf:OWNER/NAME, ..."
)
_CODES = flags.DEFINE_string(
    "codes", "", "Codes to pack instead: LlamaGen's folder of .npy, or RAR's .jsonl."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Weights of the VQ tokenizer: LlamaGen's .pt or a converted folder; or, with --codes, vq16, vq8 or "
    "maskgit.",
)
_OUT = flags.DEFINE_string("out", None, "Folder of the shards.")
_SIZE = flags.DEFINE_string("image_size", "256", "Pixels a side of a crop, or HEIGHTxWIDTH.")
_RANGE = flags.DEFINE_float("crop_range", 1.1, "Crops come from the centre image_size * this.")
_TEN = flags.DEFINE_bool("ten_crop", True, "Ten crops; else the centre and its mirror image.")
_EXIF = flags.DEFINE_enum(
    "exif", "ignore", ("ignore", "apply"), "EXIF orientation; the official code ignores it."
)
_positive = functools.partial(flags.DEFINE_integer, lower_bound=1)
_PER_SHARD = _positive("images_per_shard", 4096, "Images of the source a shard.")
_BATCH = _positive("batch_size", 4, "Images encoded together, with all their crops.")
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ("float32", "tensorfloat32", "bfloat16"),
    "Of the encoder's products; less is faster on GPU and TPU, and moves some codes.",
)  # fmt: skip
_WORKERS = _positive("num_workers", 2 * (os.cpu_count() or 1), "Decoding threads.")
_SHOWN = flags.DEFINE_integer("reconstructions", 8, "Images in reconstructions.png.", lower_bound=0)
_INDEX = flags.DEFINE_integer("process_index", None, "Which host this is; default: JAX's.")
_COUNT = flags.DEFINE_integer("process_count", None, "How many hosts share the work.")


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv, interrupted="interrupted; the same command resumes"):
        for flag in (_IMAGES, _TOKENIZER, _OUT):
            if not flag.value and not (flag is _IMAGES and _CODES.value):
                raise ConfigError(f"--{flag.name} is missing; --help explains it")
        index, count = cli.share(_INDEX.value, _COUNT.value)
        if not re.fullmatch(r"\d{1,4}(x\d{1,4})?", _SIZE.value):
            raise ConfigError(
                f"--image_size is {_SIZE.value!r}; it must be pixels: 256, or 128x256"
            )
        sides = [int(side) for side in _SIZE.value.split("x")]
        prepared = job.prepare(
            _IMAGES.value or "",
            _TOKENIZER.value,
            _OUT.value,
            CropSpec((sides[0], sides[-1]), _RANGE.value, _TEN.value, _EXIF.value),
            codes=_CODES.value,
            images_per_shard=_PER_SHARD.value,
            batch_size=_BATCH.value,
            precision=_PRECISION.value,
            num_workers=_WORKERS.value,
        )
        final = shards.run(prepared, index, count, _SHOWN.value)
        if final is None:
            print("this share is done; the last host to end its share writes the manifest")
        else:
            print(shards.summary(prepared, final))


if __name__ == "__main__":
    cli.run(main)
