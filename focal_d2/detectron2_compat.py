"""Every private name of detectron2, fvcore and PyTorch that the plugin needs, in this one module.

A private name (a leading underscore, or an attribute that no documentation mentions) may disappear in any
release. `PRIVATE_NAMES` lists each name with its owner and with what of ours needs it; `missing_names` says
which ones the installed versions lack. The rest of the package uses the functions and mixins below.

A mixin gives a private hook of detectron2's class a public name. It comes before that class in the bases:
`class FocalDatasetMapper(MapperHooks, DatasetMapper)`. This module imports detectron2 only inside functions,
so that using it costs nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PrivateName(NamedTuple):
    """A private name, and what of ours needs it."""

    owner: str  # "module" or "module:Class"
    name: str
    needed_by: str


_COCO = "detectron2.evaluation.coco_evaluation:COCOEvaluator"
_TRAINER = "detectron2.engine.defaults:DefaultTrainer"
_LOOP = "detectron2.engine.train_loop:SimpleTrainer"
_CHECKPOINT = "fvcore.common.checkpoint:Checkpointer"

PRIVATE_NAMES = (
    PrivateName("detectron2.data.dataset_mapper:DatasetMapper", "_transform_annotations", "ignored regions"),
    PrivateName("detectron2.data.detection_utils", "_apply_exif_orientation", "upright images from Pillow"),
    *(
        PrivateName(f"detectron2.data.samplers.distributed_sampler:{sampler}", "_infinite_indices", "batches")
        for sampler in ("TrainingSampler", "RepeatFactorTrainingSampler")
    ),
    PrivateName("detectron2.engine.hooks:EvalHook", "_do_eval", "the best checkpoint, and early stopping"),
    PrivateName(_TRAINER, "_trainer", "our training step in detectron2's trainer, and resuming"),
    PrivateName(_TRAINER, "_last_eval_results", "the results that training returns"),
    PrivateName(_LOOP, "_data_loader_iter", "the next batch of a step"),
    PrivateName(_LOOP, "_write_metrics", "the losses in metrics.json"),
    PrivateName("detectron2.utils.events:EventStorage", "_vis_data", "pictures for Weights & Biases"),
    *(
        PrivateName(_COCO, name, "COCO evaluation on a fast library")
        for name in (
            "_coco_api",
            "_cpu_device",
            "_derive_coco_results",
            "_distributed",
            "_do_evaluation",
            "_eval_predictions",
            "_logger",
            "_metadata",
            "_output_dir",
            "_predictions",
            "_results",
            "_tasks",
        )
    ),
    PrivateName(
        "detectron2.evaluation.lvis_evaluation:LVISEvaluator",
        "_eval_predictions",
        "LVIS evaluation on hotcoco",
    ),
    PrivateName(
        "detectron2.modeling.meta_arch.dense_detector:DenseDetector",
        "_move_to_current_device",
        "copies of images to a GPU that do not wait",
    ),
    PrivateName(_CHECKPOINT, "_load_file", "checkpoints of all formats, read without running their code"),
    PrivateName(
        "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer",
        "_torch_load",
        "checkpoints read without running their code",
    ),
    PrivateName(_CHECKPOINT, "_load_model", "errors for weights that do not fit the model"),
    PrivateName(_CHECKPOINT, "_convert_ndarray_to_tensor", "errors for weights of another type"),
    PrivateName("torch", "_foreach_copy_", "the copy of all buffers before a step, and the moving average"),
    PrivateName("torch", "_foreach_lerp_", "the moving average of the weights"),
    PrivateName("torch:UntypedStorage", "_cdata", "the doctor's count of memory, each storage once"),
    PrivateName("torch.profiler:profile", "profiler", "the benchmark's peak of memory on a CPU"),
    PrivateName(
        "torch.autograd.profiler:profile", "kineto_results", "the benchmark's peak of memory on a CPU"
    ),
    PrivateName("torch.nn:Module", "_metadata", "the versions of modules in a checkpoint"),
    *(
        PrivateName("torch.nn:Module", name, "the copy of a model that validation computes losses with")
        for name in ("_forward_hooks", "_forward_pre_hooks")
    ),
    PrivateName("torch", "_dynamo", "the message about a model that cannot be compiled"),
    PrivateName("torch", "_inductor", "the message about a model that cannot be compiled"),
    PrivateName("torch.utils.data._utils.signal_handling", "_set_SIGCHLD_handler", "the end of a worker"),
)

# The key of the training step's state in the state of detectron2's trainer, and so in checkpoints.
LOOP_STATE = "_trainer"


def missing_names(names: Sequence[PrivateName] = PRIVATE_NAMES) -> list[str]:
    """Say which private names the installed versions lack, a sentence each; empty: they have all."""
    return [
        f"{owner.replace(':', '.')} has no {name}, which is needed for: {needed_by}"
        for owner, name, needed_by in names
        if not _has(owner, name)
    ]


def _has(owner: str, name: str) -> bool:
    """Whether a module or class has or declares the name, or a method of the class assigns the attribute."""
    module, _, class_name = owner.partition(":")
    try:
        there: Any = importlib.import_module(module)
    except ImportError:
        return False
    if not class_name:
        return hasattr(there, name)
    cls = getattr(there, class_name, None)
    if cls is None:
        return False
    declared = any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__)
    return declared or hasattr(cls, name) or any(name in _assigned(base) for base in cls.__mro__)


def _assigned(cls: type) -> set[str]:
    """Return the attributes that the methods of a class assign to an object."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C
        return set()
    return {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)}


