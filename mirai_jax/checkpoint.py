"""Orbax checkpoints: the train state together with the data iterator."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import save_decision_policy as policies

from mirai_jax.step import TrainState


def _storable(state: TrainState) -> TrainState:
    """PRNG keys as plain integers, which every Orbax version can store."""
    return state.replace(key=jax.random.key_data(state.key))


class Checkpoints:
    """The checkpoints of a workdir, written in the background.

    `save` is to be called after every step; whether one is written is decided inside (every `every`
    steps, and when the platform announces a preemption).
    """

    def __init__(self, folder: pathlib.Path, *, every: int = 1, keep: int | None = None):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(
                    [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
                ),
                max_to_keep=keep,
                step_prefix="step",
                enable_async_checkpointing=True,
            ),
        )

    def save(self, state: TrainState, step: int, data: grain.DatasetIterator, force=False) -> bool:
        """Starts writing a checkpoint if one is due (or forced). Returns whether it did."""
        if force and self._manager.latest_step() == step:
            return False  # the interval has just written it
        if not force and not self._manager.should_save(step):
            return False
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_storable(state)),
                data=grain.checkpoint.CheckpointSave(data),
            ),
            force=force,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, like: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint, with the shapes and shardings of `like`; moves `data` to match."""
        step = self._manager.latest_step()
        logging.info("restoring step %d", step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(_storable(like))),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
        state = restored["state"]
        return state.replace(key=jax.random.wrap_key_data(state.key))

    def restore_ema(self) -> Any:
        """The generator's averaged parameters of the newest checkpoint, as host arrays."""
        step = self._manager.latest_step()
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
        return jax.device_get(restored["state"]["ema"])

    def wait(self) -> None:
        """Blocks until everything that was started is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
