"""The text of results/README.md, section by section."""

from collections.abc import Collection, Sequence
from fractions import Fraction

from launch import overrides, speedup, study
from launch import report_cells as cells
from launch import report_comparison as comparison
from launch import report_diagnostics as diagnostics
from launch import report_figures as figures
from launch.collected import Results, Run
from launch.encoders import SHOWN, Encoder
from launch.tables import table
from mirai_jax.config import fields
from mirai_jax.utils.progress import duration

_HEAD = """# Does foresight help? A controlled study on Fashion-MNIST

Written by `python -m launch.report` out of the files in [`runs/`](runs) and `encoders/`, `bench.json`, and
for what is said in words under "Findings" [`findings.md`](findings.md); `--check` tells whether it still is
what they give.
"""
_COMMANDS = f"""```
python -m mirai_jax.teach ...  # the encoders, where a sweep's teachers are your own: below
python -m launch.sweep --sweep=launch/sweeps/SWEEP.py --scale={study.SCALE} --out=runs/sweeps/SWEEP --parallel=2
python -m mirai_jax.evaluate --workdir=RUN,... --guidance=1 --probes
python -m mirai_jax.bench --config=configs/mirai_e_i.py:{study.SCALE} --compare --repeats=15 --measure=step --json=results/bench.json
python -m launch.report --collect=runs/sweeps/SWEEP,... --encoders=runs/ENCODER,... --machine="what it ran on"
python -m launch.report
```
"""
_ACCURACY = study.Measure("", "", "", False, 100, 1)
_NAMES = {
    "samples": "{} samples",
    "held_out": "{} held-out images for cross-entropy and probes",
    "guidance": "guidance {} (1 is none)",
    "weights": "{} weights",
    "pixels": "features at {} pixels",
    "seed": "seed {} for the samples of every run",
}


def readme(
    results: Results, findings: str, drawn: Collection[str], encoders: Sequence[Encoder] = ()
) -> str:
    """The whole text.

    Args:
        results: all runs.
        findings: written by hand; may be empty.
        drawn: the names of the figures that there are.
        encoders: the user's own, which runs have as their teachers.
    """
    sections = [
        _HEAD,
        f"## Findings\n\n{findings.strip()}\n" if findings.strip() else "",
        _setup(results),
        _comparison(results, drawn),
        _diagnostics(results, drawn),
        "## The paper's order beside ours\n\n"
        "The paper's numbers are FID on ImageNet 256 (B, 80 epochs); ours are Fréchet distances over "
        "another network on other images, so that only the order can be compared, at the last step that "
        "all runs of a line have, over the seeds that both sides have. Each "
        "measure decides alone, where the difference is beyond its noise (the yardstick, at that step); "
        '"undecided" is within it. Where EfficientNet-Lite0 is '
        "the teacher, it is the network of the Fréchet distance too, not of the others.\n\n"
        + diagnostics.order(results),
        *(diagnostics.exploration(results, explored) for explored in study.EXPLORATIONS),
        _encoders(encoders),
        _probe(results, drawn),
        _runs(results, encoders),
    ]
    return "\n".join(section for section in sections if section)


def _figure(name: str, drawn: Collection[str], what: str) -> str:
    return f"![{what}]({name})\n\n" if name in drawn else ""


def _protocol(results: Results) -> str:
    """How samples were drawn and measured, in words."""
    found = []
    for name, value in sorted((results.protocol or {}).items()):
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        found.append(_NAMES[name].format(shown) if name in _NAMES else f"{name} {shown}")
    return ", ".join(found)


def _setup(results: Results) -> str:
    text = "## What was measured\n\n"
    baseline = results.seeds(study.BASELINE)
    if baseline:
        text += f"{_recipe(baseline[min(baseline)])} "
    text += (
        "Within a seed the variants have the same initial generator and the same batches in the same "
        "order; they differ in the foresight terms of their configs"
        f"{_terms(results) or '.'}\n\n"
    )
    if results.protocol is None:
        return f"{text}No run has been assessed with {study.PROTOCOL}: the measures are not run.\n"
    text += (
        f"Kept checkpoints were assessed with {_protocol(results)}.\n\n"
        "* **Fréchet**: the Fréchet distance between samples and all held-out images, as the tokenizer "
        "gives these back, over the pooled features of EfficientNet-Lite0. It is not FID, whose network "
        "is another, and cannot be compared with published FIDs; it also depends on the number of "
        f"samples, here always the same.{_real(results, 'frechet', '{:.1f}', 'training images')} To "
        "untouched images the distance is much larger, since the codebook's own error is part of it."
        f"{_real(results, 'frechet_images', '{:.1f}', 'training images')}\n"
        "* **agreement**: how often a classifier of real images (a support-vector machine of their "
        "pixels) sees the class that was asked "
        f"for.{_real(results, 'agreement', '{:.1%}', 'held-out images')}\n"
        "* **cross-entropy**: of the next token on held-out images, in nats a token.\n"
    )
    if any(results.finals(variant, "precision") for variant in study.VARIANTS):
        text += (
            "* **precision**, **recall**: of samples, in the features of the Fréchet distance.\n"
        )
    if any(
        _field(run, "teacher.name") == "efficientnet_lite0"
        for run in results.seeds("variants/mirai_i").values()
    ):
        text += (
            "\nThe teacher of Mirai-I and Mirai-E+I is EfficientNet-Lite0 as well, so that their Fréchet "
            "distance is measured with the very network whose features they were trained to predict. "
            "Agreement and cross-entropy do not share it.\n"
        )
    return text


