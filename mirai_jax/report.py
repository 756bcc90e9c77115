"""One page that shows runs and compares them: `python -m mirai_jax.report RUN [RUN ...]`.

    python -m mirai_jax.report runs/mirai_e-fashion_mnist runs/llamagen-fashion_mnist
    python -m mirai_jax.report runs/sweeps/variants-fashion_mnist/*/ --out=variants.html

RUN is the workdir of a run, at work or not, here or in a bucket. The page is a single HTML file that loads
nothing: losses, validation, FID with the paper's published values, sample grids over time, speed, events,
and the fields in which the runs differ. It needs the extra `report`. (`launch.report` is another program:
the tables of results/.)
"""

import argparse
import sys

from mirai_jax.reporting import page
from mirai_jax.utils import files, paths
from mirai_jax.utils.errors import ConfigError, first_line


def main(argv: list[str]) -> None:
    # Not utils/cli.py, which imports JAX: the page of finished runs is there in a second or two.
    parser = argparse.ArgumentParser("mirai_jax.report", description=__doc__.partition("\n")[0])
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir, or a pattern of workdirs")
    parser.add_argument("--out", default="report.html", help="the page; default: %(default)s")
    given = parser.parse_args(argv)
    try:
        html, count = page.make([w for text in given.runs for w in paths.several(text)])
        files.write_text(paths.at(given.out), html)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print(f"written: {given.out} ({len(html.encode()) / 1e6:.1f} MB, runs: {count})")


if __name__ == "__main__":
    main(sys.argv[1:])
