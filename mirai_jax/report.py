"""One page that shows runs and compares them: `python -m mirai_jax.report RUN [RUN ...]`.

    python -m mirai_jax.report runs/mirai_e-fashion_mnist runs/llamagen-fashion_mnist
    python -m mirai_jax.report runs/sweeps/variants-fashion_mnist/*/ --out=variants.html

RUN is the workdir of a run, at work or not, here or in a bucket. The page is a single HTML file that loads
nothing: losses, validation, FID with the paper's published values, sample grids over time, speed, events,
and the fields in which the runs differ. It needs the extra `report`.
"""

import sys

from absl import app, flags

from mirai_jax.reporting import page
from mirai_jax.utils import files, paths
from mirai_jax.utils.errors import ConfigError, first_line

# Not utils/cli.py, which imports JAX: the page is there in a second or two.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OUT = flags.DEFINE_string("out", "report.html", "The page.", flag_values=_FLAGS)


def main(argv: list[str]) -> None:
    try:
        if not argv[1:]:
            raise ConfigError("give RUN, the workdir of a run, or several; --help says more")
        html, count = page.make([run for text in argv[1:] for run in paths.several(text)])
        files.write_text(paths.at(_OUT.value), html)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {first_line(error)}")
    print(f"written: {_OUT.value} ({len(html.encode()) / 1e6:.1f} MB, runs: {count})")


if __name__ == "__main__":
    app.run(main)
