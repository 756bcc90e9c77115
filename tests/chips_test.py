"""Planning for chips that are not here. What compiles is tested where the chip's compiler is installed."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from mirai_jax.benchmark import chips
from mirai_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["size=", "num_layers=2", "num_heads=2", "width=128", "vocab_size=64", "unroll=1"]
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
HAS_TPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """Afterwards: other tests start programs."""
    for name in ("XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def refusal(*arguments):
    with pytest.raises(ConfigError) as error:
        chips.devices(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_an_unknown_chip_is_one_line():
    for name in ("h10", "h100:8", "v5e", "v5e:8"):
        message = f"{name!r}, must be a100, h100, h200, or a TPU slice such as v5e:2x4"
        assert message in refusal(name, 1)


@pytest.mark.skipif(HAS_CUDA, reason="the compiler for GPUs is installed")
def test_without_the_compiler_for_gpus_it_says_how_to_get_it():
    assert "--chip=h100: its compiler knows no such chip, or is not installed" in refusal("h100", 8)
    assert "'.[cuda]'" in refusal("a100", 1)


@pytest.mark.skipif(HAS_TPU, reason="the compiler for TPUs is installed")
def test_without_the_compiler_for_tpus_it_says_how_to_get_it():
    assert "'.[tpu]'" in refusal("v5e:2x4", 8)


def test_a_gpus_plan_is_compared_with_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    gib = 2**30
    assert chips.verdict("h100", 53 * gib) == (
        "of 79 GiB, 59.2 of which JAX takes (XLA_CLIENT_MEM_FRACTION=0.75)"
    )
    message = chips.verdict("h100", 65 * gib)
    assert message.endswith("it does not fit; XLA_CLIENT_MEM_FRACTION=0.84 would do")
    assert chips.verdict("h100", 78 * gib).endswith("it does not fit")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.84")
    assert "fit" not in chips.verdict("h100", 65 * gib)


def plan(chip, count, *more, variant="mirai_e"):
    """MiB by name, of a small bfloat16 generator."""
    fields = [f"--config.model.{field}" for field in (*SMALL, "grid=(16,16)")]
    quick = {} if chip else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is most of the time
    done = subprocess.run(
        [sys.executable, "-m", "mirai_jax.plan", f"--config=configs/{variant}.py:imagenet_b", *fields,
         f"--devices={count}", f"--chip={chip}", "--config.batch_size=32", *more],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": "", **quick}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: float(size.replace(",", ""))
        for name, size in re.findall(r"^  ([a-z ]+?) +([\d,.]+) MiB$", done.stdout, re.MULTILINE)
    }


def test_a_plan_by_simulated_devices():
    one, two = plan("", 1), plan("", 2)
    assert two["in all"] < one["in all"] and two["parameters"] == one["parameters"]
    assert one["frozen"] == 0


def test_a_plan_with_a_published_teacher_needs_neither_its_weights_nor_images():
    assert plan("", 1, variant="mirai_i")["frozen"] > 300  # DINOv2 ViT-B


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDA, reason="the compiler for GPUs is not installed")
@pytest.mark.parametrize("chip", chips.GPUS)
def test_the_step_compiles_for_gpus(chip):
    fused, plain = plan(chip, 1), plan(chip, 1, "--config.model.attention=xla")
    assert fused["in all"] == pytest.approx(
        sum(v for k, v in fused.items() if k != "in all"), abs=1
    )
    assert fused["temporary"] < plain["temporary"]  # cuDNN's attention stores no scores
    assert plan(chip, 8)["temporary"] < fused["temporary"] / 4


@pytest.mark.skipif(not HAS_TPU, reason="the compiler for TPUs is not installed")
def test_the_step_compiles_for_a_tpu_slice():
    assert 0 < plan("v5e:2x2", 4)["temporary"] < 1000
    with pytest.raises(AssertionError, match="has 4 devices: --devices=4"):
        plan("v5e:2x2", 8)
