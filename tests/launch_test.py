"""The shell launchers, with small programs in place of gcloud, uv, srun and the training program.

The commands for the workers of a TPU VM really run, in a folder for each worker.
"""

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

ROOT = pathlib.Path(__file__).parents[1]
TPU, SLURM = ROOT / "launch" / "tpu_pod.sh", ROOT / "launch" / "slurm.sbatch"
SLICE = ["--name=pod", "--zone=us-west4-a", "--workdir=/mnt/runs/one"]
CONFIG = "--config=configs/mirai_e.py:imagenet_b"
HARD = ['--config.name=it\'s  "é"\tor *', "--config.data.path=$HOME/`a b`;\\n & ~", "", "a\nb"]

# A slice is a folder with a state and a home for each worker; a connection breaks where `drop` is.
GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys, time
world = pathlib.Path(os.environ["WORLD"])
pod, verb = world / "pod", sys.argv[4]
arguments = [a for a in sys.argv[5:] if not a.startswith("--")]
command = next((a.removeprefix("--command=") for a in sys.argv if a.startswith("--command=")), "")
with (world / "calls").open("a") as file:
    file.write((command.split()[2] if command else verb) + "\\n")
slices = sys.argv[3] == "queued-resources"
assert sys.argv[1:3] == ["compute", "tpus"] and (slices or sys.argv[3] == "tpu-vm")
assert "--zone=us-west4-a" in sys.argv
for flag in ("--node=all", "--batch-size=all"):
    assert (flag in sys.argv) == (slices and verb in ("scp", "ssh"))
if verb == "describe":
    assert ("--format=value(state.state)" in sys.argv) == slices
    print((pod / "state").read_text() if pod.exists() else sys.exit("NOT_FOUND: no pod"))
elif verb == "create":
    version = ["--version=v2-alpha-tpuv6e"]
    if slices:
        version = ["--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=pod"]
    assert {"--accelerator-type=v6e-16", *version} <= set(sys.argv)
    if (world / "calls").read_text().count("create") == 1:
        sys.exit("ERROR: There is no more capacity")
    for i in range(2):
        (pod / str(i)).mkdir(parents=True)
    (pod / "state").write_text("ACTIVE" if slices else "READY")
elif verb == "delete":
    assert ("--force" in sys.argv) == slices
    shutil.rmtree(pod)
elif verb == "scp":
    assert arguments[-1] == "pod:" and "--worker=all" in sys.argv
    for home in (pod / "0", pod / "1"):
        for source in arguments[:-1]:
            shutil.copy(source, home)
else:
    assert verb == "ssh" and "--worker=all" in sys.argv
    shells = [subprocess.Popen(["bash", "-c", command], cwd=pod / i, start_new_session=True,
                               env={**os.environ, "HOME": str(pod / i)}) for i in "01"]
    while any(shell.poll() is None for shell in shells):
        time.sleep(0.02)
        if "worker_run" in command and (world / "drop").exists():
            (world / "drop").unlink()
            [os.killpg(shell.pid, 9) for shell in shells]
            sys.exit(255)
    sys.exit(next((shell.returncode for shell in shells if shell.returncode), 0))
"""
UV = '[ "$1" = venv ] && mkdir -p venv/bin || cp "$WORLD/program" venv/bin/python'
# plan["ends"] has the end of each start on a worker: a status, 'preempted', 'wait' (for SIGTERM).
PROGRAM = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
world, home = pathlib.Path(os.environ["WORLD"]), pathlib.Path.home()
starts = world / f"starts{home.name}"
k = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
(world / f"set{home.name}").write_text(os.environ.get("ODD", "") + os.environ.get("TWO", ""))
plan = json.loads((world / "plan").read_text())
end = plan["ends"][k][int(home.name)]
if plan["progress"]:
    print(f"step {9 + k:>5}/99999  loss 0.1", flush=True)
if end == "preempted":
    (home.parent / "state").write_text("PREEMPTED")
    end = 75
while end == "wait":
    time.sleep(0.02)
    end = 0 if (world / "finish").exists() else end
sys.exit(end)
"""
PREPARED = ["scp", "worker_setup", "worker_run"]


