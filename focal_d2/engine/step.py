"""One iteration of training, based on detectron2's `SimpleTrainer`.

It adds batches in parts, loss scaling, a moving average of the weights, and checks for losses and gradients
that are not finite and for failures in other processes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from focal_d2.data.loader import TrainingLoader
from focal_d2.data.seeding import random_state, set_random_state
from focal_d2.detectron2_compat import LoopParts, copy_all, lerp_all
from focal_d2.engine.failures import failure_message
from focal_d2.engine.launch.collectives import any_rank
from focal_d2.engine.launch.signals import StopRequest
from focal_d2.engine.nonfinite import BadStep, Step
from focal_d2.errors import UserError, describe_error
from focal_d2.modeling.losses import LossNormalizer
from focal_d2.storage.checkpoint import check_finite, check_types

_HISTORY = 20  # iterations that a report on a loss that is not finite shows
_SKIPS = 10  # skipped steps in a row after which skipping is given up


class DataFailed(UserError):
    """Another process could not read its data."""


class Stopped(UserError):
    """All processes agreed to stop before this iteration."""


class FocalLoop(LoopParts, SimpleTrainer):
    """The training step.

    Until the optimizer's step only the model's buffers change, and the step keeps a copy of them. If the step
    fails before that, `undo` restores the state after the last complete iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        parts: int,
        precision: Callable[[], AbstractContextManager[Any]],
        scale_loss: bool,
        average: MovingAverage | None,
        stopping: Callable[[], bool],
        on_not_finite: Callable[[BadStep], None],
    ) -> None:
        """Compose the step.

        Args:
            model: images -> dict of losses, perhaps in `DistributedDataParallel`.
            data_loader: an endless iterable of batches.
            optimizer: of the model's parameters.
            parts: the number of parts in which a batch is computed.
            precision: makes the autocast context of the model's forward pass.
            scale_loss: whether to scale the loss, so that gradients in float16 do not underflow.
            average: moving average of the model, updated after each step; None: no average.
            stopping: returns whether this process was asked to stop.
            on_not_finite: called in all processes if the loss or gradient of any process is not finite, with
                the model as it was before the step.
        """
        super().__init__(model, data_loader, optimizer)
        self.bare = model.module if isinstance(model, DistributedDataParallel) else model
        self.parts = parts
        self.precision = precision
        self.scaler = torch.amp.GradScaler(enabled=scale_loss)
        self.average = average
        self.stopping = stopping
        self.on_not_finite = on_not_finite
        self.steps: deque[Step] = deque(maxlen=_HISTORY)
        self.steps_skipped = 0  # in a row
        self.stepping = False  # while this is True the state is incomplete and can't be saved
        # The scaler skips the optimizer's step if gradients in float16 overflow, and does not say so.
        optimizer.register_step_post_hook(lambda *_: setattr(self, "stepped", True))
        self.stepped = False  # whether the optimizer has made this iteration's step
        self._buffers = _Buffers(self.bare)
        self._kept: list[Tensor] = []  # copies of the buffers from before the iteration's batch
        self._random: dict[str, Any] = {}  # the generators' states from then
        self._begun = False  # whether the copies are of this iteration

    def run_step(self) -> None:
        """Make one step.

        Raises:
            Stopped: if a process was asked to stop.
            UserError: if data can't be read, or for too many skipped steps.
        """
        self._begun = False
        data, seconds = self._fetch()
        self._keep_buffers()
        self.optimizer.zero_grad()
        losses = self._backward(data)
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.bare.parameters() if p.grad is not None], foreach=True
        )
        # The only place where the host waits for a GPU: the step must not be made if it is not finite.
        *numbers, gradient_norm = torch.stack([*losses.values(), norm]).tolist()
        values = dict(zip(losses, numbers, strict=True))
        self.steps.append(Step(self.iter, self.optimizer.param_groups[0]["lr"], values, gradient_norm))
        # Scaled gradients may overflow: the scaler then skips the step and reduces the scale.
        finite = all(map(math.isfinite, values.values()))
        finite = finite and (self.scaler.is_enabled() or math.isfinite(gradient_norm))
        (bad,) = any_rank(not finite)
        if bad:
            self._skip(not finite, data, values)
            self._count_batch()
            return
        self.steps_skipped = 0
        if comm.is_main_process() and math.isfinite(gradient_norm):
            get_event_storage().put_scalar("gradient_norm", gradient_norm)
        # On the CPU: detectron2 reads each number by itself.
        self.write_losses({name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}, seconds)
        self.stepping, self.stepped = True, False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.stepped:
            self.average.update()
        self._count_batch()

    def _count_batch(self) -> None:
        if isinstance(self.data_loader, TrainingLoader):
            self.data_loader.count_batch()

    def _fetch(self) -> tuple[list[dict[str, Any]], float]:
        start, data, failure = time.perf_counter(), [], None
        try:
            data = self.next_batch()
        except Exception as error:  # raised again below, once the other processes know
            failure = error
        stop, failed = any_rank(self.stopping(), failure is not None)
        if stop:
            raise Stopped("stopped")
        if failed:
            lines = comm.all_gather(failure and (failure_message(failure) or describe_error(failure)))
            raise failure or DataFailed(next(line for line in lines if line))
        return data, time.perf_counter() - start

    @property
    def normalizer(self) -> LossNormalizer | None:
        """The model's loss normalizer; None for a model that is no `FocalRetinaNet`."""
        normalizer = getattr(self.bare, "loss_normalizer", None)
        return normalizer if isinstance(normalizer, LossNormalizer) else None

    def _backward(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Add up the gradients of the mean of the parts' losses; return that mean."""
        normalizer = self.normalizer
        parts = self._in_parts(data)
        held: AbstractContextManager[Any] = nullcontext()
        expecting: AbstractContextManager[Any] = nullcontext()
        if normalizer is not None:
            one = torch.ones((), device=normalizer.ema.device)
            expecting = normalizer.expecting(self.scaler.scale(one) / len(parts))
        if len(parts) > 1 and normalizer is not None:
            count: Any = self.bare.count_positives
            positives = torch.stack([count(part) for part in parts]).sum()
            held = normalizer.held(normalizer(positives) / len(parts))
        total: dict[str, Tensor] = {}
        with held, expecting:
            for i, part in enumerate(parts):
                with self._exchange(is_last=i == len(parts) - 1):
                    with self.precision():
                        losses = self.model(part)
                    self.scaler.scale(sum(losses.values()) / len(parts)).backward()
                for name, x in losses.items():
                    total[name] = total.get(name, 0) + x.detach() / len(parts)
        return total

    def _in_parts(self, data: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [data[i :: self.parts] for i in range(min(self.parts, len(data)))]

    def _exchange(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Let the processes exchange gradients after the last part only."""
        if not is_last and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _skip(self, is_bad_here: bool, data: list[dict[str, Any]], losses: dict[str, float]) -> None:
        self.undo()
        if self.scaler.is_enabled():
            self.scaler.update()
        bad_step = BadStep(
            iteration=self.iter,
            is_bad_here=is_bad_here,
            model=self.bare,
            precision=self.precision,
            parts=self._in_parts(data),
            losses=losses,
            normalizer=None if self.normalizer is None else float(self.normalizer.last),
            steps=list(self.steps),
        )
        self.on_not_finite(bad_step)
        self.steps_skipped += 1
        if self.steps_skipped >= _SKIPS:
            raise UserError(
                f"{_SKIPS} steps in a row were skipped because their loss or gradient was not finite: see "
                "the reports"
            )

    def _keep_buffers(self) -> None:
        buffers = self._buffers.tensors()
        if not self._kept:
            self._kept = [torch.empty_like(x) for x in buffers]
        copy_all(self._kept, buffers)
        self._random = random_state()  # a model may draw random numbers
        self._begun = True

    def undo(self) -> None:
        """Restore buffers and generators to their values before this iteration's batch."""
        self.optimizer.zero_grad()
        if self._begun:
            set_random_state(self._random)
            with torch.no_grad():
                copy_all(self._buffers.tensors(), self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, except for the model and the position in the data."""
        state = super().state_dict()
        state["skipped"] = self.steps_skipped
        state["grad_scaler"] = self.scaler.state_dict()
        if self.average is not None:
            # The checkpoint's model is the average.
            state["model"] = self.bare.state_dict()
            state["averaged"] = self.average.steps
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`, or the state that detectron2's trainer saves."""
        _adapt(state["optimizer"], self.optimizer)
        super().load_state_dict(state)
        self.steps_skipped = state.get("skipped", 0)
        if state.get("grad_scaler"):
            self.scaler.load_state_dict(state["grad_scaler"])
        if "model" in state:  # else there was no average, and the checkpoint's model is the trained one
            check_types(state["model"], self.bare)
            self.bare.load_state_dict(state["model"])
            check_finite(self.bare)
        elif self.average is not None:
            self.bare.load_state_dict(self.average.module.state_dict())
        if self.average is not None:
            self.average.steps = int(state.get("averaged", 0))


def _adapt(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Copy an optimizer's state into tensors like its parameters. PyTorch's fused steps check no shapes.

    Raises:
        ValueError: if the state is of other parameters, or its settings are of other types.
    """
    for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for name in ours.keys() & theirs.keys() - {"params"}:
            if not _is_like(theirs[name], ours[name]):
                raise ValueError(f"the optimizer's {name} is a {type(theirs[name]).__name__} that can't be")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        tensors = state["state"].get(number, {})
        for name, x in tensors.items():
            if x is None or (name == "step" and (type(x) in (int, float) or x.dim() == 0)):
                continue
            if not isinstance(x, Tensor):
                raise ValueError(f"the optimizer's {name} is a {type(x).__name__}")
            if x.shape != parameter.shape or not x.is_floating_point():
                raise ValueError(f"the optimizer's {name} has the shape {tuple(x.shape)}")
            tensors[name] = torch.empty_like(parameter, dtype=x.dtype, device=x.device).copy_(x)


def _is_like(theirs: Any, ours: Any) -> bool:
    """Return whether a loaded setting of an optimizer has the type of ours. PyTorch does not check it."""
    if isinstance(ours, (list, tuple)):
        is_list = isinstance(theirs, (list, tuple)) and len(theirs) == len(ours)
        return is_list and all(map(_is_like, theirs, ours))
    if isinstance(ours, (int, float)) and not isinstance(ours, bool):
        return type(theirs) in (int, float) and abs(theirs) < 2**63  # False for NaN
    return theirs is None or isinstance(theirs, (bool, str)) or type(theirs) is type(ours)


class MovingAverage:
    """An exponential moving average of a model's parameters, with the model's buffers.

    Step n keeps the share min(decay, (1 + n) / (10 + n)) of the average, so that the first weights lose their
    influence soon. TensorFlow's `ExponentialMovingAverage` with `num_updates` does the same.

    This is PyTorch's `AveragedModel` with fewer operations, to the bit: that waits for a GPU at each step and
    copies buffers one by one.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start with the weights of a model without `DistributedDataParallel`; decay is in (0, 1)."""
        self.module = deepcopy(model)
        self.decay = decay
        self.steps = 0
        self._parameters = list(self.module.parameters()), list(model.parameters())
        self._buffers = _Buffers(self.module), _Buffers(model)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model after a step."""
        averaged, current = self._parameters
        if self.steps == 0:
            copy_all(averaged, current)
        else:
            lerp_all(averaged, current, 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))
        averaged_buffers, buffers = self._buffers
        copy_all(averaged_buffers.tensors(), buffers.tensors())
        self.steps += 1


class _Buffers:
    """The buffers of a model. Its modules are searched once; a buffer may be replaced later."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [(m, name) for m in model.modules() for name, _ in m.named_buffers(recurse=False)]

    def tensors(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self._places]


@contextmanager
def stopping_between_batches(model: nn.Module, stop: StopRequest) -> Iterator[None]:
    """Let a signal end an evaluation of the model before its next batch; `--resume` repeats the evaluation.

    With several processes the evaluation ends first, because one process cannot leave it alone.

    Raises:
        Stopped: in the block, if a signal has come.
    """

    def check(*_: object) -> None:
        if comm.get_world_size() == 1 and stop.came:
            raise Stopped("stopped")

    handle = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
