"""The launchers, with gcloud and SLURM played by small programs that are found first on the PATH.

What the launchers send to other machines really runs, in folders that stand for these; only the
installation and the training program are played too.
"""

import collections
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parents[1]
TPU, SLURM = ROOT / "launch" / "tpu_pod.sh", ROOT / "launch" / "slurm.sbatch"
SLICE = ["--name=pod", "--zone=us-west4-a", "--workdir=/mnt/runs/one"]
CONFIG = "--config=configs/mirai_e.py:imagenet_b"
# What a shell could do something to.
HARD = [
    "--config.foresight[0].offsets=((0, 0), (0, 1))",
    '--config.name=it\'s  "two"\tor *',
    "--config.data.path=$HOME/`a b`;\\n & ~",
    "",
    "two\nlines",
]

# Cloud TPU: a slice is a folder with a state and one home a worker. Plays, beside gcloud itself,
# what of ssh is told in gcloud's source: the command is taken apart at spaces and joined again, a
# broken connection is tried again, the first status that is not 0 counts, 1 if the slice is gone.
GCLOUD = """
import concurrent.futures, json, os, pathlib, shutil, signal, subprocess, sys, time
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
world = pathlib.Path(os.environ["WORLD"])
plan = json.loads((world / "plan.json").read_text())
slice, state = world / "slice", world / "slice" / "state"
argv = sys.argv[1:]
with (world / "calls").open("a") as file:
    file.write(json.dumps(argv) + "\\n")
assert argv[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=us-west4-a" in argv, argv
verb, flags = argv[3], dict(a[2:].split("=", 1) for a in argv[4:] if "=" in a)
if verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'pod' was not found")
    print(state.read_text())
elif verb == "create":
    tries = world / "tries"
    tries.write_text(tries.read_text() + "." if tries.exists() else ".")
    if len(tries.read_text()) <= plan.get("no_capacity", 0):
        sys.exit("ERROR: There is no more capacity in the zone")
    for i in range(plan.get("workers", 2)):
        (slice / f"worker{i}").mkdir(parents=True)
    state.write_text("READY")
elif verb == "delete":
    shutil.rmtree(slice)
elif state.read_text() != "READY":
    sys.exit("ERROR: This TPU has terminal state")
elif verb == "scp":
    *sources, target = [a for a in argv[4:] if not a.startswith("--")]
    assert target == "pod:" and flags["worker"] == "all"
    for home in slice.glob("worker*"):
        for source in sources:
            shutil.copy(source, home)
elif verb == "ssh":
    assert flags["worker"] == "all" and flags["ssh-flag"] == "-o ServerAliveInterval=30"
    # A login shell is given these words, joined.
    command = " ".join(flags["command"].split(" "))
    def on(home):
        for attempt in range(10):
            env = {"HOME": str(home), "PATH": f"{world / 'worker_bin'}:/usr/bin:/bin",
                   "WORLD": str(world), "USER": "me"}
            begun = subprocess.Popen(["bash", "-c", command], env=env, cwd=home,
                                     stdin=subprocess.DEVNULL, start_new_session=True)
            drop = world / "drop"  # a connection that breaks once
            while begun.poll() is None:
                if drop.exists() and "worker_run" in command:
                    drop.unlink()
                    os.killpg(begun.pid, 9)
                    begun.wait()
                    if plan.get("retry", True):
                        break
                    return 255
                time.sleep(0.02)
            if begun.returncode != -9:
                return begun.returncode
        return 255
    homes = sorted(slice.glob("worker*"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        statuses = list(pool.map(on, homes))
    sys.exit(next((s for s in statuses if s), 0) if state.exists() else 255)
else:
    sys.exit(f"no such verb: {verb}")
"""

# Stands for uv: "installs" the program below as the environment's Python.
UV = """
import os, pathlib, shutil, sys
world, venv = pathlib.Path(os.environ["WORLD"]), pathlib.Path("venv/bin")
if sys.argv[1] == "venv":
    venv.mkdir(parents=True)
else:
    assert pathlib.Path("code/mirai_jax/main.py").exists() and sys.argv[-1] == "./code[tpu]"
    shutil.copy(world / "program", venv / "python")
"""

