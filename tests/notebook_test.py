"""The notebook, from top to bottom on this machine, with parameters that make it small."""

import base64
import io
import json
import os
import pathlib
import signal
import sys
import threading
import time

import matplotlib.image
import nbformat
import numpy as np
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"
SMALL = [
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.checkpoint_every=60",  # when it is stopped, it saves on its own account
    "--config.judged_samples=0",
    "--config.optimizer.warmup_steps=2",
    "--config.foresight[0].start_epoch=0",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.width=32",
    "--config.model.vocab_size=16",
    "--config.model.unroll=1",
    "--config.model.grid=(2, 2)",
    "--config.tokenizer.patch=16",
]


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Makes a client: its kernel is this Python and works in the test's folder."""
    kernel = tmp_path / "kernels" / "here" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "here",
                "language": "python",
                "env": {
                    "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
                    "HOME": str(tmp_path / "home"), "IPYTHONDIR": str(tmp_path / "ipython"),
                },
            }
        )
    )  # fmt: skip
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "work").mkdir()

    def make(**parameters):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
        manager = KernelManager(kernel_spec_manager=specs, kernel_name="here")
        folder = {"metadata": {"path": str(tmp_path / "work")}}
        return NotebookClient(notebook, km=manager, resources=folder, timeout=200)

    return make


def outputs(notebook, cell_id):
    """What a cell printed, and its pictures."""
    (cell,) = [c for c in notebook.cells if c.id == cell_id]
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    data = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    pictures = [matplotlib.image.imread(io.BytesIO(base64.b64decode(d))) for d in data]
    return text, pictures


def test_committed_notebook_is_valid_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) < 60


@pytest.mark.slow  # the programs that its cells start have fast tests
def test_runs_from_top_to_bottom_and_a_stopped_cell_goes_on(client, tmp_path):
    before = set(ROOT.rglob("*.png")), (ROOT / "runs").exists()
    made = client(STEPS=60, OVERRIDES=SMALL)
    notebook = made.nb
    workdir = tmp_path / "work" / "runs" / "mirai_e-demo"
    metrics = workdir / "metrics.jsonl"

    def stop():
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            time.sleep(0.02)
        # As Jupyter does: the kernel and its children get it.
        os.killpg(os.getpgid(made.km.provisioner.pid), signal.SIGINT)

    with made.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            if cell.id == "train":
                threading.Thread(target=stop, daemon=True).start()
                made.execute_cell(cell, i)
                assert "stopped, and saved" in outputs(notebook, "train")[0]
            made.execute_cell(cell, i)
    assert (set(ROOT.rglob("*.png")), (ROOT / "runs").exists()) == before
    assert "cpu" in outputs(notebook, "run")[0]
    text, _ = outputs(notebook, "train")
    assert "resumed at step" in text
    assert "step 60/60" in text and "finished: 60 steps" in text
    for cell_id in ("curves", "grids", "sample"):
        (picture,) = outputs(notebook, cell_id)[1]
        assert picture.shape[1] > 2 * picture.shape[0] / 3 and np.std(picture) > 0.05
    assert "guidance 4: 80 images" in outputs(notebook, "sample")[0]
    assert "COMPARE = True" in outputs(notebook, "compare")[0]
    assert "not there: c2i_B_256.pt, vq_ds16_c2i.pt" in outputs(notebook, "own")[0]
    steps = [path.name for path in sorted((workdir / "samples").iterdir())]
    assert steps == ["step_0000020.png", "step_0000040.png", "step_0000060.png"]
