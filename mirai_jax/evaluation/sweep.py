"""Which guidance, temperature and top-k suit a run: the best of those measured, and a figure of all."""

from typing import Any

from mirai_jax.evaluation import assessments, figures
from mirai_jax.evaluation.drawn import SWEPT
from mirai_jax.evaluation.runs import Request
from mirai_jax.evaluation.samples import DISTANCES, TITLES
from mirai_jax.training import restore
from mirai_jax.utils import paths


def measured(workdir: str, request: Request) -> tuple[int, list[dict[str, Any]]]:
    """The last measured step, and for each combination of the request that it has a line of:
    {'protocol', 'metrics'}, as in results.json.
    """
    settings = restore.read_settings("--workdir", workdir)
    wanted = [p.to_dict() for p in request.protocols(settings, workdir)]
    lines = [
        line
        for line in assessments.read(workdir)
        if line["protocol"] in wanted and any(name in line for name in DISTANCES)
    ]
    step = max((line["step"] for line in lines), default=0)
    return step, [
        {"protocol": line["protocol"], "metrics": {n: line[n] for n in TITLES if n in line}}
        for line in lines
        if line["step"] == step
    ]


def show(workdir: str, request: Request) -> None:
    """Prints the best combination and writes sweep.png into the run's folder; nothing of a single one."""
    step, rows = measured(workdir, request)
    if not figures.swept(rows):
        return
    distance = next(iter(rows[0]["metrics"]))
    best = min(rows, key=lambda row: row["metrics"][distance])
    options = ", ".join(f"{name} {best['protocol'][name]:g}" for name in SWEPT)
    path = paths.at(workdir) / "sweep.png"
    figures.sweep_figure(path, rows, TITLES)
    print(
        f"{workdir}, step {step}: best {TITLES[distance]} {best['metrics'][distance]:.4g} of "
        f"{len(rows)}: {options}; {path}",
        flush=True,
    )
