"""A run at Weights & Biases too, where config.wandb.project names a project (extra `wandb`).

wandb.json in the workdir keeps the run's id, so that all starts of a run are one curve, and the last step
that W&B has; online it answers that. Steps only go forward: what a start from an older checkpoint repeats
is left out, for its numbers are the same, W&B refuses it online, and would hold it twice offline. What
earlier starts did not send comes from metrics.jsonl.

Whatever fails here costs one line, and W&B for the rest of this start; the run continues.
"""

import contextlib
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mirai_jax.training.metrics_writer import MetricsWriter, read_metrics
from mirai_jax.utils import files
from mirai_jax.utils.errors import first_line

_PATIENCE = 30  # seconds to reach W&B at the start, and to send the rest at the end


class TrackedWriter(MetricsWriter):
    """A MetricsWriter that sends each row and picture to W&B as well. `warn` takes lines."""

    def __init__(self, workdir: pathlib.Path, step: int, project: str, warn: Callable[[str], None]):
        super().__init__(workdir, step)
        self._file, self._warn = workdir / "wandb.json", warn
        self._run, self._wandb, self._keeps = None, None, False
        self._had = self._last = 0  # the last steps that W&B had before, and that it was sent
        with self._guarded():
            self._begin(workdir, project)
            for entry in read_metrics(workdir):
                if (past := entry.pop("step")) > self._had:
                    self._run.log(entry, step=past)
                    self._last = past

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            reason = first_line(error)[:200] or type(error).__name__
            self._warn(f"W&B is off until the next start, and the run continues: {reason}")

    def _begin(self, workdir: pathlib.Path, project: str) -> None:
        # A kill loses what W&B has not written to its file; the default is 15 seconds.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        try:
            import wandb
        except ImportError:
            why = "wandb.project needs the extra: pip install -e '.[wandb]'"
            raise ImportError(why) from None
        found = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._id = found.get("id") or secrets.token_hex(4)
        self._had = self._last = found.get("step", 0)
        self._keep(self._last)
        here = isinstance(workdir, pathlib.Path)  # W&B's own files cannot lie in a bucket
        options = {
            "project": project,
            "id": self._id,
            "resume": "allow",
            "name": workdir.name,
            "dir": str(workdir) if here else tempfile.mkdtemp(prefix="wandb-"),
            "config": json.loads((workdir / "config.json").read_text()),
            "allow_val_change": True,
            "settings": wandb.Settings(
                console="off", init_timeout=_PATIENCE, finish_timeout=_PATIENCE
            ),
        }
        known = os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False)
        try:
            run = wandb.init(**options, mode=None if known else "offline")
        except Exception as error:
            wandb.teardown()  # which still has the id
            run = wandb.init(**options, mode="offline")
            self._warn(f"W&B cannot be reached ({first_line(error)[:200]})")
        if run.offline:
            self._warn(f"W&B is offline: `wandb sync {os.path.dirname(run.dir)}` sends this start")
        else:
            self._had = self._last = run.starting_step - 1
        self._run, self._wandb, self._keeps = run, wandb, here and run.offline

    def _keep(self, step: int) -> None:
        files.write_text(self._file, json.dumps({"id": self._id, "step": step}) + "\n")

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self._last:
            if self._keeps:
                self._keep(self._last)  # only now is this row complete
            self._last = step
        self._run.log(values, step=step)

    def board(self, step: int, values: Mapping[str, float]) -> None:
        super().board(step, values)
        if self._run and step > self._had:
            with self._guarded():
                self._send(step, values)

    def image(self, step: int, name: str, image_HxWxC: np.ndarray) -> None:
        super().image(step, name, image_HxWxC)
        if self._run and step > self._had:
            with self._guarded():
                self._send(step, {name: self._wandb.Image(image_HxWxC)})

    def close(self) -> None:
        run, self._run = self._run, None
        with self._guarded():
            if run:
                run.finish()
                self._keep(self._last)
        super().close()