def executable(path, text, interpreter=f"{sys.executable} -IS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class World:
    """Cloud TPU and this computer, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        for i in "01":
            (folder / "pod" / i).mkdir(parents=True)
        (folder / "pod" / "state").write_text("READY")
        executable(folder / "bin" / "gcloud", GCLOUD)
        executable(folder / "program", PROGRAM)
        executable(folder / "bin" / "uv", UV, "/bin/sh")
        executable(folder / "bin" / "sleep", 'exec /usr/bin/sleep "0.0$1"', "/bin/sh")
        (folder / "repository" / "launch").mkdir(parents=True)
        shutil.copy(TPU, folder / "repository" / "launch")
        git = "git -c user.name=me -c user.email=me"
        script = f"git init -q && git add . && {git} commit -q -m all"
        subprocess.run(script, shell=True, check=True, cwd=folder / "repository")

    def begin(self, *arguments, ends=(), progress=False):
        if ends:
            (self.folder / "plan").write_text(json.dumps({"ends": ends, "progress": progress}))
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.Popen(
            [self.folder / "repository" / "launch" / "tpu_pod.sh", *arguments], cwd=self.folder,
            env={**os.environ, "PATH": path, "WORLD": str(self.folder)}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def launch(self, *arguments, **plan):
        return end(self.begin(*arguments, **plan))

    def started(self):
        return self.lines("starts0") and self.lines("starts1")

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self):
        return [call for call in self.lines("calls") if call != "describe"]


def end(process):
    """The status, and what was printed."""
    out, errors = process.communicate(timeout=300)  # of a busy machine
    return process.returncode, out + errors


@pytest.fixture
def world(tmp_path):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    yield World(tmp_path)
    (tmp_path / "finish").touch()
    signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize(
    "ends, progress, status, starts",
    [
        ([[0, 0]], True, 0, 1),
        ([[76, 1]], True, 1, 1),
        ([[75, 75], [76, 134], [0, 0]], True, 0, 3),
        ([[75, 75], [76, 134], [0, 0]], False, 1, 2),  # restarts without progress are limited
    ],
)
def test_the_programs_statuses_decide(world, ends, progress, status, starts):
    arguments = [*SLICE, "--max_restarts=1", "--", CONFIG, *HARD]
    got, printed = world.launch(*arguments, ends=ends, progress=progress)
    assert got == status, printed
    gave_up = "tpu-vm delete pod --zone=us-west4-a" in printed
    assert gave_up == (not progress)
    assert world.calls == starts * PREPARED
    given = ["-m", "mirai_jax.main", "--distributed=on", "--workdir=/mnt/runs/one", CONFIG, *HARD]
    for i in "01":  # every argument passes the shells of two machines
        assert [json.loads(line) for line in world.lines(f"starts{i}")] == starts * [given]


def test_variables_reach_the_program_of_every_host(world):
    given = ['--env=ODD=a=\'b "c"\t$HOME *', "--env=TWO=2"]
    assert world.launch(*SLICE, *given, "--", CONFIG, ends=[[0, 0]])[0] == 0
    assert world.lines("set0") == world.lines("set1") == ['a=\'b "c"\t$HOME *2']


def test_a_preempted_slice_is_created_again(world):
    (world.folder / "pod" / "state").write_text("PREEMPTED")
    status, printed = world.launch(*SLICE, "--", CONFIG, ends=[["preempted", 75], [0, 0]])
    assert status == 1 and world.calls == [] and "is PREEMPTED; --create" in printed
    (world.folder / "pod" / "state").write_text("READY")
    created = "--create", "--type=v6e-16", "--max_restarts=1"  # of programs that ended
    status, printed = world.launch(*SLICE, *created, "--", CONFIG)
    assert status == 0, printed
    assert world.calls == [*PREPARED, "delete", "create", "create", *PREPARED]


def test_several_slices_are_a_queued_resource(world):
    (world.folder / "pod" / "state").write_text("SUSPENDED")
    arguments = [*SLICE[:2], "--workdir=gs://bucket/run", "--slices=2", "--create", "--type=v6e-16"]
    status, printed = world.launch(*arguments, "--", CONFIG, ends=[[0, 0]])
    assert status == 0 and "is SUSPENDED: creating" in printed, printed
    assert world.calls == ["delete", "create", "create", *PREPARED]
    assert "--workdir=gs://bucket/run" in world.lines("starts0")[0]


def test_a_queue_is_no_restart(world):
    state = world.folder / "pod" / "state"
    state.write_text("WAITING_FOR_RESOURCES")
    process = world.begin(*SLICE, "--max_restarts=0", "--", CONFIG, ends=[[0, 0]])
    until(lambda: len(world.lines("calls")) > 3 or process.poll() is not None)
    state.write_text("READY")
    status, printed = end(process)
    assert status == 0 and "trying again in 60 s" in printed, printed


def test_a_broken_connection_is_followed_again(world):
    process = world.begin(*SLICE, "--", CONFIG, ends=[["wait", "wait"], [0, 0]])
    until(world.started)
    (world.folder / "drop").touch()
    until(lambda: world.calls[-2:] == ["worker_run", "worker_run"])
    assert len(world.lines("starts0")) == 1 and process.poll() is None
    (world.folder / "finish").touch()
    assert end(process)[0] == 0


def test_ctrl_c_saves_on_all_hosts(world):
    process = world.begin(*SLICE, "--", CONFIG, ends=[["wait", "wait"]])
    until(world.started)
    os.killpg(process.pid, signal.SIGINT)
    status, printed = end(process)
    assert status == 75 and printed.count("ended with status 75") == 2, printed


def test_the_same_command_takes_over(world):
    first = world.begin(*SLICE, "--", CONFIG, ends=[["wait", "wait"], [0, 0]])
    until(world.started)
    status, printed = world.launch(*SLICE, "--", CONFIG)
    assert status == 0, printed
    status, printed = end(first)
    assert status == 1 and "another launcher" in printed and len(world.lines("starts0")) == 2


def test_dry_run_prints_the_commands_with_their_quotes(world):
    odd = ["--name=pod 1;$(x)", *SLICE[1:], "--create", "--setup=mount 'a b'", "--dry_run"]
    status, printed = world.launch(*odd, "--", CONFIG, *HARD)
    assert status == 0 and world.lines("calls") == []
    # bash reads them as the commands that would run.
    script = "gcloud() { printf '%s\\0' \"$@\" --; }\ngit() { :; }\ncp() { :; }\n" + printed
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode()
    calls = [call.split("\0") for call in words.split("\0--\0")[:-1]]
    assert [call[3] for call in calls] == ["describe", "create", "scp", "ssh", "ssh", "delete"]
    assert all("pod 1;$(x)" in call or "pod 1;$(x):" in call for call in calls)
    assert shlex.split(calls[3][-1])[-1] == "mount 'a b'"


def test_wrong_flags_are_one_line_and_status_2(world):
    relative = [*SLICE[:2], "--workdir=runs/x"]
    for flags, field in (
        (["--pod=3"], "--pod"),
        (["--env=A"], "--env"),
        (SLICE[1:], "--name"),
        (relative, "--workdir"),
    ):
        status, printed = world.launch(*flags, "--", CONFIG)
        assert status == 2 and field in printed and len(printed.splitlines()) == 1
    assert world.lines("calls") == []


# SLURM --------------------------------------------------------------------------------------------

# srun with a few tasks; its status is the highest of theirs.
SRUN = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)  # which tasks do not inherit
command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, env={**os.environ, "STATUS": status}, start_new_session=True)
         for status in os.environ["STATUSES"].split()]
(pathlib.Path(os.environ["WORLD"]) / "tasks").write_text(" ".join(str(t.pid) for t in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
TASK = """
import json, os, pathlib, signal, sys, time
status, world = os.environ["STATUS"], pathlib.Path(os.environ["WORLD"])

def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.1)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(world / f"ready{os.getpid()}").write_text(json.dumps(sys.argv[1:]))
while status == "wait":
    time.sleep(0.02)
