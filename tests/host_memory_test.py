"""On a CPU, what a program frees is there for its next run."""

import os
import platform
import statistics
import subprocess
import sys

import pytest

# 64 MiB of temporaries or more, and the pages that are new to the process at each of eighty runs.
RUNS = """
import resource
import jax, jax.numpy as jnp
from mirai_jax.utils import host_memory

print(host_memory.keep_freed())

def program(x):
    stored = jax.lax.optimization_barrier(x * jnp.arange(2**24, dtype=jnp.float32))
    return jax.lax.optimization_barrier(stored[::-1] + 1).sum()

program = jax.jit(program)
for _ in range(80):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(2.0).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ASKED = "from mirai_jax.utils import host_memory; print(host_memory.keep_freed())"
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")


def run(program, **environ):
    """What it prints, where the environment says nothing of the C library but what is given."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "GLIBC_TUNABLES" and not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@GLIBC
def test_a_program_meets_its_pages_once():
    kept, first, *others = run(RUNS, JAX_PLATFORMS="cpu")
    assert kept == "True"
    assert int(first) > 100  # of 4 KiB; they may be larger
    # Until then a run may find its blocks freed in another order, and the heap grow once more.
    assert statistics.median(map(int, others[40:])) < int(first) / 20


@GLIBC
@pytest.mark.parametrize(
    "environ, kept",
    [
        ({}, "True"),
        ({"MALLOC_ARENA_MAX": "4"}, "False"),  # someone knows better
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "False"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "False"),  # its host's memory is not where XLA computes
    ],
)
def test_nothing_is_changed_where_it_is_not_wanted(environ, kept):
    assert run(ASKED, **{"JAX_PLATFORMS": "cpu", **environ}) == [kept]
