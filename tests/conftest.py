"""Eight simulated devices for the mesh tests, and a compilation cache of this test run.

Tests and the programs that they start compile the same small steps again and again.
"""

import atexit
import collections
import itertools
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# XLA's older code generator compiles tiny programs in two thirds of the time.
if "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    flags = (os.environ.get("XLA_FLAGS"), "--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))

import hypothesis  # noqa: E402
import jax  # noqa: E402 (reads the environment)
import pytest  # noqa: E402

# On a busy machine the first example of a test can take more than a second.
hypothesis.settings.register_profile(
    "busy", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None
)
hypothesis.settings.load_profile("busy")

# MIRAI_TEST_PLATFORM=cuda is for the tests that are skipped without a GPU.
jax.config.update("jax_platforms", os.environ.get("MIRAI_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """Without most optimisations: for tiny programs, whose compiling is all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_terminal_summary(terminalreporter):
    """Prints the seconds that each file took, the longest first."""
    seconds = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if hasattr(report, "duration"):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for name, count in seconds.most_common():
        terminalreporter.line(f"{count:7.1f}  {name}")
