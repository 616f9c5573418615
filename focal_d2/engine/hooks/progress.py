"""The progress bar."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


def on_terminal() -> bool:
    """Return whether this is the main process and its output goes to a terminal."""
    return comm.is_main_process() and sys.stdout.isatty()


class ProgressBar(HookBase):
    """A bar with loss and time left, for a terminal; log lines appear above it."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def before_train(self) -> None:
        """Draw the bar."""
        names = ("detectron2", "fvcore", "focal_d2")
        self._stack.enter_context(logging_redirect_tqdm([logging.getLogger(n) for n in names]))
        self._bar = self._stack.enter_context(
            tqdm(
                desc="training",
                initial=self.trainer.start_iter,
                total=self.trainer.max_iter,
                unit="it",
                dynamic_ncols=True,
            )
        )

    def after_step(self) -> None:
        """Advance by one iteration."""
        loss = self.trainer.storage.history("total_loss").median(20)
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        """Close the bar and leave it on the screen."""
        self._stack.close()