class MapperHooks:
    """For detectron2's `DatasetMapper`."""

    def transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        """Replace the record's "annotations" by "instances"; a subclass may do more."""
        super()._transform_annotations(dataset_dict, transforms, image_shape)  # type: ignore[misc]

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        self.transform_annotations(dataset_dict, transforms, image_shape)


class SamplerHooks:
    """For a sampler that is used where detectron2's are; see `infinite_indices`."""

    def infinite_indices(self) -> Iterator[int]:
        """Iterate without end over the draws of all processes."""
        raise NotImplementedError

    def _infinite_indices(self) -> Iterator[int]:
        return self.infinite_indices()


class EvaluationHooks:
    """For detectron2's `EvalHook`."""

    def evaluate(self) -> None:
        """Evaluate, and put the results into the event storage; a subclass may do more."""
        super()._do_eval()  # type: ignore[misc]

    def _do_eval(self) -> None:
        self.evaluate()


class TrainerParts:
    """For detectron2's `DefaultTrainer`."""

    _trainer: Any
    _last_eval_results: dict[str, Any]

    @property
    def loop(self) -> Any:
        """The object that makes one step; detectron2's trainer hands its attributes on."""
        return self._trainer

    @loop.setter
    def loop(self, loop: Any) -> None:
        self._trainer = loop

    @property
    def last_results(self) -> dict[str, Any]:
        """The results of the last evaluation, on the main process; AttributeError before the first one."""
        return self._last_eval_results

    @last_results.setter
    def last_results(self, results: dict[str, Any]) -> None:
        self._last_eval_results = results


class LoopParts:
    """For detectron2's `SimpleTrainer`."""

    _data_loader_iter: Iterator[Any]

    def next_batch(self) -> Any:
        """Return the data loader's next batch."""
        return next(self._data_loader_iter)

    def write_losses(self, losses: dict[str, Tensor], data_seconds: float) -> None:
        """Put the mean of all processes' losses, and the time that data took, into the event storage."""
        self._write_metrics(losses, data_seconds)  # type: ignore[attr-defined]


class COCOHooks:
    """For detectron2's `COCOEvaluator`, whose constructor is not called: it converts datasets to files."""

    _predictions: list[dict[str, Any]]
    _results: dict[str, Any]

    def prepare(self, *, logger: Any, metadata: Any, output_dir: str | None, has_annotations: bool) -> None:
        """Set what detectron2's methods read.

        Args:
            logger: receives their messages.
            metadata: of the dataset.
            output_dir: the folder for predictions; None: they are not written.
            has_annotations: whether the dataset's boxes are known.
        """
        self._logger, self._metadata, self._output_dir = logger, metadata, output_dir
        self._do_evaluation = has_annotations
        self._distributed = False  # predictions are gathered before detectron2's `evaluate`
        self._cpu_device = torch.device("cpu")
        self._tasks = ("bbox",)
        self._predictions = []

    def coco_api(self) -> Any:
        """Return the ground truth as pycocotools' object; asked for at most once."""
        raise NotImplementedError

    @functools.cached_property
    def _coco_api(self) -> Any:
        return self.coco_api()

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """What `process` collected: {"image_id", "instances"} for each image."""
        return self._predictions

    @predictions.setter
    def predictions(self, predictions: list[dict[str, Any]]) -> None:
        self._predictions = predictions

    @property
    def results(self) -> dict[str, Any]:
        """Task -> metrics, which `evaluate` returns."""
        return self._results

    def derive_results(self, evaluation: Any, class_names: Sequence[str] | None) -> dict[str, float]:
        """Log tables of the metrics, and return them in per cent.

        Args:
            evaluation: has "stats" and "eval", as pycocotools' COCOeval.
            class_names: for AP-NAME of each class.
        """
        metrics: dict[str, float] = self._derive_coco_results(  # type: ignore[attr-defined]
            evaluation, "bbox", class_names
        )
        return metrics

    def evaluate_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None = None
    ) -> None:
        """Fill `results`; `evaluate` calls this once."""
        raise NotImplementedError

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None = None
    ) -> None:
        self.evaluate_predictions(predictions, img_ids)


