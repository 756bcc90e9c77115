"""PyTorch checkpoints <-> this project's: `python -m mirai_jax.convert SOURCE TARGET`.

    python -m mirai_jax.convert c2i_B_256.pt weights/llamagen_b            a new folder
    python -m mirai_jax.convert vq_ds16_c2i.pt weights/vq16
    python -m mirai_jax.convert dinov2_vitb14_pretrain.pth weights/dinov2_vitb14
    python -m mirai_jax.convert runs/mirai_e-imagenet_b mirai_e_b.pt       a run's EMA for PyTorch
    python -m mirai_jax.convert weights/vq16 vq16.safetensors

A source that is a file goes to a converted folder (see `weights`); a converted folder or a run's
workdir goes to a .pt, .pth or .safetensors file. What a file is of is told by its names. Neither
torch nor anything inside a file is ever run. Of a tokenizer's file all is kept but the buffer
`quantize.codebook_used`, a statistic of its training, which is written as zeros. What a generator's
weights do not tell (its grid, whether it has a null class) is written beside them, under 'args'.
"""

import collections
import json
import os
import pathlib
import time
from typing import Any

from absl import flags
from flax import traverse_util

from mirai_jax.training import restore
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import pretrained, safetensors, torch_reader, torch_writer

_ENTRY = flags.DEFINE_string(
    "entry", "", f"Key of a training checkpoint to take; default: {', '.join(pretrained.WRAPPERS)}."
)
_GRID = flags.DEFINE_integer(
    "grid", 0, "Tokens a side of a generator; default: what the file says, else 16 is assumed."
)
_HEADS = flags.DEFINE_integer("num_heads", 0, "Attention heads where the size is not a known one.")
_STATE = flags.DEFINE_enum("state", "ema", ("ema", "model"), "Which weights of a workdir to take.")
_PROJECTORS = flags.DEFINE_string(
    "projectors", "", "Foresight term of a workdir whose projectors go with --state=model."
)


def _count(params: Any) -> int:
    return sum(array.size for array in traverse_util.flatten_dict(params).values())


def from_torch(
    source: str, target: str, *, entry: str = "", grid: int = 0, num_heads: int = 0
) -> pretrained.Weights:
    """A PyTorch file -> a converted folder.

    Args:
        source: .pt, .pth or .safetensors.
        target: a folder that does not exist.
        entry: key of a training checkpoint to take; '': the first of weights.WRAPPERS.
        grid: tokens a side of a generator; 0: as the file's arguments say, else 16.
        num_heads: where the size is not a published one.

    Raises:
        ConfigError: one line, which lists every name that does not fit; nothing is written.
    """
    if os.path.exists(target):
        raise ConfigError(f"{target} exists; it must be a new folder")
    state, found, arguments = pretrained.read_state(source, entry)
    about = {
        "file": os.path.basename(source),
        "entry": found,
        "sha256": pretrained.sha256_of_file(source),
    }
    kind = pretrained.kind_of(state)
    for flag, given, kinds in (("grid", grid, ("generator",)),
                               ("num_heads", num_heads, ("generator", "teacher"))):  # fmt: skip
        if given and kind and kind not in kinds:
            raise ConfigError(f"--{flag} has no meaning here: {source} is a {kind}")
    sides = pretrained.token_grid(grid, arguments)
    made = pretrained.from_state(state, about, grid=sides, num_heads=num_heads, arguments=arguments)
    del state  # what is stacked has been copied
    pretrained.save(target, made)
    return made


def _of_workdir(source: str, state: str, projectors: str) -> pretrained.Weights:
    settings, saved, step = restore.read_run("SOURCE", source)
    if state == "ema" and projectors:
        raise ConfigError(
            f"--projectors is {projectors!r}; projectors have no average: it goes with "
            "--state=model"
        )
    stacked = None
    if projectors:
        heads = saved["params"]["foresight"]
        able = [name for name, tree in heads.items() if "linear_2" in tree]
        if projectors not in able:
            raise ConfigError(
                f"--projectors is {projectors!r}; it must be a foresight term with projectors: "
                f"{', '.join(able) or 'this run has none'}"
            )
        stacked = heads[projectors]
    params = saved["ema"] if state == "ema" else saved["params"]["generator"]
    about = {"file": source, "entry": f"{state} at step {step}"}
    return pretrained.Weights("generator", settings.generator, params, stacked, about)


def to_torch(
    source: str, target: str, *, state: str = "ema", projectors: str = ""
) -> pretrained.Weights:
    """A converted folder or a workdir -> a PyTorch file.

    Args:
        source: the folder.
        target: a new .pt, .pth or .safetensors.
        state: of a workdir: 'ema' or 'model', the weights that were trained.
        projectors: of a workdir, with 'model': the foresight term whose projectors to add.

    Raises:
        ConfigError: one line; nothing is written.
    """
    suffix = pathlib.Path(target).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"{target}: it must end in .pt, .pth or .safetensors")
    if os.path.exists(target):
        raise ConfigError(f"{target} exists; it must be a new file")
    if pretrained.is_converted(source):
        made = pretrained.load_converted(source)
    else:
        made = _of_workdir(source, state, projectors)
    named = pretrained.to_state(made)
    message = {"args": pretrained.arguments_of(made.config)} if made.kind == "generator" else {}
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".safetensors":
        texts = {name: json.dumps(value) for name, value in message.items()}
        safetensors.write(target, named, {"format": "pt", **texts})
    else:
        named = collections.OrderedDict(named)
        # The official scripts read a teacher bare and everything else under 'model'.
        torch_writer.write(target, named if made.kind == "teacher" else {"model": named, **message})
    return made


def _describe(made: pretrained.Weights) -> str:
    entry = made.source.get("entry")
    text = f"{made.kind}{f' ({entry})' if entry else ''}: {_count(made.params):,} parameters"
    if made.projectors is not None:
        heads = len(made.projectors["linear_0"]["bias"])
        text += f", {_count(made.projectors):,} more in {heads} projectors"
    if made.source.get("grid") == "assumed":
        text += "\nthe file does not tell the grid: 16 x 16 is assumed (--grid=N tells another)"
    return f"{text}\n{made.config}"


def main(argv: list[str]) -> None:
    with cli.program(torch_reader.TorchFileError, safetensors.SafetensorsError):
        if len(argv) != 3:
            raise ConfigError("give SOURCE and TARGET; --help says more")
        source, target = map(os.path.expanduser, argv[1:])
        folder, converted = os.path.isdir(source), pretrained.is_converted(source)
        for flag in (_ENTRY, _GRID, _HEADS) if folder else ():
            if flag.present:
                raise ConfigError(f"--{flag.name} has no meaning here: {source} knows it")
        for flag in (_STATE, _PROJECTORS) if converted or not folder else ():
            if flag.present:
                raise ConfigError(f"--{flag.name} has no meaning here: {source} is no workdir")
        begin = time.monotonic()
        try:
            if folder:
                made = to_torch(source, target, state=_STATE.value, projectors=_PROJECTORS.value)
            else:
                made = from_torch(
                    source,
                    target,
                    entry=_ENTRY.value,
                    grid=_GRID.value,
                    num_heads=_HEADS.value,
                )
        except OSError as error:
            why = error.strerror or first_line(error)
            raise ConfigError(f"{target} cannot be written ({why})") from error
        print(f"{_describe(made)}\nwritten: {target} ({time.monotonic() - begin:.1f}s)")


if __name__ == "__main__":
    cli.run(main)