def _field(run: Run, path: str) -> object:
    """Of its config; None where it has no such field."""
    value: object = run.config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _recipe(run: Run) -> str:
    """The baseline's config in a sentence, as far as it has the fields."""

    def field(path: str) -> str:
        value = _field(run, path)
        return "?" if value is None else fields.shown(value).strip("'")

    grid = _field(run, "model.grid")
    grid = "x".join(map(str, grid)) if isinstance(grid, list) else grid
    return (
        f"Class-conditional generators of {field('data.name')} images, as {grid} tokens out of "
        f"{field('model.vocab_size')}: {field('model.num_layers')} blocks of width "
        f"{field('model.width')}, {run.steps:,} steps of {run.batch_size} images, learning rate "
        f"{field('optimizer.learning_rate')} ({field('optimizer.schedule')}), EMA decay "
        f"{field('ema_decay')}."
    )


def _terms(results: Results) -> str:
    """A list of the variants' foresight terms, as far as they are known."""
    lines = []
    for variant, name in study.VARIANTS.items():
        run = next(iter(results.seeds(variant).values()), None)
        terms = _field(run, "foresight") if run else None
        for term in terms if isinstance(terms, list) else ():
            changed = [
                f"{field}={overrides.plain(term[field])}"
                for field in ("source", "offsets", "weights", "start_epoch", "student_layer")
                if field in term
            ]
            lines.append(f"* {name}: `{', '.join(changed)}`")
    if not lines:
        return ""
    what = "(start_epoch: from when on; student_layer=0: the block at two thirds of the depth)"
    return f" {what}:\n\n" + "\n".join(lines)


def _real(results: Results, measure: str, form: str, images: str) -> str:
    """A sentence: what real images reach that passed through the tokenizer, where it was measured."""
    values = [
        value
        for variant in study.VARIANTS
        for value in results.finals(variant, f"real_{measure}").values()
    ]
    spread = speedup.spread(values)
    if spread is None:
        return ""
    low, high = form.format(spread.low), form.format(spread.high)
    span = low if low == high else f"{low} to {high}"
    return f" As many real {images} that passed through the tokenizer have {span}."


def _comparison(results: Results, drawn: Collection[str]) -> str:
    text = "## The main comparison\n\n"
    if not any(results.seeds(variant) for variant in study.VARIANTS):
        return f"{text}{cells.NOT_RUN.capitalize()}: no run of the sweep `{study.MAIN}`.\n"
    return (
        text
        + _figure(figures.COMPARISON, drawn, "Measures against the step, a curve a variant")
        + comparison.finals(results)
        + "\n± is the standard deviation of single runs over seeds (n - 1), not of the mean. A seed sets "
        "parameters, batches and dropout; all runs are asked for samples with the same "
        "keys, so that what their limited number adds is only partly in it.\n\n"
        + comparison.yardstick(results)
        + "\n### Speed-up\n\n"
        + comparison.speed_up(results)
        + "\n### Time\n\n"
        + comparison.times(results)
        + "".join(
            f"\n### With {_protocol(other)}\n\n{comparison.finals(other)}"
            for other in results.others()
        )
    )


def _diagnostics(results: Results, drawn: Collection[str]) -> str:
    text = "## One thing changed\n\n"
    settings = [setting for asked in study.QUESTIONS for setting in asked.settings]
    if not any(results.seeds(setting) for setting in settings):
        return f"{text}{cells.NOT_RUN.capitalize()}: no run of the sweeps `controls` and `diagnostics`.\n"
    text += (
        "Runs that differ from a variant of the main comparison in what the heading says, compared with "
        "that variant and with the baseline at the same seeds and the same step: mean ± standard "
        "deviation, differences mean (lowest to highest). Where there is one seed, only large "
        "differences mean something, and what is special to the reference's own run of that seed is in "
        "all of them.\n\n"
    )
    text += _figure(figures.DIAGNOSTICS, drawn, "Every such run less the baseline of its seed")
    if figures.DIAGNOSTICS in drawn:
        text += (
            "A dot is a run; strokes are the variants over the same seeds; grey is within the noise of a "
            "single run.\n\n"
        )
    return text + "\n".join(diagnostics.question(results, asked) for asked in study.QUESTIONS)