class LVISHooks:
    """For detectron2's `LVISEvaluator`."""

    def evaluate_predictions(self, predictions: list[dict[str, Any]]) -> None:
        """Compute the metrics; a subclass may do more."""
        super()._eval_predictions(predictions)  # type: ignore[misc]

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        self.evaluate_predictions(predictions)


class DetectorHooks:
    """For detectron2's `DenseDetector`."""

    def to_device(self, x: Tensor) -> Tensor:
        """Return an image on the model's device; a subclass may move it in another way."""
        moved: Tensor = super()._move_to_current_device(x)  # type: ignore[misc]
        return moved

    def _move_to_current_device(self, x: Tensor) -> Tensor:
        return self.to_device(x)


class CheckpointerHooks:
    """For detectron2's `DetectionCheckpointer`, in the order in which it calls them."""

    def read_file(self, filename: str) -> dict[str, Any]:
        """Return a file's content in the form of a checkpoint."""
        content: dict[str, Any] = super()._load_file(filename)  # type: ignore[misc]
        return content

    def read_torch_file(self, filename: str) -> dict[str, Any]:
        """Return the content of a file that `torch.save` wrote."""
        content: dict[str, Any] = super()._torch_load(filename)  # type: ignore[misc]
        return content

    def load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load a checkpoint's "model"; return which entries are missing, unexpected or of another shape."""
        return super()._load_model(checkpoint)  # type: ignore[misc]

    def convert_arrays(self, state_dict: dict[str, Any]) -> None:
        """Make tensors of arrays, in place: the last step before PyTorch gets the entries."""
        super()._convert_ndarray_to_tensor(state_dict)  # type: ignore[misc]

    def _load_file(self, filename: str) -> dict[str, Any]:
        return self.read_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return self.read_torch_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        return self.load_model(checkpoint)

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        self.convert_arrays(state_dict)


def apply_exif_orientation(image: Any) -> Any:
    """Return Pillow's image upright, as its EXIF orientation asks for."""
    from detectron2.data.detection_utils import _apply_exif_orientation

    return _apply_exif_orientation(image)


def infinite_indices(sampler: Any) -> Iterator[int]:
    """Iterate without end over the draws of a detectron2 sampler, those of all processes."""
    indices: Iterator[int] = sampler._infinite_indices()
    return indices


def pictures_of(storage: Any) -> list[tuple[str, Any, int]]:
    """Return the pictures in an event storage that are not written yet: name, (3, H, W), iteration."""
    pictures: list[tuple[str, Any, int]] = storage._vis_data
    return pictures


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes and types, on a GPU with few kernels."""
    for these, others in _by_type(targets, sources):
        torch._foreach_copy_(these, others)


def lerp_all(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move tensors towards others of the same shapes and types by a share, on a GPU with few kernels.

    Tensors that are not floating point become equal to the others.
    """
    for these, others in _by_type(targets, sources):
        if these[0].is_floating_point():
            torch._foreach_lerp_(these, others, weight)
        else:
            torch._foreach_copy_(these, others)


def _by_type(
    targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Divide pairs of tensors by type: lists of mixed types take PyTorch a kernel for each tensor."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault(target.dtype, ([], []))
        group[0].append(target)
        group[1].append(source)
    return groups.values()


def copy_without_hooks(model: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy of a model without forward hooks: they may hold anything, such as the trainer."""
    hooks = [x for m in model.modules() for x in (m._forward_hooks, m._forward_pre_hooks)]
    return deepcopy(model, {id(x): OrderedDict() for x in hooks})


def storage_number(x: Tensor) -> int:
    """Return a number that views of the same memory share, also on the meta device."""
    return int(x.untyped_storage()._cdata)


def allocations(profiler: Any) -> list[tuple[int, int]]:
    """Return when a profiled run took or gave back memory, in nanoseconds, and the bytes (+ or -)."""
    events = profiler.profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def set_module_versions(state_dict: OrderedDict[str, Any], versions: Any) -> None:
    """Give a state dict the versions of its modules, which `load_state_dict` reads."""
    state_dict._metadata = versions  # type: ignore[attr-defined]


def is_worker_watch(handler: Any) -> bool:
    """Whether a signal handler is the one that raises when a worker of a DataLoader has died."""
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"


def is_failed_compilation(error: Exception) -> bool:
    """Whether PyTorch raised the error because it cannot compile a model."""
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))
