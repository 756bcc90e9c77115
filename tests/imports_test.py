"""The table of rooms: what each part of the project may import. Imports run one way, up this table."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

METHOD = ("foresight", "step", "optimizer", "sharding")  # the paper; on top of mirai_jax/
TRAINING = "weights sampling data config method models utils"
ROOMS = {  # a room: which other rooms its files may import
    "utils": "",  # errors, files, command lines, several processes
    "models": "utils",  # networks: no file format, no PyTorch name
    "method": "models",
    "sampling": "method models utils",
    "config": "sampling method models utils",
    "data": "utils",  # files to batches
    "weights": "config models utils",  # parameters from elsewhere, frozen networks made of them
    "training": TRAINING,
    "extraction": "weights data models utils",
    "evaluation": f"training {TRAINING}",
    "benchmark": f"training {TRAINING}",
    "teaching": f"training {TRAINING}",  # an encoder of the user's own
    "tokenizing": f"evaluation training {TRAINING}",  # a tokenizer of the user's own
    "reporting": "utils",  # the page of runs: no JAX
    "doors": f"reporting extraction evaluation benchmark teaching tokenizing training {TRAINING}",  # never each other
    "configs": "",  # one file a variant
    "launch": "configs training config models utils",
}
PACKAGES = {  # the only packages beyond Python's own that files of these rooms may import
    "models": "jax flax numpy",
    "method": "jax flax numpy optax absl",
    "configs": "ml_collections",
}
NEVER = "torch torchvision tensorflow tf_keras keras clu.metric_writers clu.periodic_actions"
# Slow to import, or optional.
INSIDE_FUNCTIONS = (
    "matplotlib sklearn tensorflow_datasets submitit pyarrow huggingface_hub wandb fsspec gcsfs s3fs "
    "plotly aiohttp"
)
LONGEST_FILE, FILES_ON_TOP = 400, 16

PROJECT = ("mirai_jax", "configs", "launch")
FILES = [file for top in PROJECT for file in sorted((ROOT / top).rglob("*.py"))]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in FILES
}


def room(module):
    top, *rest = module.split(".")
    if top != "mirai_jax":
        return top
    if len(rest) == 1 and MODULES[module].name != "__init__.py":
        return "method" if rest[0] in METHOD else "doors"
    return rest[0] if rest else "mirai_jax"


def imports(source):
    """{dotted name: whether it is imported at the top}; `from a import b` is 'a.b'."""
    found = {}

    def visit(node, top):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        for name in names:
            found[name] = found.get(name, False) or top
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.Lambda))

    visit(ast.parse(source), True)
    return found


IMPORTS = {module: imports(file.read_text()) for module, file in MODULES.items()}
INSIDE = {
    module: {
        name if name in MODULES else name.rpartition(".")[0]
        for name in found
        if name.split(".")[0] in PROJECT
    }
    - {"mirai_jax", "configs", "launch"}
    for module, found in IMPORTS.items()
}


def is_of(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages.split())


def test_the_reader_of_imports():
    source = """
import a.b, c as d
from e import f
if True:
    def g():
        from h.i import j as k
        importlib.import_module("l.m")
"""
    top, inside = ["a.b", "c", "e.f"], ["h.i.j", "l.m"]
    assert imports(source) == dict.fromkeys(top, True) | dict.fromkeys(inside, False)
    assert INSIDE["mirai_jax.step"] >= {"mirai_jax.foresight", "mirai_jax.models.generator"}


def test_the_table_runs_one_way():
    above = []
    for name, allowed in ROOMS.items():
        assert set(allowed.split()) <= set(above) - {"doors"}, name
        above.append(name)
    assert {room(module) for module in MODULES} - {"mirai_jax"} <= ROOMS.keys()


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_the_table_allows(name):
    allowed = {*ROOMS[name].split(), name} - {"doors"}
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in sorted(INSIDE[module])
        if room(module) == name and (other not in MODULES or room(other) not in allowed)
    ]
    assert not wrong


def test_no_module_is_in_a_cycle():
    list(graphlib.TopologicalSorter(INSIDE).static_order())  # raises CycleError, which names it


def test_packages():
    wrong = []
    for module, found in IMPORTS.items():
        allowed = {*PROJECT, *sys.stdlib_module_names, *PACKAGES.get(room(module), "").split()}
        for name, at_the_top in found.items():
            other = room(module) in PACKAGES and name.split(".")[0] not in allowed
            if other or is_of(name, NEVER) or (at_the_top and is_of(name, INSIDE_FUNCTIONS)):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_data_needs_no_jax():
    """Its worker processes have no accelerator."""
    needed = {module for module in MODULES if room(module) == "data"}
    while more := set().union(*(INSIDE[module] for module in needed)) - needed:
        needed |= more
    wrong = [m for m in needed if any(is_of(name, "jax flax optax orbax") for name in IMPORTS[m])]
    assert not wrong


def test_files_are_short_and_few_lie_on_top():
    assert len(list((ROOT / "mirai_jax").glob("*.py"))) <= FILES_ON_TOP
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (ROOT / "mirai_jax").rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_the_doors_open_without_optional_packages():
    """As if none of them were installed; and the flags of the doors do not clash."""
    program = """
import importlib, sys
absent, *modules = sys.argv[1:]
sys.modules |= dict.fromkeys(absent.split())  # importing them fails
for name in modules:
    importlib.import_module(name)
"""
    doors = [module for module in MODULES if room(module) == "doors"]
    assert {"mirai_jax.main", "mirai_jax.sample"} <= set(doors)
    done = subprocess.run(
        [sys.executable, "-c", program, f"{NEVER} {INSIDE_FUNCTIONS}", *doors],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
