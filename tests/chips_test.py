"""Memory plans, also for chips that are not here: those compile where the chip's compiler is installed."""

import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest
from helpers import ROOT, environment, error_line, output, refusal

from mirai_jax.benchmark import chips, memory_plan
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config

SMALL = ["size=", "num_layers=2", "num_heads=2", "width=128", "vocab_size=64", "unroll=1"]
SMALL = ["--config.batch_size=32", *(f"--config.model.{x}" for x in (*SMALL, "grid=(16,16)"))]
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
HAS_TPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """Afterwards: other tests start programs."""
    for name in ("XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_an_unknown_chip():
    for name in ("h10", "h100:8", "v5e", "v5e:8"):
        message = refusal(chips.devices, name, 1)
        assert repr(name) in message and "h100" in message and "v5e:2x4" in message


@pytest.mark.skipif(HAS_CUDA, reason="the compiler for GPUs is installed")
def test_without_the_compiler_for_gpus():
    assert "'.[cuda]'" in refusal(chips.devices, "h100", 8)


@pytest.mark.skipif(HAS_TPU, reason="the compiler for TPUs is installed")
def test_without_the_compiler_for_tpus():
    assert "'.[tpu]'" in refusal(chips.devices, "v5e:2x4", 8)


def test_a_gpus_plan_beside_the_memory_that_jax_takes(monkeypatch):
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


def settings_of(variant, count, *more):
    config = parse_config([f"--config={ROOT}/configs/{variant}.py:imagenet_b", *SMALL, *more])
    return schema.read(memory_plan.without_files(config), count)


@pytest.mark.usefixtures("quick_compilation")
def test_a_plan_by_simulated_devices():
    one, two = (
        memory_plan.compile_step(settings_of("llamagen", count), jax.devices()[:count]).plan
        for count in (1, 2)
    )
    assert two.total < one.total and two.parameters == one.parameters
    assert one.frozen == 0
    lines = one.lines()
    assert len(lines) == 7 and all(line.endswith("MiB") for line in lines)


def test_a_plan_with_a_published_teacher_needs_neither_its_weights_nor_images():
    _, frozen = memory_plan.recipe_and_frozen(settings_of("mirai_i", 1))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    assert size > 300 * 2**20  # DINOv2 ViT-B


def test_a_plan_of_online_codes_needs_no_tokenizer():
    recipe, frozen = memory_plan.recipe_and_frozen(
        settings_of("llamagen_repa", 1, "--config.foresight[0].student_layer=1")
    )
    assert recipe.tokenizer.grid((256, 256)) == (16, 16)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(frozen["tokenizer"]))
    assert count == pytest.approx(71.9e6, rel=1e-3)  # the published VQ-16


def test_no_file_of_a_large_run_is_needed():
    config = parse_config([f"--config={ROOT}/configs/mirai_i.py:imagenet_b"])
    refusal(schema.read, config, 1)
    assert schema.read(memory_plan.without_files(config), 1).needs_images
    config.teacher.name = "dinov2"  # of any size: its file says which
    assert "teacher.path" in refusal(schema.read, memory_plan.without_files(config), 1)


PROGRAM = """
import dataclasses, json, sys
import chips_test
from mirai_jax.benchmark import chips, memory_plan
chip, count, *more = sys.argv[1:]
devices = chips.devices(chip, int(count))
plan = memory_plan.compile_step(chips_test.settings_of("mirai_e", len(devices), *more), devices).plan
print(json.dumps(dataclasses.asdict(plan)))
"""


def elsewhere(code, *arguments):
    """What code prints in a process that has not looked for devices."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT / "tests", env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def plan(chip, count, *more):
    """The plan by a chip's own compiler."""
    return memory_plan.Plan(**json.loads(elsewhere(PROGRAM, chip, str(count), *more)))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDA, reason="the compiler for GPUs is not installed")
@pytest.mark.parametrize("chip", chips.GPUS)
def test_the_step_compiles_for_gpus(chip):
    fused, plain = plan(chip, 1), plan(chip, 1, "--config.model.attention=xla")
    assert fused.temporary < plain.temporary  # cuDNN's attention stores no scores
    assert plan(chip, 8).temporary < fused.temporary / 4


@pytest.mark.skipif(not HAS_TPU, reason="the compiler for TPUs is not installed")
def test_the_step_compiles_for_a_tpu_slice():
    assert 0 < plan("v5e:2x2", 4).temporary < 1000 * 2**20
    with pytest.raises(AssertionError, match="v5e:2x2.*4 devices"):
        plan("v5e:2x2", 8)


OPTIONS = """
import os
from mirai_jax import sharding
from mirai_jax.benchmark import chips

def rows(*shape):
    return sharding.batch_sharding(sharding.make_mesh(shape, devices))

devices = chips.devices("v5e:2x2")
split, replicated = rows(1, 4, 1), rows(4, 1, 1)
found = sharding.whole_products(split)
assert found and not sharding.whole_products(replicated)
os.environ["LIBTPU_INIT_ARGS"] = f"--{next(iter(found))}=0"
assert not sharding.whole_products(split)  # the user's own
del os.environ["LIBTPU_INIT_ARGS"]
sharding._WHOLE = {"xla_of_another_release": "1"}
assert not sharding.whole_products(split)  # the compiler refuses it
"""


@pytest.mark.skipif(not HAS_TPU, reason="the compiler for TPUs is not installed")
def test_weights_that_are_split_need_an_option_of_the_compiler():
    elsewhere(OPTIONS)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TPU, reason="the compiler for TPUs is not installed")
def test_the_step_compiles_for_two_slices():
    given = ["--config=configs/mirai_e.py:imagenet_b", "--chip=v5e:2x2", "--slices=2", *SMALL]
    assert "8 x TPU v5 lite in 2 slices" in output("mirai_jax.plan", *given)
    message = error_line("mirai_jax.plan", *given, "--config.mesh.data=1", "--config.mesh.fsdp=-1")
    assert "mesh.fsdp is 8; a slice has 4 devices" in message