# Stands for the training program: the plan names what each worker does at its k-th start: end with
# a status, be preempted with its slice ('preempted'), wait for SIGTERM and save ('wait'), or hang.
PROGRAM = """
import json, os, pathlib, signal, sys, time
world, home = pathlib.Path(os.environ["WORLD"]), pathlib.Path.home()
plan = json.loads((world / "plan.json").read_text())
index = int(home.name.removeprefix("worker"))
with (world / f"starts{index}").open("a+") as file:
    file.seek(0)
    k = len(file.readlines())
    file.write(json.dumps([*sys.argv[1:], os.getcwd()]) + "\\n")
what = plan["programs"][k][index]
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "hang" else save)
print(f"start {k} of worker {index}", flush=True)
if plan.get("progress"):
    print(f"step {9 + k:>5}/99999  loss 0.1", flush=True)
if what == "preempted":
    (home.parent / "state").write_text("PREEMPTED")
    sys.exit(75)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
while what in ("wait", "hang"):
    time.sleep(0.02)
    if (world / "go").exists():
        what = 0
sys.exit(what)
"""
# A second takes 0.01 of one; what is waited for between two attempts takes none, and is written down.
SLEEP = """
if [ "$1" -lt 10 ]; then exec /usr/bin/sleep "0.0$1"; fi
echo "$1" >> "$WORLD/sleeps"
"""


def executable(path, text, interpreter=f"{sys.executable} -IS"):  # which starts sooner
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)


