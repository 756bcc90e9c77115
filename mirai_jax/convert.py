"""PyTorch checkpoints <-> this project's: `python -m mirai_jax.convert SOURCE TARGET`.

    python -m mirai_jax.convert c2i_B_256.pt weights/llamagen_b            a new folder
    python -m mirai_jax.convert vq_ds16_c2i.pt weights/vq16
    python -m mirai_jax.convert dinov2_vitb14_pretrain.pth weights/dinov2_vitb14
    python -m mirai_jax.convert runs/mirai_e-imagenet_b mirai_e_b.pt       a run's EMA for PyTorch
    python -m mirai_jax.convert weights/vq16 vq16.safetensors

A file is recognised by its names; neither torch nor anything inside a file is ever run. A tokenizer's
buffer `quantize.codebook_used`, a statistic of its training, is written as zeros. What a generator's
weights do not show (its grid, whether it has a null class) is written beside them, under 'args'.
"""

import os
import time

from absl import flags

from mirai_jax.training import restore
from mirai_jax.utils import cli, paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import conversion, pretrained, state_dict

_ENTRY = flags.DEFINE_string(
    "entry", "", f"Key of a training checkpoint to take; default: {', '.join(state_dict.WRAPPERS)}."
)
_GRID = flags.DEFINE_integer(
    "grid", 0, "Tokens a side of a generator; default: as in the file, else 16.", lower_bound=0
)
_HEADS = flags.DEFINE_integer("num_heads", 0, "Attention heads where the size is not a known one.")
_STATE = flags.DEFINE_enum("state", "ema", ("ema", "model"), "Which weights of a workdir to take.")
_PROJECTORS = flags.DEFINE_string(
    "projectors", "", "Foresight term of a workdir whose projectors to add with --state=model."
)


def main(argv: list[str]) -> None:
    with cli.program(OSError):
        if len(argv) != 3:
            raise ConfigError("give SOURCE and TARGET; --help says more")
        source, target = map(os.path.expanduser, argv[1:])
        folder, converted = paths.is_dir(source), pretrained.is_converted(source)
        unused = (_ENTRY, _GRID, _HEADS) if folder else ()
        unused += (_STATE, _PROJECTORS) if converted or not folder else ()
        for flag in unused:
            if flag.present:
                raise ConfigError(f"--{flag.name} has no meaning for {source}")
        begin = time.monotonic()
        if folder:
            options = dict(state=_STATE.value, projectors=_PROJECTORS.value)
            made = conversion.to_torch(source, target, restore.read_run, **options)
        else:
            options = dict(entry=_ENTRY.value, grid=_GRID.value, num_heads=_HEADS.value)
            made = conversion.from_torch(source, target, **options)
        print(f"{conversion.describe(made)}\nwritten: {target} ({time.monotonic() - begin:.1f}s)")


if __name__ == "__main__":
    cli.run(main)
