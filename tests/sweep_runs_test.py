"""Every sweep file: its runs train on real digits, and compile at the size of ImageNet's generator B.

One seed, and each run once: many sweeps share their reference. The teachers that a sweep file takes from
earlier runs have random weights here.
"""

import pathlib

import jax
import numpy as np
import pytest
from sweep_test import ROOT, SWEEPS, paths_for

from launch import plan
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import flags, schema
from mirai_jax.models import generator, vit
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.training import metrics_writer, train
from mirai_jax.weights import pretrained, state_dict, torch_names, torch_writer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
STEPS = 20
SMALL = {  # an epoch is 15 steps
    "data.held_out": 4750, "batch_size": 16, "log_every": 1, "sample_every": 0, "judged_samples": 0, "keep_every": 0,
    "model.num_heads": 2, "model.width": 32, "model.vocab_size": 16, "model.unroll": 1,
    "optimizer.warmup_steps": 2, "sample.classes": 1, "sample.per_class": 1,
}  # fmt: skip
DONE = set()  # runs that an earlier sweep of this session had


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """What stands in for teachers of earlier runs, see `runs`: a generator's workdir, an encoder."""
    folder = tmp_path_factory.mktemp("teachers")
    fields = {**SMALL, "num_steps": 1}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = flags.parse_config(["--config=configs/llamagen.py:demo", *overrides])
    train.train(config, folder / "llamagen", devices=jax.devices()[:1], log=lambda line: None)
    shape = vit.VitConfig(width=64, num_layers=2, num_heads=1, pos_grid=(4, 4))
    image = np.zeros((1, 56, 56, 3), np.float32)
    params = jax.device_get(
        jax.jit(vit.VisionTransformer(shape).init)(jax.random.key(0), image)["params"]
    )

    def encoder(path):
        made = folder / f"{pathlib.Path(path).name}.pth"
        torch_writer.write(made, torch_names.to_torch(shape, params))
        return str(made)

    llamagen = str(folder / "llamagen")
    return {"foresight[0].checkpoint": lambda _: llamagen, "teacher.path": encoder}


def runs(sweep, scale, out, given, common):
    """The runs of a sweep's first seed. `given` is {field: function of its value in the sweep file}."""
    entries = [entry for entry in plan.read_sweep(str(sweep), scale) if not entry.get("seed")]
    entries = [{k: given[k](v) if k in given else v for k, v in e.items()} for e in entries]
    own = {name for entry in entries for name in entry}
    common = {name: str(value) for name, value in common.items() if name not in own}
    return plan.make_runs(entries, scale, common, out)


def config_of(run):
    return flags.parse_config([a for a in run.arguments if not a.startswith("--workdir=")])


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_trains(sweep, teachers, tmp_path):
    if sweep.stem == "study_tokens":
        return  # its grid fits one scale
    steps = dict.fromkeys(("num_steps", "checkpoint_every"), lambda _: STEPS)
    given = {**teachers, **steps, "keep_every": lambda _: 0}
    common = {**SMALL, "num_steps": STEPS, "checkpoint_every": STEPS}
    for run in runs(sweep, "demo", tmp_path, given, common):
        config = config_of(run)
        if (text := str(config)) in DONE:
            continue
        DONE.add(text)
        train.train(config, run.workdir, devices=jax.devices()[:1], log=lambda line: None)
        assert run.finished()
        entries = metrics_writer.read_metrics(run.workdir)
        assert len(entries) == STEPS and np.isfinite([entry["loss"] for entry in entries]).all()
        for term in schema.read(config, 1).terms:
            begins = term.start_epoch * 15
            for name in term.metric_names:
                values = np.array([entry[name] for entry in entries])
                assert (values != 0).tolist() == [i >= begins for i in range(STEPS)], run.name


def program_of(settings):
    """What the compiler sees of a config: programs alike differ in numbers alone."""
    terms = [
        (t.source, t.level, len(t.offsets), t.projector, t.window > 1, t.targets, t.anchor)
        for t in settings.terms
    ]
    teacher = settings.teacher.name if settings.needs_images else ""
    return (*terms, teacher, settings.teacher.block > 0, settings.data.online)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_compiles_for_imagenet(sweep, tmp_path):
    if sweep.stem in ("teachers", "neighbours") or sweep.stem.startswith("study_"):
        return  # of the small sets
    shape = GeneratorConfig(num_layers=1, num_heads=2, width=64)
    params = jax.jit(lambda key: generator.init_params(shape, key))(jax.random.key(0))
    weights = state_dict.Weights("generator", shape, jax.device_get(params))
    pretrained.save(tmp_path / "teacher", weights)
    given = {"foresight[0].checkpoint": lambda _: str(tmp_path / "teacher")}
    common = {**paths_for(sweep), "model.unroll": 1}  # a loop compiles sooner
    for run in runs(sweep, "imagenet_b", tmp_path, given, common):
        config = config_of(run)
        config.teacher.path = config.tokenizer.path = ""  # published shapes
        settings = schema.read(memory_plan.without_files(config), 1)
        if (program := program_of(settings)) in DONE:
            continue
        DONE.add(program)
        needed = memory_plan.compile_step(settings, jax.devices()[:1]).plan
        assert needed.temporary > needed.parameters > 4 * 110e6, run.name
