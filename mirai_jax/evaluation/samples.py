"""Sets of samples against a reference: results.json, a table, and curves over guidance scales."""

import functools
import json
import os
import secrets
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from mirai_jax.evaluation import by_class, copies, figures, image_streams, metrics
from mirai_jax.evaluation.network import Features, Network
from mirai_jax.utils import files, paths, pictures
from mirai_jax.utils.errors import DataError
from mirai_jax.weights import pretrained

TITLES = {
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
_EXTRAS = "copies", "by_class"  # of a row, on request
DISTANCES = "fid", "frechet_efficientnet_lite0"  # of a set of metrics one, by the network


def evaluate(
    samples: list[str],
    reference: str,
    inception: str = "",
    batch_size: int = 64,
    out: str | os.PathLike[str] = "",
    statistics: str = "",
    training: str = "",
    classes: bool = False,
) -> None:
    """Prints a table of the metrics of each of `samples`, and writes them to results.json.

    results.json gets a row after each set, beside those that it has: see `_merged`. Samples at several
    guidance scales, temperatures or top-k also give sweep.png.

    Args:
        samples: as `image_streams.open_stream` takes them.
        reference: the same, or a .npz with statistics.
        out: the folder of both files, made if missing; '': that of the samples.
        statistics: a file for the reference's moments, or ''.
        training: as `reference`, the images of which the samples may be copies, or ''.
        classes: also the metrics of each class, with a table and a figure.

    Raises:
        DataError, ConfigError: one line; before any network runs, where the files alone show it.
        OSError: `out` or `statistics` cannot be written.
    """
    streams = [image_streams.open_stream(spec) for spec in samples]
    opened = Reference(reference, bool(inception))
    trained = image_streams.open_stream(training) if training else None
    if trained and not opened.images:
        raise DataError(f"{reference} holds no images, and only real ones show what is no copy")
    for stream in streams if classes else ():
        if not opened.images:
            raise DataError(f"{reference} holds no images, whose classes metrics by class need")
        by_class.common_labels(stream, opened.images)
    for stream in (*streams, *([trained] if trained else [])):
        opened.check(stream.name, stream.size)
    out = paths.at(out or _folder_of(samples))
    out.mkdir(parents=True, exist_ok=True)
    probe = out / f"{secrets.token_hex(4)}.tmp"
    probe.touch()  # the folder can be written to
    probe.unlink()
    _rows(out / "results.json")
    network = Network(inception, batch_size)
    print(f"reference: {reference}", flush=True)
    real = opened.features(network)
    if statistics:
        arrays = {"mu": real.moments.mean, "sigma": real.moments.covariance}
        if real.spatial is not None:
            arrays |= {"mu_s": real.spatial.mean, "sigma_s": real.spatial.covariance}
        with files.atomic_write(paths.at(statistics)) as file:
            np.savez(file, **arrays)
    rows = []
    compared = {"features": "inception-v3 2015-12-05" if inception else "efficientnet-lite0"}
    compared |= {"reference": reference, "reference_sha256": _checksum(reference)}
    for spec, stream in zip(samples, streams, strict=True):
        print(f"samples: {spec}, {stream.count:,} images", flush=True)
        fake = network.features(stream)
        for one in filter(None, (stream, opened.images)):
            if one.failed:
                some = next(iter(one.failed.items()))
                print(f"warning: {one.name}: {len(one.failed)} images left out: {some}", flush=True)
        for which, features in (("samples", fake), ("reference", real)):
            if warning := features.moments.warning():
                print(f"warning: {which}: {warning}", flush=True)
        row = {
            "samples": spec,
            **compared,
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
        if classes:
            try:
                row["by_class"] = by_class.measure(stream, fake, reference, opened.images, real)
            except DataError as error:
                print(f"the classes are left out: {error}", flush=True)
        if "by_class" in row:
            name = next(iter(row["metrics"]))
            print(by_class.table(row["by_class"], TITLES[name]), flush=True)
            path = out / f"by_class{len(rows) or ''}.png"
            if by_class.figure(path, row["by_class"], TITLES[name]):
                print(f"by class: {path}", flush=True)
        rows.append(row)
        results = {"rows": _merged(_rows(out / "results.json"), row)}
        files.write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    print(table(rows))
    if figures.swept(rows):
        figures.sweep_figure(out / "sweep.png", rows, TITLES)
        print(f"curves: {out / 'sweep.png'}")
    print(f"written: {out / 'results.json'}")


def _rows(path: files.AnyPath) -> list[dict[str, Any]]:
    """The rows of results.json; [] where there is none. Raises DataError for another file."""
    try:
        results = json.loads(path.read_text())
        # Files of earlier versions have what was compared once, beside the rows.
        return [results | row for row in results.pop("rows")]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no rows, and more cannot be added: move it away") from error


def _merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows and one more, the newest at the end.

    One of the same samples, reference and metrics lends it what it lacks, such as `by_class`, and goes.
    """
    same = [r for r in rows if all(r.get(k) == row[k] for k in row if k not in _EXTRAS)]
    lent = {k: v for earlier in same for k, v in earlier.items()}
    return [*(r for r in rows if r not in same), lent | row]


class Reference:
    """What samples are compared with.

    Args:
        spec: real images as `image_streams.open_stream` takes them, or a .npz with statistics.
        is_inception: whether the network is Inception: statistics belong to it.
        images: a stream in place of `spec`, which names it then.

    Attributes:
        images: a stream, or None.

    Raises:
        DataError: nothing of the kind.
    """

    def __init__(
        self, spec: str, is_inception: bool, images: image_streams.ImageStream | None = None
    ):
        self._spec, self.images, self._stored = spec, images, {}
        if images is None:
            self._stored = image_streams.statistics(spec) if is_inception else {}
            if image_streams.has_images(spec):
                self.images = image_streams.open_stream(spec)
        if not self._stored and not self.images:
            raise DataError(
                f"{spec} holds neither images (arr_0) nor "
                + ("statistics" if is_inception else "anything that EfficientNet-Lite0 can use")
            )

    def check(self, name: str, size: tuple[int, int]) -> None:
        """Raises DataError for samples of another size, (height, width) in pixels."""
        if self.images and size != self.images.size:
            height, width = self.images.size
            raise DataError(
                f"{name} holds images of {size[0]}x{size[1]}, {self.images.name} of "
                f"{height}x{width}; they must be of one size"
            )

    def features(
        self, network: Network, heartbeat: Callable[[str], object] | None = None
    ) -> Features:
        real = network.features(self.images, heartbeat) if self.images else Features(None)
        if self._stored:  # they come before those of the images, as in ADM's evaluator
            moments = functools.partial(types.SimpleNamespace, warning=lambda: None)
            real.moments = moments(mean=self._stored["mu"], covariance=self._stored["sigma"])
            if "mu_s" in self._stored:
                mean, covariance = self._stored["mu_s"], self._stored["sigma_s"]
                real.spatial = moments(mean=mean, covariance=covariance)
            elif not self.images:
                print(f"{self._spec} holds mu and sigma alone: sFID is left out", flush=True)
        return real


def compare(
    is_inception: bool,
    fake: Features,
    real: Features,
    heartbeat: Callable[[str], object] = lambda what: None,
) -> dict[str, float]:
    """Every metric that two sets of one network's features allow, by the names of results.json.

    One that they do not allow is left out with a line on the screen. `heartbeat` takes a line before
    each part of the work.
    """

    prefix = "" if is_inception else "efficientnet_lite0_"
    first = DISTANCES[not is_inception]
    wanted = {(first,): lambda: [metrics.distance(fake.moments, real.moments)]}
    if is_inception and real.spatial is not None:
        wanted["sfid",] = lambda: [metrics.distance(fake.spatial, real.spatial)]
    if is_inception:
        names = "inception_score", "inception_score_std"
        wanted[names] = lambda: metrics.inception_score(fake.probabilities)
    if real.pooled is not None:
        names = f"{prefix}precision", f"{prefix}recall"
        wanted[names] = lambda: metrics.precision_recall(
            real.pooled, fake.pooled, heartbeat=heartbeat
        )
    found = {}
    for names, values in wanted.items():
        heartbeat(" and ".join(names))
        try:
            found |= zip(names, values(), strict=True)
        except DataError as error:
            print(f"{' and '.join(names)} left out: {error}", flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of results.json as Markdown."""
    names = [n for n in TITLES if n in rows[0]["metrics"]]
    head = ["samples", "images", *(TITLES[n] for n in names)]
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
