"""Every command, config field, link and path in README.md, CONTRIBUTING.md and docs/ works.

Commands are read from blocks fenced with ```bash and from code spans. Flags are parsed and configs read as
the programs do; sweeps and launch scripts run dry. Words in capitals are placeholders.
"""

import configparser
import copy
import importlib
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from mirai_jax.config import fields, schema
from mirai_jax.config.flags import parse_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PLACEHOLDERS = {
    "HOST:PORT": "localhost:8476",
    "FOLDER": "/storage/folder",
    "NAME": "mirai",
    "ZONE": "us-west4-a",
    "FILE": "configs/mirai_e.py",
}
GENERATED = ("runs/", "codes/", "checkpoints/", "sampled/")  # of a user's own
SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """The code spans outside of fenced blocks."""
    return SPAN.findall(BLOCK.sub("", text))


def lines(block: str) -> list[str]:
    """The commands of a block: continued lines joined, chains taken apart, comments dropped."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\([^)]*\)", "runs/one", line), comments=True)
        if not words or words[0] in ("for", "do", "done"):
            continue
        found += shlex.join(words).replace("'&&'", "\n").split("\n")
    return [command.strip() for command in found]


def commands(text: str) -> list[str]:
    blocks = [
        command for kind, block in BLOCK.findall(text) if kind == "bash" for command in lines(block)
    ]
    started = [
        span for span in spans(text) if re.match(r"(python|sbatch|launch/\S+\.sh) \S+ ", span)
    ]
    return [*blocks, *(lines(span)[0] for span in started if not span.endswith("="))]


def all_commands() -> list:
    found = {command: page.name for page in PAGES for command in commands(page.read_text())}
    return [pytest.param(command, id=f"{page}: {command[:90]}") for command, page in found.items()]


def flags_of(module) -> dict[str, flags.Flag]:
    """The flags that a program defines: its own FlagValues, or its share of absl's."""
    for value in vars(module).values():
        if isinstance(value, flags.FlagValues):
            return {name: value[name] for name in value}
    of_module = flags.FLAGS.flags_by_module_dict().get(module.__name__, [])
    return {flag.name: flag for flag in of_module}