class World:
    """Cloud TPU and this computer, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        executable(folder / "bin" / "gcloud", GCLOUD)
        for side in ("bin", "worker_bin"):
            executable(folder / side / "sleep", SLEEP, "/bin/sh")
        executable(folder / "worker_bin" / "uv", UV)
        executable(folder / "program", PROGRAM)
        # A repository of its own: what is copied is the last commit.
        repository = folder / "repository"
        (repository / "launch").mkdir(parents=True)
        (repository / "mirai_jax").mkdir()
        (repository / "mirai_jax" / "main.py").write_text("")
        (repository / ".gitignore").write_text("runs/\n")
        shutil.copy(TPU, repository / "launch")
        git = ["git", "-C", str(repository), "-c", "user.name=me", "-c", "user.email=me"]
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *arguments], check=True)
        self.launcher = repository / "launch" / "tpu_pod.sh"

    def plan(self, *programs, **more):
        workers = len(programs[0]) if programs else 2
        plan = {"programs": programs, "workers": workers, **more}
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def make_slice(self, workers=2, state="READY"):
        for i in range(workers):
            (self.folder / "slice" / f"worker{i}").mkdir(parents=True)
        (self.folder / "slice" / "state").write_text(state)

    def begin(self, *arguments):
        env = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "WORLD": str(self.folder),
        }
        return subprocess.Popen(
            [self.launcher, *arguments],
            env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def launch(self, *arguments):
        process = self.begin(*arguments)
        out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self):
        """In words: 'create', 'scp', 'worker_run', ..."""
        calls = [json.loads(line) for line in self.lines("calls")]
        words = []
        for call in calls:
            command = next((a for a in call if a.startswith("--command=")), "")
            words.append(command.split(" ")[2] if command else call[3])
        return [word for word in words if word != "describe"]

    def starts(self, worker):
        return [json.loads(line) for line in self.lines(f"starts{worker}")]

    def wait_for(self, condition):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C reaches what is started here, also where the tests run in the background, without it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.plan()
    yield world
    # Whatever of a failed test still runs on the "workers".
    for file in tmp_path.glob("slice/worker*/mirai-jax/run/*/group"):
        if not (file.parent / "status").exists():
            subprocess.run(["kill", "-KILL", "--", f"-{file.read_text().strip()}"], check=False)


PREPARED = ["scp", "worker_claim", "worker_install"]
AGAIN = ["scp", "worker_clear", "worker_install"]


def test_preempted_slice_is_made_again(world):
    world.plan([75, "preempted"], [0, 0], no_capacity=1)
    result = world.launch(
        *SLICE, "--project=mine", "--create", "--spot", "--type=v6e-16", "--", CONFIG, *HARD
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert world.calls == [
        "create", "create", *PREPARED, "worker_run", "delete", "create", *AGAIN, "worker_run",
    ]  # fmt: skip
    creation = next(c for c in map(json.loads, world.lines("calls")) if c[3] == "create")
    assert creation[4] == "pod" and set(creation[5:]) == {
        "--zone=us-west4-a", "--project=mine", "--quiet", "--accelerator-type=v6e-16",
        "--version=v2-alpha-tpuv6e", "--spot",
    }  # fmt: skip
    # Every argument arrived as it was given, through the shells of two machines.
    for i in range(2):
        given = [
            "-m",
            "mirai_jax.main",
            "--distributed=on",
            "--workdir=/mnt/runs/one",
            CONFIG,
            *HARD,
        ]
        code = str(world.folder / "slice" / f"worker{i}" / "mirai-jax" / "code")
        assert world.starts(i) == 2 * [[*given, code]]
    logs = sorted((world.folder / "repository" / "runs" / "launch" / "pod").iterdir())
    assert [log.suffixes for log in logs] == [[".1", ".log"], [".2", ".log"]]
    assert "start 0 of worker 1" in logs[0].read_text() and "start 0 of" in result.stdout
    assert "start 1 of worker 0" in logs[1].read_text()


def test_without_create_a_preempted_slice_is_left_alone(world):
    for state in ("PREEMPTED", None):
        if state:
            world.make_slice(state=state)
        else:
            shutil.rmtree(world.folder / "slice")
        result = world.launch(*SLICE, "--", CONFIG)
        assert result.returncode == 1 and world.calls == []
        assert f"is {state or 'MISSING'}; with --create" in result.stderr


def test_lost_hosts_are_started_again_and_what_hangs_is_ended(world):
    world.make_slice(3)
    world.plan([76, 134, "killed"], [76, "hang", 76], [0, 0, 0])
    result = world.launch(*SLICE, "--", CONFIG)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [len(world.starts(i)) for i in range(3)] == [3, 3, 3]
    assert "ended with status 76 and 134 and 137: trying again in 10 s" in result.stdout
    assert "ended with status 76: trying again in 20 s" in result.stdout


@pytest.mark.parametrize("statuses", [[76, 1], [137, 2]])
def test_an_error_to_mend_ends_it(world, statuses):
    """Also where gcloud tells the other worker's status."""
    world.make_slice()
    world.plan(statuses)
    result = world.launch(*SLICE, "--", CONFIG)
    assert result.returncode == statuses[1]
    assert f"the program ended with status {statuses[1]}" in result.stderr
    assert world.calls == [*PREPARED, "worker_run"]


