"""FID, sFID, Inception Score, precision and recall: `python -m mirai_jax.evaluate`.

    python -m mirai_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth
    python -m mirai_jax.evaluate --samples=RUN/sampled/a,RUN/sampled/b --reference=data:RUN:held_out

Samples and reference are .npz files (`arr_0`, uint8 N x H x W x 3), folders of `mirai_jax.sample` or
of image files, or data:WORKDIR:train and data:WORKDIR:held_out, the real images of a run on a small
set. A reference .npz may also hold statistics (mu, sigma, mu_s, sigma_s), which then count, as in
ADM's evaluator, whose definitions these are (evaluations/evaluator.py).

Without Inception's weights the distance, precision and recall are over EfficientNet-Lite0's pooled
features: good for comparing runs here, another number than FID, and never called that.

Writes results.json, with how the samples were drawn beside each number, anew after each of several
samples; of samples at several guidance scales also sweep.png.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from absl import flags

from mirai_jax.config import schema
from mirai_jax.data import small_sets
from mirai_jax.evaluation import figures, image_streams, metrics
from mirai_jax.evaluation.image_streams import ImageStream
from mirai_jax.evaluation.network import Features, Network
from mirai_jax.training import restore
from mirai_jax.utils import cli, files
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.weights import inception as inception_weights
from mirai_jax.weights import pretrained

_FLAGS = cli.flag_values(__name__)
_SAMPLES = flags.DEFINE_list(
    "samples", [], "What to judge; several give a row each.", flag_values=_FLAGS
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "Real images, or a .npz with statistics.", flag_values=_FLAGS
)
_INCEPTION = flags.DEFINE_string(
    "inception",
    "",
    f"{inception_weights.FILE}; without it, EfficientNet-Lite0 is used.",
    flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder of results.json; default: that of the samples.", flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 64, "Images at once on each device.", flag_values=_FLAGS
)
_SAVE = flags.DEFINE_string(
    "save_statistics", None, "Also write the reference's moments, a .npz.", flag_values=_FLAGS
)

_WIDTHS = {"mu": 2048, "mu_s": 2023}  # of Inception's features
_FEWEST = 4  # images: each has a third neighbour


@dataclasses.dataclass(frozen=True)
class Stored:
    """Mean and covariance that were read from a file."""

    mean: np.ndarray
    covariance: np.ndarray

    def warning(self) -> None:
        return None


def open_images(spec: str) -> ImageStream:
    """A file or folder, or data:WORKDIR:train|held_out.

    Raises:
        DataError, ConfigError: one line.
    """
    if not spec.startswith("data:"):
        return image_streams.open_stream(spec)
    workdir, _, split = spec.removeprefix("data:").rpartition(":")
    if split not in ("train", "held_out") or not workdir:
        raise DataError(f"{spec} must be data:WORKDIR:train or data:WORKDIR:held_out")
    settings = restore.read_settings(spec, workdir)
    if settings.data.name not in schema.SMALL_SETS:
        raise DataError(f"{spec}: that run's images are not in memory; give their folder or .npz")
    data = settings.data
    found = small_sets.load_images(
        data.name, data.path, split, settings.tokenizer.image_size, data.held_out
    )
    if not len(found.images):
        raise DataError(f"{spec}: that run holds no images out (data.held_out is 0)")
    return image_streams.of_array(spec, found.images)


def stored_statistics(spec: str) -> dict[str, np.ndarray]:
    """Inception's statistics that a reference holds: all four, or none.

    Raises:
        DataError: one line: some are missing, or are not of Inception's features.
    """
    stored = {} if spec.startswith("data:") else image_streams.statistics(spec)
    if stored and not {"mu", "sigma"} <= stored.keys():
        raise DataError(f"{spec} holds {', '.join(stored)}; it must hold mu and sigma together")
    if stored and not {"mu_s", "sigma_s"} <= stored.keys():
        raise DataError(
            f"{spec} holds no spatial statistics (mu_s, sigma_s), which sFID needs; compute them "
            "from the images themselves"
        )
    for name, width in _WIDTHS.items():
        if stored and len(stored[name]) != width:
            raise DataError(
                f"{spec} holds {name} of {len(stored[name])} features; Inception's are {width}"
            )
    return stored


def reference_features(
    network: Network, stream: ImageStream | None, stored: dict[str, np.ndarray]
) -> Features:
    """Of the reference; stored statistics count before those of its images, as with ADM."""
    made = network.features(stream) if stream else Features(None)
    if stored:
        made.moments = Stored(stored["mu"], stored["sigma"])
        made.spatial = Stored(stored["mu_s"], stored["sigma_s"])
    return made


def compare(network: Network, samples: Features, reference: Features) -> dict[str, float]:
    """Every metric that the two have features for."""

    def distance(mine: Any, real: Any) -> float:
        return metrics.frechet_distance(mine.mean, mine.covariance, real.mean, real.covariance)

    first = "fid" if network.is_inception else "frechet_efficientnet_lite0"
    found = {first: distance(samples.moments, reference.moments)}
    prefix = "" if network.is_inception else "efficientnet_lite0_"
    if network.is_inception:
        found["sfid"] = distance(samples.spatial, reference.spatial)
        score, deviation = metrics.inception_score(samples.probabilities)
        found |= {"inception_score": score, "inception_score_std": deviation}
    if reference.pooled is not None:
        precision, recall = metrics.precision_recall(reference.pooled, samples.pooled)
        found |= {f"{prefix}precision": precision, f"{prefix}recall": recall}
    return found


_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "inception_score_std": "IS std",
    "frechet_efficientnet_lite0": "Fréchet (EfficientNet-Lite0)",
    "precision": "precision",
    "recall": "recall",
    "efficientnet_lite0_precision": "precision (EfficientNet-Lite0)",
    "efficientnet_lite0_recall": "recall (EfficientNet-Lite0)",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, which reads well on a screen too."""
    names = [n for n in _TITLES if n in rows[0]["metrics"]]
    head = ["samples", "images", *(_TITLES[n] for n in names)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        values = [f"{row['metrics'][n]:.4g}" for n in names]
        lines.append([row["samples"], f"{row['num_images']:,}", *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _protocol(spec: str) -> dict[str, Any]:
    """How `mirai_jax.sample` drew them, where it did."""
    folder = pathlib.Path(spec) if os.path.isdir(spec) else pathlib.Path(spec).parent
    if not os.path.isdir(spec) and os.path.basename(spec) != "samples.npz":
        return {}  # another file that lies beside them
    try:
        return json.loads((folder / "protocol.json").read_text())
    except (OSError, ValueError):
        return {}


def _checksum(spec: str) -> str:
    path = os.path.join(spec, "samples.npz") if os.path.isdir(spec) else spec
    return pretrained.sha256_of_file(path) if os.path.isfile(path) else ""


def run(
    samples: list[str],
    reference: str,
    inception: str,
    batch_size: int,
    out: pathlib.Path,
    statistics: str = "",
) -> dict[str, Any]:
    """Evaluates each of `samples`; what results.json in `out` holds at the end.

    Args:
        samples: as `open_images` takes them.
        reference: as `open_images` takes it, or a .npz with statistics.
        inception: the file of its weights; "": EfficientNet-Lite0 looks.
        batch_size: images at once on each device.
        out: a folder, made if it is not there.
        statistics: a file for the reference's moments, or "".

    Raises:
        DataError, ConfigError: one line, before any work where it can be told then.
        OSError: `out` or `statistics` cannot be written.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch_size is {batch_size}; it must be 1 or more")
    streams = [open_images(spec) for spec in samples]
    stored = stored_statistics(reference) if inception else {}
    images = open_images(reference) if image_streams.has_images(reference) else None
    if not stored and not images:
        raise DataError(
            f"{reference} holds neither images (arr_0) nor "
            + ("statistics" if inception else "anything that EfficientNet-Lite0 can use")
        )
    for stream in streams:
        if images and stream.size != images.size:
            raise DataError(
                f"{stream.name} holds images of {stream.size[0]}x{stream.size[1]}, "
                f"{images.name} of {images.size[0]}x{images.size[1]}; they must be of one size"
            )
    for stream in (*streams, *([images] if images else [])):
        if stream.count < _FEWEST:
            raise DataError(
                f"{stream.name} holds {stream.count} image{'s' if stream.count > 1 else ''}; "
                f"precision and recall need {_FEWEST} or more"
            )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass  # it can be written to
    network = Network(inception, batch_size)
    print(f"reference: {reference}", flush=True)
    real = reference_features(network, images, stored)
    if statistics:
        _save_statistics(statistics, real)
    results = {
        "features": "inception-v3 2015-12-05" if inception else "efficientnet-lite0",
        "reference": reference,
        "reference_sha256": _checksum(reference),
        "rows": [],
    }
    for spec, stream in zip(samples, streams, strict=True):
        print(f"samples: {spec}, {stream.count:,} images", flush=True)
        mine = network.features(stream)
        for which, features in (("samples", mine), ("reference", real)):
            if warning := features.moments.warning():
                print(f"warning: {which}: {warning}", flush=True)
        results["rows"].append(
            {
                "samples": spec,
                "num_images": stream.count,
                "sha256": _checksum(spec),
                "metrics": compare(network, mine, real),
                "protocol": _protocol(spec),
            }
        )
        files.write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def _save_statistics(path: str, real: Features) -> None:
    arrays = {"mu": real.moments.mean, "sigma": real.moments.covariance}
    if real.spatial is not None:
        arrays |= {"mu_s": real.spatial.mean, "sigma_s": real.spatial.covariance}
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)


def _out(samples: list[str]) -> pathlib.Path:
    if _OUT.value:
        return pathlib.Path(_OUT.value).expanduser()
    first = pathlib.Path(samples[0])
    if samples[0].startswith("data:"):
        first = pathlib.Path(samples[0].removeprefix("data:").rpartition(":")[0])
    folder = first if first.is_dir() else first.parent
    return folder if len(samples) == 1 else folder.parent


def main(argv: list[str]) -> None:
    with cli.program(interrupted="interrupted"):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        if _SAVE.value and not _INCEPTION.value:
            raise ConfigError("--save_statistics needs --inception: no other statistics are read")
        if _SAVE.value and not os.path.isdir(os.path.dirname(_SAVE.value) or "."):
            raise ConfigError(
                f"--save_statistics is {_SAVE.value!r}, in a folder that is not there"
            )
        samples, reference = _SAMPLES.value, _REFERENCE.value
        if not samples or not reference:
            raise ConfigError("--samples and --reference are needed; --help says what they may be")
        out = _out(samples)
        try:
            results = run(
                samples, reference, _INCEPTION.value, _BATCH.value, out, _SAVE.value or ""
            )
        except OSError as error:
            raise DataError(f"cannot be written ({first_line(error)})") from error
        print(table(results["rows"]))
        scales = [row["protocol"].get("guidance") for row in results["rows"]]
        if None not in scales and len(set(scales)) > 1:
            figures.sweep_figure(out / "sweep.png", results["rows"], _TITLES)
            print(f"curves: {out / 'sweep.png'}")
        print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    cli.run(main)
