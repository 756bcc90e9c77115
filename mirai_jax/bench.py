"""Speed and memory: `python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b`.

    python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b                # one variant
    python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b --compare     # LlamaGen, E, I
    python -m mirai_jax.bench --config=... --compare --json=bench.json --figure=bench.png
    python -m mirai_jax.bench --config=configs/mirai_i.py:imagenet_b --compare \\
        --vary=teacher.name=dinov2_vitb14,mae_vitb16                # LlamaGen, I with each of these
    python -m mirai_jax.bench --config=... --compare \\
        --peer="python tests/official_peer.py --llamagen=FOLDER --mirai=FOLDER"    # PyTorch beside it

It prints the train step and its parts, images and tokens a second, operations and MFU, planned and
measured memory, compile time, the sampler against the memory roofline, and the input pipeline alone.
Timed tasks are interleaved and times are medians over rounds. Batches and frozen networks are random
numbers of the right shapes: no data and no weights are needed. Fields are set as in training:
--config.batch_size=4 --config.model.dtype=float32.
"""

import functools
import json
import os
import pathlib

from absl import flags

from mirai_jax.benchmark import report
from mirai_jax.benchmark import run as run_lib
from mirai_jax.utils import cli, files
from mirai_jax.utils.errors import ConfigError

_FLAGS, _define = cli.flags_of(__name__)
_CONFIG = _define.string("config", "", "FILE[:scale] of configs/; --config.field=value overrides.")
_COMPARE = _define.bool(
    "compare", False, "Measure LlamaGen, Mirai-E and Mirai-I too, and print ratios."
)
_VARY = _define.string(
    "vary", "", "FIELD=A,B: the config with each value; --compare then adds LlamaGen alone."
)
_MEASURE = _define.multi_enum(
    "measure",
    [measure for measure in run_lib.MEASURES if measure != "compile"],
    run_lib.MEASURES,
    "What to measure; repeatable. 'compile' compiles the step and plans its memory, as 'step' also does.",
)
_REPEATS = _define.integer("repeats", 5, "Timed rounds.", 1)
_SAMPLE_BATCH = _define.integer(
    "sample_batch", 0, "Images sampled at once; 0: 1 on a CPU, else 64.", 0
)
_PEER = _define.string(
    "peer", "", "A program that runs the official code's steps, timed in the same rounds."
)
_PEAK = _define.float(
    "peak_tflops", 0.0, "Of all devices, for MFU; 0: the datasheet's or measured.", 0.0
)
_JSON = _define.string("json", "", "File for all numbers.")
_FIGURE = _define.string("figure", "", "PNG file for a figure of them.")
_TRACE = _define.string("trace", "", "Folder for a profiler's trace of one more run of each task.")


log = functools.partial(print, flush=True)


def main(argv: list[str]) -> None:
    with cli.program(interrupted="interrupted; nothing was written"):
        for path in (_JSON.value, _FIGURE.value):
            if not os.path.isdir(os.path.dirname(path) or "."):
                raise ConfigError(f"--json or --figure is {path!r}, whose folder does not exist")
        results = run_lib.run(
            _CONFIG.value,
            argv[1:],
            compare=_COMPARE.value,
            vary=_VARY.value,
            measures=_MEASURE.value,
            repeats=_REPEATS.value,
            sample_batch=_SAMPLE_BATCH.value,
            reference_command=_PEER.value,
            peak_tflops=_PEAK.value,
            trace=_TRACE.value,
            log=log,
        )
        log("\n" + "\n".join(report.lines(results)))
        if _JSON.value:
            files.write_text(_JSON.value, json.dumps(results, indent=1) + "\n")
            log(f"written: {_JSON.value}")
        if _FIGURE.value:
            report.figure(results, pathlib.Path(_FIGURE.value))
            log(f"written: {_FIGURE.value}")


if __name__ == "__main__":
    cli.run(main, flags_parser=functools.partial(cli.parse_known, flags.FLAGS))