def check_config(program: str, overrides: list[str]) -> None:
    config = parse_config(overrides)
    room = {"teach": "teaching", "tokenize": "tokenizing"}.get(program)
    if room:
        importlib.import_module(f"mirai_jax.{room}.settings").read(config, 1)
        return
    if program in ("bench", "plan"):  # they need no files
        config.data.images = config.teacher.path = config.tokenizer.path = config.data.path = (
            "unused"
        )
    if config.scale == "folder":  # what follows from the images
        config.data.images = "unused"
        grid = tuple(pixels // config.tokenizer.patch for pixels in config.tokenizer.image_size)
        config.model.update(num_classes=8, grid=(grid[0], grid[-1]))
    devices = math.prod(size for size in config.mesh.values() if size > 0)
    settings = schema.read(config, devices)
    assert settings.data.in_memory or settings.data.online or settings.data.path, (
        "data.path is missing"
    )


def check_program(name: str, arguments: list[str]) -> None:
    """A program of the package: its flags, its config, the number of other arguments."""
    module = importlib.import_module(name)
    values = flags.FlagValues()
    for flag_name, flag in flags_of(module).items():
        if flag_name != "config":
            values[flag_name] = copy.deepcopy(flag)
    of_config = [a for a in arguments if re.match(r"--config[.=]", a)]
    rest = values(["", *(a for a in arguments if a not in of_config)])[1:]
    wanted = {"mirai_jax.convert": 2, "mirai_jax.report": max(1, len(rest))}.get(name, 0)
    assert len(rest) == wanted, f"not understood: {rest}"
    if of_config:
        assert "config" in flags_of(module), f"{name} takes no config"
        check_config(name.rpartition(".")[2], of_config)


def run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dry_sweep(arguments: list[str]) -> None:
    """Checks every run of a sweep, and starts none."""
    module = importlib.import_module("launch.sweep")
    values = next(value for value in vars(module).values() if isinstance(value, flags.FlagValues))
    before = flagsaver.save_flag_values(values)
    try:
        module.main(values(["sweep", *arguments]))
    finally:
        flagsaver.restore_flag_values(before, values)


def check_python(words: list[str], folder: pathlib.Path) -> None:
    module, *arguments = words
    if module == "venv":
        return
    if module == "pytest":
        for path in (a for a in arguments if a.endswith(".py")):
            assert (ROOT / path).is_file(), f"{path} does not exist"
    elif module == "launch.sweep":
        dry_sweep([*arguments, "--dry_run", f"--out={folder}"])
    else:
        check_program(module, arguments)


def check(command: str, folder: pathlib.Path) -> None:
    """Raises where the command could not be run as it is written."""
    for word, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{word}\b", value, command)
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program = pathlib.PurePath(words[0]).name
    if program == "mpirun":
        words = words[3:]
        program = words[0]
    if program.startswith("python"):
        if words[1] == "-m":
            check_python(words[2:], folder)
        else:
            assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\[(\w+)\]", command):
            assert extra in setup["options.extras_require"], f"there is no extra {extra}"
    elif program == "sbatch":
        run("bash", words[1], "--dry_run", *words[2:])
        check_program("mirai_jax.main", words[2:])
    elif program == "tpu_pod.sh":
        flags_end = words.index("--")
        run("bash", *words[:flags_end], "--dry_run", *words[flags_end:])
        check_program("mirai_jax.main", words[flags_end + 1 :])
    elif program == "bench_gpu.sh":  # with `echo` as its Python it prints what it would run
        printed = run(
            "bash", words[0], str(folder), *words[2:], PYTHON="echo", LLAMAGEN="", MIRAI=""
        )
        started = [line for line in printed.splitlines() if line.startswith("-m mirai_jax")]
        assert len(started) >= 4, printed
        for line in started:
            check_python(shlex.split(line)[1:], folder)
    elif program == "ruff":
        assert words[1] in ("check", "format")
    elif words[0].startswith("--config."):
        check_config("main", ["--config=configs/mirai_e.py", *words])
    else:
        raise AssertionError(f"unknown program {words[0]!r}")


@pytest.mark.parametrize("command", all_commands())
def test_command(command, tmp_path):
    check(command, tmp_path)


WRONG = (
    "python -m mirai_jax.main --config=configs/mirai_e.py --plans=3",
    "python -m mirai_jax.main --config=configs/mirai_e.py --config.model.depth=3",
    "python -m mirai_jax.main --config=configs/mirai_e.py --config.foresight[0].offsets=((0,9),)",
    "python -m mirai_jax.main --config=configs/mirai_e.py:imagenet_b",  # no data.path
    "python -m mirai_jax.main --config=configs/no_such.py",
    "python -m mirai_jax.main --config=configs/mirai_e.py extra",
    "python -m mirai_jax.no_such --config=configs/mirai_e.py",
    "python -m mirai_jax.sample --work_dir=RUN",
    "python -m launch.sweep --sweep=launch/sweeps/no_such.py",
    "python -m pytest tests/no_such_test.py",
    "pip install '.[gpu]'",
    "sbatch launch/slurm.sbatch --config=configs/mirai_e.py --workdirs=FOLDER",
    "--config.foresight[0].border=mask",
    "train --fast",
)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_does_not_pass(command, tmp_path):
    with pytest.raises((Exception, SystemExit)):
        check(command, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        there = (page.parent / path).resolve() if path else page
        missing += [] if there.exists() else [target]
        if heading and there.suffix == ".md" and there.exists():
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
            missing += [] if heading in anchors else [target]
    for span in spans(text):
        named = re.fullmatch(r"[\w./]+/[\w.]*\.(py|sh|sbatch|md|png|ipynb|json)|\w+/", span)
        if named and not span.startswith(GENERATED):
            near = (ROOT, ROOT / "mirai_jax", page.parent)
            missing += [] if any((folder / span).exists() for folder in near) else [span]
    assert not missing, f"{page.name}: {missing}"


def test_the_map_shows_every_room_and_door():
    tree = next(b for kind, b in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "text")
    package = ROOT / "mirai_jax"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {name for name in rooms if f"{name}/" not in tree} == set()
    top = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert {name for name in top if not re.search(rf"\b{name}\b", tree)} == set()
    for path in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / path).is_dir(), path
    for room in set(re.findall(r"(\w+)/", tree)) - set(re.findall(r"^(\w+)/", tree, re.MULTILINE)):
        assert (package / room).is_dir(), room


def field_exists(config, span: str) -> bool:
    node = config
    for key in re.sub(r"=.*", "", span).replace("[0]", ".0").split("."):
        try:
            node = node[int(key)] if key.isdigit() else node[key]
        except (LookupError, TypeError):
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_and_flags_in_the_text_exist(page):
    """`model.dtype`, `foresight[0].weights=(1,)`, `sample --guidance`, `--process_index`."""
    configs = [parse_config([f"--config=configs/{name}.py"]) for name in ("mirai_e", "tokenizer")]
    groups = {k for config in configs for k, v in config.items() if hasattr(v, "keys")}
    sections, wrong = "|".join(groups), []
    for span in spans(page.read_text()):
        if re.match(rf"({sections}|foresight\[0\])\.\w+(=|$)", span):
            wrong += [] if any(field_exists(config, span) for config in configs) else [span]
        elif re.match(r"[a-z]\w*=", span):
            field = span.split("=")[0]
            wrong += [] if any(field_exists(config, field) for config in configs) else [span]
        elif match := re.fullmatch(r"(\w+)((?: --\w+)+)", span):
            known = flags_of(importlib.import_module(f"mirai_jax.{match[1]}"))
            wrong += [flag for flag in match[2].split() if flag.removeprefix("--") not in known]
    assert not wrong, f"{page.name}: {wrong}"


def test_every_field_that_may_change_is_listed():
    text = (ROOT / "docs" / "faults.md").read_text().split("These fields may change:")[1]
    listed = spans(text.split("## ")[0])
    assert sorted(listed) == sorted(fields.resumable(schema.RunConfig))


def test_the_readme_is_short_and_has_its_test_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    command = re.search(r"^<!-- test command -->\n```bash\n(.*)\n```$", text, re.MULTILINE)
    assert command and "pytest" in command[1]


@pytest.mark.slow  # minutes: runs of the demo, four steps each
@pytest.mark.parametrize("name", ["llamagen", "mirai_e", "mirai_i", "mirai_e_i", "llamagen_repa"])
def test_the_quickstart_runs(name, tmp_path):
    command = f"python -m mirai_jax.main --config=configs/{name}.py"
    assert f"configs/{name}.py" in (ROOT / "README.md").read_text()
    short = [
        "--config.num_steps=4",
        "--config.optimizer.warmup_steps=1",
        "--config.judged_samples=0",
    ]
    run(sys.executable, *command.split()[1:], *short, f"--workdir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "summary.png").exists()
