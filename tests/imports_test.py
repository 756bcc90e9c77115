"""The arrows of the house: which module may import which, read from the source."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "mirai_jax"


def modules():
    """{dotted name: file} of the package and the configs."""
    files = [f for top in (PACKAGE, "configs") for f in sorted((ROOT / top).rglob("*.py"))]
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
        for f in files
    }


MODULES = modules()


def imports_in(source, module):
    """Every dotted name that the source imports, also inside functions.

    `from a import b` gives 'a.b', which is a module or something in the module 'a'.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import, which these tests do not follow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def imports(module):
    return imports_in(MODULES[module].read_text(), module)


def outside(module):
    """Top-level names of what it imports from elsewhere."""
    return {name.split(".")[0] for name in imports(module)} - {PACKAGE, "configs"}


def inside(module):
    """The modules of this project that it imports."""
    own = {name for name in imports(module) if name.split(".")[0] in (PACKAGE, "configs")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in own}


def short(module):
    return module.removeprefix(PACKAGE + ".")


PROGRAMS = ("main", "convert", "extract", "sample", "evaluate", "assess", "bench", "teach")
MODELS = [m for m in MODULES if m.startswith(PACKAGE + ".models.")]


def test_the_reader_of_imports_sees_all_kinds():
    source = """
import a.b, c as d
from e import f
def g():
    from h.i import j as k
    if True:
        import torch.nn
importlib.import_module("l.m")
"""
    assert imports_in(source, "x") == {"a.b", "c", "e.f", "h.i.j", "torch.nn", "l.m"}
    assert {f"{PACKAGE}.{m}" for m in ("main", "train", "step", "foresight")} <= set(MODULES)
    assert inside("mirai_jax.main") >= {"mirai_jax.training.train"}
    assert f"{PACKAGE}.models.generator" in MODELS
    for module in MODULES:
        assert inside(module) <= set(MODULES), module


def test_there_is_no_cycle():
    graph = {module: inside(module) - {PACKAGE} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names it


@pytest.mark.parametrize("module", MODULES)
def test_torch_and_tensorflow_are_imported_nowhere(module):
    banned = {"torch", "torchvision", "safetensors", "tensorflow", "tf_keras", "keras"}
    assert not outside(module) & banned
    # These parts of clu import TensorFlow.
    assert not {n for n in imports(module) if "metric_writers" in n or "periodic_actions" in n}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_a_program_and_only_main_imports_train(module):
    programs = {f"{PACKAGE}.{m}" for m in (*PROGRAMS, "train")}
    assert programs <= set(MODULES)
    expected = {f"{PACKAGE}.train"} if module == f"{PACKAGE}.main" else set()
    assert inside(module) & programs == expected


@pytest.mark.parametrize("module", MODELS)
def test_models_import_models_alone(module):
    assert {m for m in inside(module) if not m.startswith(f"{PACKAGE}.models")} == set()
    allowed = {"jax", "flax", "numpy", "collections", "dataclasses", "functools", "typing", "math"}
    assert outside(module) <= allowed  # no files, no data pipelines


def test_foresight_and_optimizer_import_next_to_nothing_of_the_project():
    allowed = {"jax", "flax", "numpy", "optax", "collections", "dataclasses", "typing"}
    for module in ("optimizer", "sharding", "models.linear"):
        assert inside(f"{PACKAGE}.{module}") == set(), module
    assert inside(f"{PACKAGE}.foresight") == {f"{PACKAGE}.models.linear"}  # its heads'
    assert outside(f"{PACKAGE}.foresight") <= allowed


def test_step_imports_models_foresight_and_optimizer_alone():
    allowed = {"models", "foresight", "optimizer"}
    allowed |= {f"models.{name}" for name in ("generator", "placement", "tokenizer")}
    assert {short(m) for m in inside(f"{PACKAGE}.step")} - {PACKAGE} <= allowed


def test_the_step_of_a_teacher_imports_models_and_optimizer_alone():
    own = {short(m) for m in inside(f"{PACKAGE}.teach_step")} - {PACKAGE}
    assert all(m.startswith("models") or m == "optimizer" for m in own)


# From files to batches: what runs in the data pipeline's own processes, which have no accelerator.
DATA = {
    "data": {"crops", "images", "records", "errors"},
    "image_streams": {"crops", "image_folders", "errors"},
    "records": {"manifest", "files", "errors"},
    "manifest": {"crops", "files", "errors"},
    "images": {"image_folders", "image_sets", "errors"},
    "image_folders": {"errors"},
    "image_sets": {"errors"},
    "crops": {"errors"},
    "files": set(),
    "errors": set(),
}


@pytest.mark.parametrize("module", DATA)
def test_data_knows_no_model_and_no_accelerator(module):
    assert {short(m) for m in inside(f"{PACKAGE}.{module}")} - {PACKAGE} <= DATA[module]
    assert DATA[module] <= DATA.keys()  # so that it holds for what they import in turn
    assert not outside(f"{PACKAGE}.{module}") & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("module", ["safetensors_file", "torch_file", "torch_writer"])
def test_file_formats_know_numpy_alone(module):
    allowed = {"safetensors_file", "torch_file", "files"}
    assert {short(m) for m in inside(f"{PACKAGE}.{module}")} - {PACKAGE} <= allowed
    assert outside(f"{PACKAGE}.{module}") - sys.stdlib_module_names <= {"numpy", "ml_dtypes"}


def test_names_of_parameters_know_models_alone():
    own = {short(m) for m in inside(f"{PACKAGE}.torch_names")} - {PACKAGE}
    assert all(m.startswith("models.") for m in own)


@pytest.mark.parametrize("module", ["sampler", "judge", "metrics"])
def test_sampling_and_evaluation_know_models_alone(module):
    own = {short(m) for m in inside(f"{PACKAGE}.{module}")} - {PACKAGE}
    assert all(m.startswith("models") or m == "errors" for m in own)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("configs")])
def test_configs_import_ml_collections_and_base_alone(module):
    assert outside(module) <= {"ml_collections"}
    assert inside(module) - {"configs"} <= {"configs.base"}


def test_the_package_never_imports_configs():
    for module in MODULES:
        if module.startswith(PACKAGE):
            assert not {m for m in inside(module) if m.startswith("configs")}, module


def test_every_program_is_known():
    started = {short(m) for m, file in MODULES.items() if "    cli.run(main" in file.read_text()}
    assert started == set(PROGRAMS)


def test_the_programs_load_neither_torch_nor_tensorflow():
    # Notes what is looked for and by whom: a machine without either shows an attempt as well.
    # tensorboardX is let off: it takes torch's arrays where torch is installed, and is fine without.
    program = """
import importlib, sys
asked = set()
class Watch:
    def find_spec(name, path=None, target=None):
        frame, by = sys._getframe(1), []
        while frame:
            by.append(frame.f_globals.get("__name__", "").split(".")[0])
            frame = frame.f_back
        by = [package for package in by if package not in ("importlib", "__main__")]
        asked.add((by[0] if by else "", name))
sys.meta_path.insert(0, Watch)
for name in sys.argv[1:]:  # their flags do not clash either
    importlib.import_module(f"mirai_jax.{name}")
assert ("mirai_jax", "mirai_jax.step") in asked
print(*(f"{by}:{name}" for by, name in asked if name in ("torch", "tensorflow", "keras")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *PROGRAMS],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"tensorboardX:torch"}
