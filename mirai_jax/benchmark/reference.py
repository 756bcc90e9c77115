"""Another program that does the same work on request: the official PyTorch code, timed beside ours."""

import contextlib
import json
import math
import shlex
import subprocess

import jax

from mirai_jax.config.schema import Settings
from mirai_jax.config.terms import two_thirds
from mirai_jax.models.generator import SIZES, GeneratorConfig
from mirai_jax.utils.errors import ConfigError

# By a task's name in the results: what the program is asked, and the place of our own task there.
TASKS = {
    "step llamagen": ("train llamagen", ("variants", "llamagen", "step_seconds")),
    "step mirai_e": ("train mirai_e", ("variants", "mirai_e", "step_seconds")),
    "sample": ("sample", ("sampler", "seconds")),
}


class ReferenceFailed(ConfigError):
    """The reference program cannot do a task: one line."""


class ReferenceProgram:
    """A program that reads one task a line (see tests/official_peer.py).

    It answers each with a line of JSON: {"seconds": s} or {"error": text}.

    Raises:
        ReferenceFailed: it cannot be started.
    """

    def __init__(self, command: str, *more: str):
        try:
            self._process = subprocess.Popen(
                [*shlex.split(command), *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError as error:
            raise ReferenceFailed(f"--peer cannot be started: {error}") from error

    def __call__(self, task: str) -> float:
        """Runs a task and returns its seconds.

        Raises:
            ReferenceFailed: the program failed at it, or ended.
        """
        try:
            self._process.stdin.write(f"{task}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            status = self._process.wait()
            raise ReferenceFailed(f"--peer ended (status {status}) at {task!r}")
        try:
            answer = json.loads(line)
            return float(answer["seconds"])
        except (ValueError, TypeError, KeyError):
            raise ReferenceFailed(f"--peer failed at {task!r}: {line.strip()}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it ended before it read all tasks
            self._process.stdin.close()
        self._process.wait()


def start(command: str, settings: Settings, sample_batch: int) -> ReferenceProgram:
    """Starts a reference program with the sizes and dtype of these settings.

    Raises:
        ConfigError: the official code has no such model or recipe, so that its numbers beside ours
            would mean nothing; or the program cannot be started.
    """
    config = settings.generator
    if math.prod(settings.mesh) > 1 or jax.default_backend() not in ("cpu", "gpu"):
        raise ConfigError("--peer: the official code is measured on one CPU or one GPU")
    shape = (config.num_layers, config.num_heads, config.width)
    size = next((name for name, known in SIZES.items() if known == shape), None)
    if size is None or config.grid[0] != config.grid[1]:
        raise ConfigError(f"--peer: the official code has no generator of {shape} on {config.grid}")
    if not _is_official(settings):
        raise ConfigError(
            "--peer: dropout, foresight terms, accumulate and sampling must be the official recipe's"
        )
    tap = next((term.student_layer for term in settings.terms), two_thirds(config.num_layers))
    options = {
        "size": size,
        "tap": tap,
        "grid": config.grid[0],
        "vocab_size": config.vocab_size,
        "num_classes": config.num_classes,
        "batch_size": settings.batch_size,
        "dtype": config.dtype,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "sample_batch": sample_batch,
        "guidance": settings.sample.guidance,
    }
    return ReferenceProgram(command, *(f"--{name}={value}" for name, value in options.items()))


def _is_official(settings: Settings) -> bool:
    """Whether the settings are those of the official recipe, the only one that its code runs."""
    config, sample = settings.generator, settings.sample
    official = GeneratorConfig(config.num_layers, config.num_heads, config.width)
    dropouts = ("token_dropout", "residual_dropout", "ffn_dropout", "class_dropout")
    return (
        all(getattr(config, name) == getattr(official, name) for name in dropouts)
        and (sample.temperature, sample.top_k, sample.top_p, sample.greedy) == (1, 0, 1, False)
        and sample.cache_dtype == "model"
        and settings.accumulate == 1
        and all(
            (term.source, term.level, len(term.offsets), term.projector_width)
            == ("ema", "internal", 3, 2048)
            and term.student_layer == term.teacher_layer
            for term in settings.terms
        )
    )
