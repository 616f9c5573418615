"""The random generators of all processes, as checkpoints keep them."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from focal_d2.data.seeding import random_state, set_random_state


class RandomStates:
    """The states of all processes' random generators. The main process collects them for checkpoints."""

    def __init__(self) -> None:
        self._collected: list[dict[str, Any]] = []

    def collect(self) -> None:
        """Collect the states; all processes must call it together."""
        self._collected = comm.gather(random_state())

    def forget(self) -> None:
        """Drop what was collected, because training has continued."""
        self._collected = []

    def state_dict(self) -> list[dict[str, Any]]:
        """Return a state for each process; only this process's if none were collected after the last step."""
        return self._collected or [random_state()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> list[str]:
        """Set this process's generators; return a clause if they cannot be set.

        Raises:
            ValueError: if a state is damaged.
        """
        if len(states) != comm.get_world_size():
            return ["random generators start from new states"]
        set_random_state(states[comm.get_rank()])
        return []


class CollectRandomStates(HookBase):
    """Collects the random states whenever a checkpoint is due. It must run before the checkpointer."""

    def __init__(self, states: RandomStates, *, period: int) -> None:
        """Collect into `states`; `period` is the number of iterations between checkpoints."""
        self._states = states
        self._period = period

    def after_step(self) -> None:
        """Collect the states if a checkpoint is due, else drop those of an earlier iteration."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            self._states.collect()
        else:
            self._states.forget()
