"""Orbax checkpoints: the train state together with the data iterator."""

import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import save_decision_policy as policies

from mirai_jax.errors import ConfigError, first_line
from mirai_jax.step import TrainState


def _storable(state: TrainState) -> TrainState:
    """PRNG keys as plain integers, which every Orbax version can store."""
    return state.replace(key=jax.random.key_data(state.key))


class Checkpoints:
    """The checkpoints of a workdir, written in the background.

    One is due every `every` steps, and when the platform announces a preemption.
    """

    def __init__(self, folder: pathlib.Path, *, every: int = 1, keep: int | None = None):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            # Named here, so that their metadata can be read before anything is restored.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.AnySavePolicy(
                    [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
                ),
                max_to_keep=keep,
                step_prefix="step",
                enable_async_checkpointing=True,
            ),
        )

    def due(self, step: int) -> bool:
        """Whether `save` would write a checkpoint of this step."""
        return self._manager.should_save(step)

    def save(self, state: TrainState, step: int, data: grain.DatasetIterator, force=False) -> bool:
        """Starts writing a checkpoint if one is due (or forced). Returns whether it did."""
        if self._manager.latest_step() == step or not (force or self.due(step)):
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

    def restore(self, step: int, like: TrainState, data: grain.DatasetIterator) -> TrainState:
        """A checkpoint, with the shapes and shardings of `like`; moves `data` to match.

        Raises:
            ConfigError: it cannot be read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _storable(like)
        )
        state = self._read(step, abstract, data=grain.checkpoint.CheckpointRestore(data))
        return state.replace(key=jax.random.wrap_key_data(state.key))

    def restore_weights(self, step: int | None = None) -> tuple[Any, int]:
        """{'params', 'ema'} of a checkpoint (default: the newest) as host arrays, and its step.

        They may have been saved on any number of devices.

        Raises:
            ConfigError: there is no checkpoint, or it cannot be read.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ConfigError(f"{self._folder} holds no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ConfigError(
                f"{self._folder} holds no checkpoint of step {step}; its steps are "
                f"{', '.join(map(str, steps))}"
            )
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            self._manager.item_metadata(step)["state"],
        )
        state = self._read(step, abstract)
        return jax.device_get({"params": state["params"], "ema": state["ema"]}), step

    def _read(self, step: int, abstract: Any, **others: Any) -> Any:
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), **others)
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:  # whatever Orbax and TensorStore make of a damaged file
            raise ConfigError(
                f"checkpoint {self._folder / f'step_{step}'} cannot be read "
                f"({first_line(error)}); remove that folder to go on from the one before it"
            ) from error

    def wait(self) -> None:
        """Blocks until everything that was started is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