@pytest.mark.parametrize("retry", [True, False])
def test_a_broken_connection_is_no_end(world, retry):
    """The program goes on and is followed again, whether gcloud tries that itself or gives up."""
    world.make_slice(1)
    world.plan(["wait"], retry=retry)
    process = world.begin(*SLICE, "--", CONFIG)
    world.wait_for(lambda: world.starts(0))
    (world.folder / "drop").touch()
    world.wait_for(lambda: not (world.folder / "drop").exists())
    (world.folder / "go").touch()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, out + errors
    assert len(world.starts(0)) == 1
    assert world.calls == [*PREPARED, "worker_run"] + ([] if retry else ["worker_run"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_on_all_hosts(world, number):
    world.make_slice()
    world.plan(["wait", "wait"])
    process = world.begin(*SLICE, "--", CONFIG)
    world.wait_for(lambda: world.starts(0) and world.starts(1))
    if number == signal.SIGINT:  # a terminal tells all of its processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, out + errors
    assert out.count("saved\n") == 2 and "the same command goes on" in out
    assert "Killed" not in out
    assert world.calls == [*PREPARED, "worker_run", "worker_stop"]


def test_a_second_signal_ends_the_launcher_alone(world):
    world.make_slice(1)
    world.plan(["hang"])
    process = world.begin(*SLICE, "--", CONFIG)
    world.wait_for(lambda: world.starts(0))
    os.killpg(process.pid, signal.SIGINT)
    world.wait_for(lambda: "worker_stop" in world.calls)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_the_same_command_takes_over_and_another_is_refused(world):
    world.make_slice()
    world.plan(["wait", "wait"], [0, 0])
    first = world.begin(*SLICE, "--", CONFIG)
    world.wait_for(lambda: world.starts(0) and world.starts(1))
    other = world.launch(*SLICE, "--", CONFIG, "--config.seed=1")
    assert other.returncode == 1
    assert "busy with another command" in other.stderr and CONFIG in other.stdout
    assert first.poll() is None
    second = world.launch(*SLICE, "--", CONFIG)
    assert second.returncode == 0, second.stdout + second.stderr
    out, errors = first.communicate(timeout=60)
    assert first.returncode == 1 and "another launcher has taken pod over" in errors
    assert "saved" in out and [len(world.starts(i)) for i in range(2)] == [2, 2]


def test_a_bucket_is_mounted_once(world):
    """And gcsfuse installed, where it is not there."""
    world.make_slice(1)
    world.plan([76], [0])
    mounted = world.folder / "mounted here"
    for name, text in {
        "sudo": 'exec "$@"',
        "mountpoint": 'test -e "$2/mark"',
        "fusermount": "exit 1",
        "curl": 'touch "$3"',
        "apt-get": 'echo "$@" >> "$WORLD/apt"; mv "$WORLD/worker_bin/-gcsfuse" "$WORLD/worker_bin/gcsfuse"',
        "-gcsfuse": 'echo "$@" >> "$WORLD/mounts"; touch "$5/mark"',
    }.items():
        executable(world.folder / "worker_bin" / name, text, "/bin/sh")
    result = world.launch(*SLICE, f"--mount=my-bucket:{mounted}", "--", CONFIG)
    assert result.returncode == 0, result.stdout + result.stderr
    assert world.calls == [
        *PREPARED, "worker_mount", "worker_run", *AGAIN, "worker_mount", "worker_run",
    ]  # fmt: skip
    (mount,) = world.lines("mounts")
    assert mount.endswith(f" my-bucket {mounted}") and "--rename-dir-limit" in mount
    assert len(world.lines("apt")) == 1 and "/tmp/gcsfuse.deb" in world.lines("apt")[0]


@pytest.mark.parametrize("progress", [False, True])
def test_restarts_without_progress_are_limited(world, progress):
    world.make_slice(1)
    world.plan([76], [76], [0], progress=progress)
    result = world.launch(*SLICE, "--max_restarts=1", "--", CONFIG)
    if progress:
        assert result.returncode == 0 and world.lines("sleeps") == ["10", "10"]
    else:
        assert "after 1 restarts that got no further than step 0" in result.stderr
        assert result.returncode == 1 and len(world.starts(0)) == 2


def test_what_cannot_be_installed_is_told_at_once(world):
    world.make_slice(1)
    executable(world.folder / "worker_bin" / "uv", "raise SystemExit('no uv today')")
    result = world.launch(*SLICE, "--", CONFIG)
    assert result.returncode == 1 and "cannot be prepared; see above" in result.stderr
    assert "no uv today" in result.stderr and world.lines("sleeps") == []


def test_dry_run_prints_what_would_be_run_and_runs_nothing(world):
    result = world.launch(
        *SLICE, "--mount=bucket:/mnt", "--create", "--dry_run", "--", CONFIG, *HARD[:1]
    )
    assert result.returncode == 0 and world.lines("calls") == []
    assert not (world.folder / "repository" / "runs").exists()
    lines = [shlex.split(line) for line in result.stdout.splitlines() if line[0] != "#"]
    words = [line[3] if line[0] == "git" else line[4] for line in lines if line[0] != "cp"]
    assert words == ["describe", "create", "archive", "scp", *5 * ["ssh"], "delete"]
    commands = [line[-1].split(" ")[2:] for line in lines if "ssh" in line]
    assert [command[0].removeprefix("worker_") for command in commands] == [
        "claim", "install", "mount", "run", "stop",
    ]  # fmt: skip
    assert commands[2] == ["worker_mount", "bucket", "/mnt"]


@settings(max_examples=15, deadline=None)
@given(
    arguments=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=9)
)
def test_any_argument_passes_the_shells(arguments):
    arguments = [a for a in arguments if not a.startswith(("--config=", "--workdir="))]
    command = [TPU, *SLICE, "--dry_run", "--", CONFIG, *arguments]
    printed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    line = printed[printed.rindex("gcloud", 0, printed.index("# to stop it")) :]
    line = line[: line.index("\n# to stop it")]
    gcloud = shlex.split(line)
    # As ssh gives it to a shell there.
    there = gcloud[-1].removeprefix("--command=").replace("bash ", "printf '%s\\0' ", 1)
    words = subprocess.run(["bash", "-c", there], capture_output=True, check=True).stdout
    assert words.decode().split("\0")[-1 - len(arguments) : -1] == arguments


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([*SLICE, "--pod=3", "--", CONFIG], "'--pod=3' is not understood"),
        ([*SLICE, CONFIG], "go after --"),
        ([*SLICE[1:], "--", CONFIG], "--name is ''"),
        (["--name=Pod 1", *SLICE[1:], "--", CONFIG], "--name is 'Pod 1'"),
        ([SLICE[0], SLICE[2], "--", CONFIG], "--zone is missing"),
        ([*SLICE[:2], "--workdir=runs/x", "--", CONFIG], "--workdir is 'runs/x'"),
        ([*SLICE, "--", CONFIG, "--workdir=/other"], "--workdir is given twice"),
        ([*SLICE, "--mount=bucket", "--", CONFIG], "--mount is 'bucket'"),
        ([*SLICE, "--max_restarts=few", "--", CONFIG], "--max_restarts is 'few'"),
        ([*SLICE, "--spot", "--", CONFIG], "without --create"),
        ([*SLICE, "--", "--config.seed=3"], "--config is missing"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(world, arguments, expected):
    result = world.launch(*arguments)
    assert result.returncode == 2 and world.lines("calls") == []
    assert expected in result.stderr and len(result.stderr.splitlines()) == 1


def test_help_names_every_flag(world):
    result = world.launch("--help")
    assert result.returncode == 0 and "#" not in result.stdout
    known = [line.split("=*)")[0].strip() for line in TPU.read_text().splitlines() if "=*)" in line]
    assert len(known) > 6 and all(flag + "=" in result.stdout for flag in known)


# SLURM --------------------------------------------------------------------------------------------

# srun with a few tasks: its status is the highest of theirs.
SRUN = """
import json, os, pathlib, signal, subprocess, sys
world = pathlib.Path(os.environ["WORLD"])
(world / "srun").write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i)}, start_new_session=True)
         for i in range(len(os.environ["STATUSES"].split()))]
(world / "tasks").write_text(" ".join(str(t.pid) for t in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, pathlib, sys
with (pathlib.Path(os.environ["WORLD"]) / "scontrol").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""
TASK = """
import json, os, pathlib, signal, sys, time
world, index = pathlib.Path(os.environ["WORLD"]), int(os.environ["SLURM_PROCID"])
(world / f"task{index}").write_text(json.dumps(sys.argv[1:]))
status = os.environ["STATUSES"].split()[index]
if status == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (world / f"ready{index}").touch()
    while True:
        time.sleep(0.02)
if int(status) > 128:
    os.kill(os.getpid(), int(status) - 128)
sys.exit(int(status))
"""


def slurm(folder, *arguments, statuses="0", job="7", **more):
    executable(folder / "bin" / "srun", SRUN)
    executable(folder / "bin" / "scontrol", SCONTROL)
    executable(folder / "python", TASK)
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "WORLD": str(folder), "STATUSES": statuses,
        "PYTHON": str(folder / "python"), **more,
    }  # fmt: skip
    if job:
        env |= {"SLURM_JOB_ID": job, "SLURM_CPUS_PER_TASK": "6"}
    return subprocess.Popen(
        ["bash", SLURM, *arguments],
        env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


Done = collections.namedtuple("Done", "status out errors requeued")


def end(folder, process):
    out, errors = process.communicate(timeout=60)
    calls = folder / "scontrol"
    return Done(process.returncode, out, errors, calls.exists() and calls.read_text())


@pytest.mark.parametrize(
    "statuses, status, requeued",
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("76 137", 137, True),
        ("134 76", 134, True),
        ("1 1", 1, False),
        # One process met an error to mend, the others only miss it.
        ("1 76", 1, False),
        ("137 1 134", 1, False),
        ("2 0", 2, False),
        ("75 127", 1, False),
    ],
)
def test_slurm_status_and_requeue(tmp_path, statuses, status, requeued):
    process = slurm(tmp_path, CONFIG, *HARD, statuses=statuses)
    done = end(tmp_path, process)
    assert done.status == status, done
    assert done.requeued == ("requeue 7\n" if requeued else False)
    for i in range(len(statuses.split())):
        given = json.loads((tmp_path / f"task{i}").read_text())
        assert given == ["-m", "mirai_jax.main", CONFIG, *HARD]
    flags = json.loads((tmp_path / "srun").read_text())
    assert "--cpus-per-task=6" in flags and "--kill-on-bad-exit=0" in flags


@pytest.mark.parametrize("whole_job", [False, True])
def test_slurm_sigterm(tmp_path, whole_job):
    """--signal reaches the tasks with their shells; scancel this script too, which then ends it."""
    process = slurm(tmp_path, CONFIG, statuses="wait wait")
    end_time = time.monotonic() + 30
    while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
        assert time.monotonic() < end_time
        time.sleep(0.02)
    if whole_job:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    for pid in (tmp_path / "tasks").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    done = end(tmp_path, process)
    assert done.status == 75, done
    assert done.requeued == (False if whole_job else "requeue 7\n")


def test_slurm_requeues_up_to_a_limit(tmp_path):
    counts = {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    done = end(tmp_path, slurm(tmp_path, CONFIG, statuses="76", **counts))
    assert done.status == 76 and done.requeued is False and "after 3 restarts" in done.errors


def test_outside_of_slurm(tmp_path):
    done = end(tmp_path, slurm(tmp_path, CONFIG, job=None))
    assert done.status == 1 and "no SLURM job" in done.errors and len(done.errors.splitlines()) == 1
    done = end(tmp_path, slurm(tmp_path, "--dry_run", CONFIG, *HARD, job=None))
    assert done.status == 0 and not (tmp_path / "srun").exists()
    # What is printed is a command: bash reads it as the one that would be run.
    command = done.out[: done.out.index("\n# after")].replace("srun", "printf '%s\\0'", 1)
    words = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert words.decode().split("\0")[-len(HARD) - 2 : -1] == [CONFIG, *HARD]


def test_slurm_directives_come_before_any_command():
    lines = SLURM.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines[:first] if line.startswith("#SBATCH --")]
    assert len(directives) == sum("#SBATCH" in line for line in lines)
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue"} <= set(directives)


@pytest.mark.parametrize("script", [TPU, SLURM, ROOT / "launch" / "bench_gpu.sh"])
def test_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "shellcheck disable" not in script.read_text()
