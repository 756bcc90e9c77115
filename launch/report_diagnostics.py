"""What differs from the main comparison in one thing, the paper's order beside ours, explorations.

Runs are compared after as many steps as the shortest of them has.
"""

from collections.abc import Callable, Collection

from launch import report_cells as cells
from launch import study
from launch.collected import Results, Run
from launch.study import Claim, Exploration, Measure, Question
from launch.tables import table
from mirai_jax.config import compare

_FRECHET = study.MEASURES[0]
_LONGEST = 60  # letters of a config's value in a cell


def _row(
    results: Results, setting: str, references: Collection[str], seeds: Collection[int]
) -> list[str]:
    """For each measure the final value over these seeds, and its differences to the references."""
    row = []
    for measure in study.MEASURES:
        noise = results.noise(measure)
        row.append(cells.plus_minus(measure, _only(results.finals(setting, measure.key), seeds)))
        for reference in references:
            differences = _only(cells.against(results, setting, reference, measure), seeds)
            same = reference == setting
            row.append("" if same else cells.difference(measure, differences, noise))
    return row


def _only(values: dict[int, float], seeds: Collection[int]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if seed in seeds}


def _titles(references: Collection[str]) -> list[str]:
    less = [f"− {study.VARIANTS[reference]}" for reference in references]
    return [title for measure in study.MEASURES for title in (measure.title, *less)]


def question(results: Results, asked: Question) -> str:
    """The section of one question: its runs beside their reference and the baseline."""
    text = f"### {asked.title}\n\n{asked.text}\n\n"
    seeds = {seed for setting in asked.settings for seed in results.seeds(setting)}
    if not seeds:
        return f"{text}{cells.NOT_RUN.capitalize()}: {'; '.join(asked.settings.values())}.\n"
    return text + _compared(results, asked.reference, asked.settings, seeds)


def exploration(results: Results, explored: Exploration) -> str:
    """The section of a sweep whose runs are told by what differs in their configs."""
    text = f"## {explored.title}\n\n{explored.text}\n\n"
    settings = results.settings(explored.sweep)
    if not settings:
        return f"{text}{cells.NOT_RUN.capitalize()}: no run of the sweep `{explored.sweep}`.\n"
    seeds = {seed for setting in settings for seed in results.seeds(setting)}

    def more(alike: Results, setting: str) -> list[str]:
        changed = _changed(alike, setting, explored.reference) if setting in settings else ""
        finals = [(m, alike.finals(setting, m.key)) for m in explored.measures]
        shown = (cells.mean(m, v) if v or setting in settings else "" for m, v in finals)
        return [changed, *shown]

    titles = ["what differs", *(m.title for m in explored.measures)]
    return text + _compared(results, explored.reference, settings, seeds, titles, more)


def _compared(
    results: Results,
    reference: str,
    settings: Collection[str],
    seeds: Collection[int],
    titles: Collection[str] = (),
    more: Callable[[Results, str], list[str]] = lambda alike, setting: [],
) -> str:
    """The baseline, the reference and the settings, after the steps that the shortest of these has.

    Args:
        results: all runs.
        reference: a variant.
        settings: at least one has a run.
        seeds: that are looked at.
        titles, more: of further columns, and their cells.
    """
    steps = results.shortest(settings)
    alike, references = results.until(steps), (reference, study.BASELINE)
    rows = [
        [
            cells.label(setting),
            cells.seeds(alike, setting, seeds),
            *more(alike, setting),
            *_row(alike, setting, references, seeds),
        ]
        for setting in (study.BASELINE, reference, *settings)
    ]
    noise = f" (yardstick for noise: {found})" if (found := cells.noises(alike)) else ""
    return f"After {steps:,} steps{noise}:\n\n" + table(
        ["run", "seed", *titles, *_titles(references)], rows
    )


def _changed(results: Results, setting: str, base: str) -> str:
    """The variant, and the fields in which a run's config differs from its of the same seed."""
    runs, of_base = results.seeds(setting), results.seeds(base)
    seed = min(runs.keys() & of_base.keys(), default=None)
    if seed is None:
        return f"{study.VARIANTS[base]} ({cells.NOT_RUN})"
    fields = _fields(of_base[seed], runs[seed])
    return f"{study.VARIANTS[base]} with {', '.join(fields) or 'nothing else'}"


def _fields(base: Run, run: Run) -> list[str]:
    found = []
    for field, (_, new) in compare.differences(base.config, run.config).items():
        if field == "num_steps":  # they are compared at the same step
            continue
        if new is None and field.startswith("foresight["):  # of a term that is gone
            continue
        text = "nothing" if new is None else str(new)
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        found.append(f"`{field}={text}`")
    return found


def order(results: Results) -> str:
    """The paper's claims, one a line, beside our Fréchet distances."""
    rows = []
    for claim in study.CLAIMS:
        pairs = _pairs(results, claim)
        steps = results.shortest([setting for pair in pairs for setting in pair])
        alike = results.until(steps)
        ours = dict.fromkeys(text for pair in pairs for text in _values(alike, *pair))
        note = f" ({claim.note})" if claim.note else ""
        rows.append(
            [
                claim.text + note,
                claim.published,
                "" if steps is None else f"{steps:,}",
                _seeds(alike, pairs),
                ", ".join(ours),
                *(_agreement(alike, pairs, measure) for measure in study.MEASURES),
            ]
        )
    by = [f"by {measure.name}" for measure in study.MEASURES]
    return table(
        ["the paper's claim", "the paper's FID", "steps", "seeds", "our Fréchet", *by], rows
    )


def _pairs(results: Results, claim: Claim) -> list[tuple[str, str]]:
    found = []
    for better, worse in claim.pairs:
        sweep, _, name = better.partition("/")
        settings = results.settings(sweep) if name == "*" else [better]
        found += [(setting, worse) for setting in settings]
    return found


def _seeds(results: Results, pairs: list[tuple[str, str]]) -> str:
    """How many seeds a comparison rests on."""
    counts = {len(cells.against(results, *pair, _FRECHET)) for pair in pairs} - {0}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else ""


def _values(results: Results, better: str, worse: str) -> list[str]:
    """Of both settings, over the seeds that both have, where they have any."""
    finals = {s: results.finals(s, _FRECHET.key) for s in (better, worse)}
    common = finals[better].keys() & finals[worse].keys()
    shown = {s: _only(values, common) or values for s, values in finals.items()}
    return [f"{cells.label(s)} {cells.mean(_FRECHET, values)}" for s, values in shown.items()]


def _agreement(results: Results, pairs: list[tuple[str, str]], measure: Measure) -> str:
    """Against where one pair is clearly the other way round; agreeing where all are clearly so."""
    noise = results.noise(measure)
    differences = [cells.against(results, *pair, measure) for pair in pairs]
    found = [cells.verdict(measure, d, noise) for d in differences]
    if False in found:
        return "**does not agree**"
    if not pairs or not all(differences):
        return cells.NOT_RUN
    return "**agrees**" if all(found) else "undecided"
