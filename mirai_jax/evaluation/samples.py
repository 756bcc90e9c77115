"""Sets of samples against a reference: results.json, a table, and curves over guidance scales."""

import functools
import json
import os
import secrets
import types
from typing import Any

import numpy as np

from mirai_jax.evaluation import copies, figures, image_streams, metrics
from mirai_jax.evaluation.network import Features, Network
from mirai_jax.utils import files, paths, pictures
from mirai_jax.utils.errors import DataError
from mirai_jax.weights import pretrained

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


def evaluate(
    samples: list[str],
    reference: str,
    inception: str = "",
    batch_size: int = 64,
    out: str | os.PathLike[str] = "",
    statistics: str = "",
    training: str = "",
) -> None:
    """Prints a table of the metrics of each of `samples`, and writes them to results.json.

    results.json is written anew after each set. Samples at several guidance scales also give sweep.png.

    Args:
        samples: as `image_streams.open_stream` takes them.
        reference: the same, or a .npz with statistics.
        out: the folder of both files, made if missing; '': that of the samples.
        statistics: a file for the reference's moments, or ''.
        training: as `reference`, the images of which the samples may be copies, or ''.

    Raises:
        DataError, ConfigError: one line; before any network runs, where the files alone show it.
        OSError: `out` or `statistics` cannot be written.
    """
    streams = [image_streams.open_stream(spec) for spec in samples]
    stored = image_streams.statistics(reference) if inception else {}
    images = image_streams.open_stream(reference) if image_streams.has_images(reference) else None
    if not stored and not images:
        raise DataError(
            f"{reference} holds neither images (arr_0) nor "
            + ("statistics" if inception else "anything that EfficientNet-Lite0 can use")
        )
    trained = image_streams.open_stream(training) if training else None
    if trained and not images:
        raise DataError(f"{reference} holds no images, and only real ones show what is no copy")
    for stream in (*streams, *([trained] if trained else [])):
        if images and stream.size != images.size:
            raise DataError(
                f"{stream.name} holds images of {stream.size[0]}x{stream.size[1]}, "
                f"{images.name} of {images.size[0]}x{images.size[1]}; they must be of one size"
            )
    out = paths.at(out or _folder_of(samples))
    out.mkdir(parents=True, exist_ok=True)
    probe = out / f"{secrets.token_hex(4)}.tmp"
    probe.touch()  # the folder can be written to
    probe.unlink()
    network = Network(inception, batch_size)
    print(f"reference: {reference}", flush=True)
    real = network.features(images) if images else Features(None)
    if stored:  # they come before those of the images, as in ADM's evaluator
        moments = functools.partial(types.SimpleNamespace, warning=lambda: None)
        real.moments = moments(mean=stored["mu"], covariance=stored["sigma"])
        if "mu_s" in stored:
            real.spatial = moments(mean=stored["mu_s"], covariance=stored["sigma_s"])
        elif not images:
            print(f"{reference} holds mu and sigma alone: sFID is left out", flush=True)
    if statistics:
        arrays = {"mu": real.moments.mean, "sigma": real.moments.covariance}
        if real.spatial is not None:
            arrays |= {"mu_s": real.spatial.mean, "sigma_s": real.spatial.covariance}
        with files.atomic_write(paths.at(statistics)) as file:
            np.savez(file, **arrays)
    rows = []
    results = {"features": "inception-v3 2015-12-05" if inception else "efficientnet-lite0"}
    results |= {"reference": reference, "reference_sha256": _checksum(reference), "rows": rows}
    for spec, stream in zip(samples, streams, strict=True):
        print(f"samples: {spec}, {stream.count:,} images", flush=True)
        fake = network.features(stream)
        for one in filter(None, (stream, images)):
            if one.failed:
                some = next(iter(one.failed.items()))
                print(f"warning: {one.name}: {len(one.failed)} images left out: {some}", flush=True)
        for which, features in (("samples", fake), ("reference", real)):
            if warning := features.moments.warning():
                print(f"warning: {which}: {warning}", flush=True)
        row = {
            "samples": spec,
            "num_images": stream.count - len(stream.failed),
            "sha256": _checksum(spec),
            "metrics": compare(network.is_inception, fake, real),
            "protocol": protocol_of(spec),
        }
        if trained:
            print(f"nearest images of {training}, {trained.count:,} images", flush=True)
            mine, usual = copies.nearest(network, trained, (fake.pooled, real.pooled))
            row["copies"] = {"of": training, **copies.judge(mine, usual)}
            path = out / f"nearest{len(rows) or ''}.png"
            pictures.save_picture(path, copies.picture(stream, trained, mine))
            print(
                f"{row['copies']['share']:.2%} of the samples are nearer to a training image than "
                f"{1 - copies.COMMON:.0%} of the reference are: {path}",
                flush=True,
            )
        rows.append(row)
        files.write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    print(table(rows))
    scales = {row["protocol"].get("guidance") for row in rows}
    if None not in scales and len(scales) > 1:
        figures.sweep_figure(out / "sweep.png", rows, _TITLES)
        print(f"curves: {out / 'sweep.png'}")
    print(f"written: {out / 'results.json'}")


def compare(is_inception: bool, fake: Features, real: Features) -> dict[str, float]:
    """Every metric that two sets of one network's features allow, by the names of results.json."""

    def distance(one: Any, other: Any) -> float:
        return metrics.frechet_distance(one.mean, one.covariance, other.mean, other.covariance)

    prefix = "" if is_inception else "efficientnet_lite0_"
    first = "fid" if is_inception else "frechet_efficientnet_lite0"
    found = {first: distance(fake.moments, real.moments)}
    if is_inception:
        if real.spatial is not None:
            found["sfid"] = distance(fake.spatial, real.spatial)
        score, deviation = metrics.inception_score(fake.probabilities)
        found |= {"inception_score": score, "inception_score_std": deviation}
    if real.pooled is not None:
        precision, recall = metrics.precision_recall(real.pooled, fake.pooled)
        found |= {f"{prefix}precision": precision, f"{prefix}recall": recall}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of results.json as Markdown."""
    names = [n for n in _TITLES if n in rows[0]["metrics"]]
    head = ["samples", "images", *(_TITLES[n] for n in names)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        values = [f"{row['metrics'][n]:.4g}" for n in names]
        lines.append([row["samples"], f"{row['num_images']:,}", *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def protocol_of(spec: str) -> dict[str, Any]:
    """The protocol.json of a folder of samples or of its samples.npz; {} for any other images."""
    folder = paths.at(spec)
    if folder.name == "samples.npz":
        folder = folder.parent
    try:
        return json.loads((folder / "protocol.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _checksum(spec: str) -> str:
    path = paths.at(spec)
    path = path / "samples.npz" if path.is_dir() else path
    return pretrained.sha256_of_file(path) if path.is_file() else ""


def _folder_of(samples: list[str]) -> files.AnyPath:
    name = samples[0]
    first = paths.at(name.removeprefix("data:").rpartition(":")[0] if name[:5] == "data:" else name)
    folder = first if first.is_dir() else first.parent
    return folder if len(samples) == 1 else folder.parent