def _probe(results: Results, drawn: Collection[str]) -> str:
    text = "## What the states know of the class\n\n"
    probes = {variant: results.probes(variant) for variant in study.VARIANTS}
    layers = sorted({layer for probe in probes.values() for layer, _ in probe})
    shares = sorted({share for probe in probes.values() for _, share in probe})
    if not shares:
        return f"{text}{cells.NOT_RUN.capitalize()}: no run of the main comparison was probed.\n"
    rows = [
        [str(layer), name]
        + [cells.plus_minus(_ACCURACY, probes[variant].get((layer, s), {})) for s in shares]
        for layer in layers
        for variant, name in study.VARIANTS.items()
    ]
    titles = ["block", "variant", *(figures.share_text(share) for share in shares)]
    return (
        f"{text}The generator reads held-out images without being told their class; a linear probe "
        "of each block's states at the last step tells the class after a share of the tokens. Accuracy "
        "in %, mean ± standard deviation over seeds.\n\n"
        + _figure(
            figures.PROBE, drawn, "Accuracy of linear probes by block and share of the tokens"
        )
        + table(titles, rows)
        + _probes_of_others(results)
    )


def _probes_of_others(results: Results) -> str:
    """Halfway through the image, of the runs with one thing changed."""
    half = Fraction(1, 2)
    probes = {s: results.probes(s) for asked in study.QUESTIONS for s in asked.settings}
    layers = sorted({layer for probe in probes.values() for layer, share in probe if share == half})
    if not layers:
        return ""
    rows = [
        [cells.label(setting), f"{min(run.steps for run in results.seeds(setting).values()):,}"]
        + [cells.plus_minus(_ACCURACY, probe.get((layer, half), {})) for layer in layers]
        for setting, probe in probes.items()
        if probe
    ]
    return (
        f"\nOf runs with one thing changed, {figures.share_text(half)}, at their own last step, which is "
        "earlier than that above where they are shorter:\n\n"
        + table(["run", "steps", *(f"block {layer}" for layer in layers)], rows)
    )


def _encoders(encoders: Sequence[Encoder]) -> str:
    if not encoders:
        return ""
    titles = [t for t in SHOWN.values() if any(t in encoder.held_out for encoder in encoders)]
    rows = [
        [
            f"[{encoder.name}](encoders/{encoder.name})",
            encoder.objective,
            f"{encoder.steps:,}",
            *(_percent(encoder.held_out.get(title)) for title in titles),
        ]
        for encoder in encoders
    ]
    return (
        "## Your own encoders\n\n"
        "DINOv2's network, small, trained by `mirai_jax.teach` on the images that the generators train "
        "on: with their labels, or without on the codes of hidden patches (masked). What it was asked "
        "in training, asked of the held-out images:\n\n"
        + table(["encoder", "learned from", "steps", *(f"{title}, %" for title in titles)], rows)
    )


def _percent(share: float | None) -> str:
    return "" if share is None else _ACCURACY.shown(share)


def _runs(results: Results, encoders: Sequence[Encoder]) -> str:
    text = "## Every run\n\n"
    if not results.runs:
        return f"{text}{cells.NOT_RUN.capitalize()}: `runs/` is empty.\n"
    named = [(f"{run.sweep}/{run.name}", run) for run in results.runs]
    named += [(f"encoders/{encoder.name}", encoder) for encoder in encoders]
    rows = [
        [
            name,
            f"`{run.command}`",
            f"{run.steps:,}",
            _clipped(run) if isinstance(run, Run) else "",
            "not known" if run.seconds is None else duration(run.seconds),
            run.machine,
        ]
        for name, run in named
    ]
    return (
        f"{text}The same again, where SWEEP is a file of [`launch/sweeps/`](../launch/sweeps) and a "
        f"run's folder below `runs/sweeps/`:\n\n{_COMMANDS}\n"
        'Under "clipped" is the share of the logged steps of a run\'s second half whose gradient was longer '
        "than the limit, and was scaled down to it.\n\n"
        + table(["run", "command", "steps", "clipped", "time", "machine"], rows)
    )


def _clipped(run: Run) -> str:
    limit = _field(run, "optimizer.clip_norm")
    norms = [e.get("grad_norm") for e in run.metrics if e["step"] > run.steps / 2]
    norms = [norm for norm in norms if isinstance(norm, (int, float))]
    if not norms or not isinstance(limit, (int, float)) or limit <= 0:
        return ""
    return f"{sum(norm > limit for norm in norms) / len(norms):.0%}"
