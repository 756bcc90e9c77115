"""Pictures: sample grids and the summary figure of a run."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 4  # pixels of background around an image, after enlarging
_BACKGROUND = (255, 255, 255)


def sample_grid(images_BxHxWxC: np.ndarray, names: Sequence[str], side: int = 64) -> np.ndarray:
    """One row a class with its name at the left.

    Args:
        images_BxHxWxC: uint8, the images of the first name first; B is a multiple of len(names).
        names: one a row.
        side: images are enlarged by a whole factor to about so many pixels.

    Returns:
        uint8 (height, width, 3).
    """
    rows, columns = len(names), len(images_BxHxWxC) // len(names)
    factor = max(1, side // images_BxHxWxC.shape[1])
    images = images_BxHxWxC.repeat(factor, axis=1).repeat(factor, axis=2)
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    height, width = images.shape[1] + _MARGIN, images.shape[2] + _MARGIN
    font = ImageFont.load_default(size=20)
    left = 16 + round(max(font.getlength(name) for name in names))
    picture = Image.new("RGB", (left + columns * width, _MARGIN + rows * height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        top = _MARGIN + row * height
        middle = top + (height - _MARGIN) // 2
        draw.text((8, middle), name, fill=(0, 0, 0), font=font, anchor="lm")
        for column in range(columns):
            tile = Image.fromarray(images[row * columns + column])
            picture.paste(tile, (left + column * width, top))
    return np.asarray(picture)


def save_picture(path: pathlib.Path, picture_HxWx3: np.ndarray) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_HxWx3).save(path)


def summary_figure(
    path: pathlib.Path,
    title: str,
    metrics: Sequence[dict[str, Any]],
    grid_HxWx3: np.ndarray | None,
) -> None:
    """The run at a glance: cross-entropy and foresight losses by step, and the last samples.

    Args:
        path: the PNG to write.
        title: what the run is.
        metrics: the entries of metrics.jsonl.
        grid_HxWx3: a sample grid, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [entry["step"] for entry in metrics]
    heads = [k for k in (metrics[-1] if metrics else {}) if k.startswith("foresight_")]
    curves = 1 + bool(heads)
    figure, axes = plt.subplots(
        1,
        curves + (grid_HxWx3 is not None),
        figsize=(5 * curves + (5 if grid_HxWx3 is not None else 0), 5),
        layout="constrained",
    )
    axes = np.atleast_1d(axes)
    figure.suptitle(title)
    axes[0].plot(steps, [entry["cross_entropy"] for entry in metrics])
    axes[0].set(title="Next-token cross-entropy (nats)", xlabel="step")
    axes[0].set_ylim(bottom=0)
    if heads:
        for head in heads:
            # 0 stands for a term that has not started.
            values = [entry.get(head) or float("nan") for entry in metrics]
            axes[1].plot(steps, values, label=head.removeprefix("foresight_"))
        axes[1].set(title="Foresight losses, unweighted", xlabel="step")
        axes[1].legend()
    for axis in axes[:curves]:
        axis.grid(alpha=0.3)
    if grid_HxWx3 is not None:
        axes[-1].imshow(grid_HxWx3)
        axes[-1].set_title("Samples of the EMA, one class a row")
        axes[-1].axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def teacher_figure(path: pathlib.Path, title: str, metrics: Sequence[dict[str, Any]]) -> None:
    """A run of `mirai_jax.teach` at a glance: losses by step, and what it knows of held-out images.

    Args:
        path: the PNG to write.
        title: what the run is.
        metrics: the entries of metrics.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    names = list(dict.fromkeys(name for entry in metrics for name in entry))
    for axis, end in zip(axes, ("_loss", "accuracy"), strict=True):
        for name in (name for name in names if name.endswith(end)):
            points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
            held_out = name.startswith("held_out_")
            label = name.removesuffix("_loss").replace("_", " ")
            axis.plot(*zip(*points, strict=True), "o-" if held_out else "-", label=label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if names:
            axis.legend()
    axes[0].set(title="Losses (nats)")
    axes[1].set(title="Accuracy", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sweep_figure(
    path: pathlib.Path, rows: Sequence[dict[str, Any]], titles: Mapping[str, str]
) -> None:
    """Distance against guidance, and precision against recall, of samples at several scales.

    Samples whose protocols differ in no more than the scale are a curve, each of them named by what
    sets it apart.

    Args:
        path: the PNG to write.
        rows: each with 'protocol' (its 'guidance') and 'metrics'.
        titles: what to call each metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = _curves(sorted(rows, key=lambda row: row["protocol"]["guidance"]))
    names = list(rows[0]["metrics"])
    precision = next((n for n in names if n.endswith("precision")), None)
    recall = next((n for n in names if n.endswith("recall")), None)
    figure, axes = plt.subplots(1, 2 if precision else 1, figsize=(11, 4.5), layout="constrained")
    axes = np.atleast_1d(axes)
    for label, curve in curves.items():
        scales = [row["protocol"]["guidance"] for row in curve]
        axes[0].plot(scales, [row["metrics"][names[0]] for row in curve], "o-", label=label)
        if precision:
            across = [row["metrics"][recall] for row in curve]
            up = [row["metrics"][precision] for row in curve]
            axes[1].plot(across, up, "o-", label=label)
            for x, y, scale in zip(across, up, scales, strict=True):
                axes[1].annotate(f"{scale:g}", (x, y), xytext=(5, 5), textcoords="offset points")
    axes[0].set(xlabel="guidance scale", ylabel=titles[names[0]], title="Distance: less is better")
    if len(curves) > 1:
        axes[0].legend(fontsize="small")
    if precision:
        axes[1].set(
            xlabel=titles[recall], ylabel=titles[precision], title="Each point: a guidance scale"
        )
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{what sets it apart: rows} of those whose protocols are the same but for the guidance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rest = {
            name: row["protocol"][name] for name in sorted(row["protocol"].keys() - {"guidance"})
        }
        found.setdefault(json.dumps(rest), []).append(row)
    protocols = [json.loads(key) for key in found]
    names = [n for n in dict.fromkeys(itertools.chain(*protocols)) if not n.endswith("_sha256")]
    apart = [n for n in names if len({json.dumps(p.get(n)) for p in protocols}) > 1]
    labels = [", ".join(f"{n} {p[n]}" for n in apart if n in p) for p in protocols]
    labels = [
        label if label and labels.count(label) == 1 else f"{label} ({i})".strip()
        for i, label in enumerate(labels, 1)
    ]
    return dict(zip(labels, found.values(), strict=True))