sys.exit(int(status))
"""


def slurm(folder, *arguments, statuses="0", job="7", **more):
    executable(folder / "bin" / "srun", SRUN)
    executable(folder / "bin" / "scontrol", f'echo "$@" >> {folder}/requeued', "/bin/sh")
    executable(folder / "python", TASK)
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "PYTHON": str(folder / "python")}
    env |= {"WORLD": str(folder), "STATUSES": statuses, "SLURM_JOB_ID": job, **more}
    return subprocess.Popen(
        ["bash", SLURM, *arguments], env=env, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "statuses, status, restarts, requeued",
    [
        ("0 0", 0, 0, False),
        ("75 75", 75, 2, True),
        ("75 75", 75, 3, False),
        ("76 137", 137, 0, True),
        ("137 1 134", 1, 0, False),  # one process met an error to mend, the others only miss it
        ("75 127", 1, 0, False),
    ],
)
def test_slurm_status_and_requeue(tmp_path, statuses, status, restarts, requeued):
    limit = {"SLURM_RESTART_COUNT": str(restarts), "MAX_RESTARTS": "3"}
    assert end(slurm(tmp_path, CONFIG, *HARD, statuses=statuses, **limit))[0] == status
    assert (tmp_path / "requeued").exists() == requeued
    for given in tmp_path.glob("ready*"):
        assert json.loads(given.read_text()) == ["-m", "mirai_jax.main", CONFIG, *HARD]


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
@pytest.mark.parametrize("cancelled", [False, True])
def test_slurm_sigterm(tmp_path, cancelled, kill):
    """--signal reaches the tasks' shells, with cgroups alone; scancel also the script, which ends the job."""
    process = slurm(tmp_path, CONFIG, statuses="wait wait")
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    if cancelled:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    for pid in (tmp_path / "tasks").read_text().split():
        kill(int(pid), signal.SIGTERM)
    assert end(process)[0] == 75
    assert (tmp_path / "requeued").exists() != cancelled


def test_slurm_dry_run(tmp_path):
    assert end(slurm(tmp_path, CONFIG, job=""))[0] == 1  # outside of SLURM
    status, printed = end(slurm(tmp_path, "--dry_run", CONFIG, *HARD, job=""))
    script = "srun() { printf '%s\\0' \"$@\"; }\n" + printed
    words = subprocess.run(["bash", "-c", script], capture_output=True).stdout.decode()
    assert words.split("\0")[-len(HARD) - 2 : -1] == [CONFIG, *HARD]


@pytest.mark.parametrize("script", [TPU, SLURM, ROOT / "launch" / "bench_gpu.sh"])
def test_shellcheck(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "shellcheck disable" not in script.read_text()
