"""Which images are trained on, and how often: records, negatives and samplers of the training loader."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from focal_d2.config import check_choice
from focal_d2.data.seeding import derived_seed, seeded
from focal_d2.errors import UserError
from focal_d2.ops.common import ANY_CLASS

logger = logging.getLogger(__name__)

_CLASS_BALANCED, _REPEAT_FACTOR = "ClassBalancedSampler", "RepeatFactorTrainingSampler"
# detectron2's, and the key that it reads but does not have by default: who wants the sampler adds the key.
_NEEDED_KEYS = {
    "RandomSubsetTrainingSampler": ("DATALOADER", "RANDOM_SUBSET_RATIO"),
    "WeightedTrainingSampler": ("DATASETS", "TRAIN_REPEAT_FACTOR"),
    "WeightedCategoryTrainingSampler": ("DATASETS", "TRAIN_REPEAT_FACTOR"),
}
_MOST_CLASSES_LOGGED = 5
# More images than any training draws: to go on after so many would take an hour of counting.
_MOST_DRAWS = 10**9
# Tells the seed that a sample has for its losses from that of its augmentation.
_FOR_LOSSES = 1


class ClassBalancedSampler(Sampler[int]):
    """An infinite stream of images in which every class has its turn equally often.

    Class-aware sampling (arXiv 1512.05830): the C classes that the data show come in rounds, each in a new
    order; a class's turn draws the next of the images that show it, and those come in rounds too. So an image
    has the share 1/C of the sum of 1/n(c) over its classes c, which n(c) images show. What an image shows
    beside the class whose turn it is comes on top. Beyond the paper, which has one class an image: images
    without boxes are drawn at random turns, as often as when all images are drawn alike.

    All ranks walk the same stream, and each takes every n-th image of n ranks.
    """

    def __init__(self, classes: Sequence[np.ndarray], *, seed: int) -> None:
        """Take what the images show.

        Args:
            classes: of each of N images its different classes, int64.
            seed: the same on all ranks.
        """
        self.seed = seed
        self.rank, self.ranks = comm.get_rank(), comm.get_world_size()
        image, label = _pairs(classes)
        order = np.argsort(label, kind="stable")
        _, starts = np.unique(label[order], return_index=True)
        self.images_of = [torch.from_numpy(x) for x in np.split(image[order], starts)[1:]]
        self.empty = torch.tensor([i for i, x in enumerate(classes) if not len(x)], dtype=torch.int64)
        self.empty_share = len(self.empty) / len(classes)

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's places in the list of images."""
        return itertools.islice(self._infinite_indices(), self.rank, None, self.ranks)

    def _infinite_indices(self) -> Iterator[int]:
        # The name under which detectron2's samplers have the stream of all ranks.
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        empty = _rounds(self.empty, generator)
        turns = _rounds(torch.arange(len(self.images_of)), generator)
        images_of = [_rounds(x, generator) for x in self.images_of]
        while True:
            if self.empty_share and torch.rand((), generator=generator) < self.empty_share:
                yield next(empty)
            else:
                yield next(images_of[next(turns)])


def _rounds(items: torch.Tensor, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from items[torch.randperm(len(items), generator=generator)].tolist()


def _pairs(classes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """List the pairs of an image and a class that it shows: (P,) places of the images, (P,) classes."""
    image = np.repeat(np.arange(len(classes)), [len(x) for x in classes])
    return image, np.concatenate([*classes, np.zeros(0, dtype=np.int64)])


def class_balanced_weights(classes: Sequence[np.ndarray]) -> np.ndarray:
    """Return how often `ClassBalancedSampler` draws each of N images: (N,), of sum 1."""
    image, label = _pairs(classes)
    images_of = np.bincount(label)  # (K,)
    empty = np.array([len(x) == 0 for x in classes])
    turns = np.bincount(image, 1 / images_of[label], minlength=len(classes)) / max(
        1, np.count_nonzero(images_of)
    )
    return np.where(empty, 1 / len(classes), (1 - empty.mean()) * turns)


def image_classes(record: dict[str, Any]) -> np.ndarray:
    """Return an image's different classes, int64 ascending; crowds do not count."""
    shown = {x["category_id"] for x in record.get("annotations", ()) if not x.get("iscrowd", 0)}
    return np.array(sorted(shown), dtype=np.int64)


def training_records(cfg: CfgNode) -> Any:
    """Load `DATASETS.TRAIN` as detectron2 does, without the images that have no box where the config says so.

    Images with crowds only count as without. The one key that decides is logged with its count.

    Args:
        cfg: full config.

    Raises:
        UserError: if no image is left to train on.
    """
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=False,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if not isinstance(records, list) or "annotations" not in records[0]:
        return records
    with_boxes = [x for x in records if any(not a.get("iscrowd", 0) for a in x["annotations"])]
    left_out = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    logger.info(
        f"{len(records) - len(with_boxes):,} of {len(records):,} images have no box and are "
        f"{'left out' if left_out else 'trained on'} (DATALOADER.FILTER_EMPTY_ANNOTATIONS {left_out})"
    )
    if not left_out:
        return records
    if not with_boxes:
        raise UserError(
            f"no image of {', '.join(cfg.DATASETS.TRAIN)} has a box: to train on such images, set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    return with_boxes


def check_sampler(cfg: CfgNode) -> str:
    """Return `DATALOADER.SAMPLER_TRAIN`.

    Raises:
        UserError: if there is no such sampler.
    """
    choices = ["TrainingSampler", _REPEAT_FACTOR, _CLASS_BALANCED]
    choices += [name for name, (section, key) in _NEEDED_KEYS.items() if key in cfg[section]]
    return check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, tuple(choices))


def build_sampler(cfg: CfgNode, records: Any, *, seed: int) -> Sampler[int]:
    """Build the sampler that YAML names; of those that weigh images by class, log what they do.

    Args:
        cfg: full config.
        records: what is trained on.
        seed: of all draws; the same on all ranks.
    """
    name = check_sampler(cfg)
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RandomSubsetTrainingSampler":
        share = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(len(records), share, seed_shuffle=seed, seed_subset=seed)
    classes = [image_classes(x) for x in records]
    sampler: Sampler[int]
    if name == _CLASS_BALANCED:
        weights = class_balanced_weights(classes)
        sampler = ClassBalancedSampler(classes, seed=seed)
    else:
        factors = _repeat_factors(cfg, records, name)
        weights = (factors / factors.sum()).numpy()
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
    logger.info(f"{name}: {describe_shares(classes, weights, names)}")
    return sampler


def _repeat_factors(cfg: CfgNode, records: Any, name: str) -> torch.Tensor:
    """Return how often detectron2's sampler of that name repeats each record: (N,) float32."""

    def by_class(records: Any) -> torch.Tensor:
        # detectron2 would take regions of any class for a class of their own.
        of_classes = [
            {"annotations": [a for a in x["annotations"] if a["category_id"] != ANY_CLASS]} for x in records
        ]
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            of_classes, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )

    if name == _REPEAT_FACTOR:
        return by_class(records)
    of_dataset = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    unknown = sorted(of_dataset.keys() - set(cfg.DATASETS.TRAIN))
    if unknown:
        raise UserError(f"DATASETS.TRAIN_REPEAT_FACTOR names {unknown[0]}, which DATASETS.TRAIN does not")
    parts = []
    for dataset in cfg.DATASETS.TRAIN:
        one = cfg.clone()
        one.defrost()
        one.DATASETS.TRAIN = (dataset,)
        own = training_records(one)
        part = torch.full((len(own),), float(of_dataset.get(dataset, 1.0)))
        parts.append(part if name == "WeightedTrainingSampler" else part * by_class(own))
    factors = torch.cat(parts)
    return factors if name == "WeightedTrainingSampler" else factors / factors.min()


def describe_shares(classes: Sequence[np.ndarray], weights: np.ndarray, names: Sequence[str]) -> str:
    """Say in a line how many of the drawn images show a class, for the classes that change most.

    Args:
        classes: of each of N images its different classes.
        weights: (N,) how often each is drawn; they sum to 1.
        names: K class names; numbers stand for those that are missing.
    """
    image, label = _pairs(classes)
    before = np.bincount(label) / len(classes)  # (K,)
    after = np.bincount(label, weights[image])
    shown = np.flatnonzero(before)
    change = np.abs(np.log(after[shown] / before[shown]))
    most = [shown[i] for i in np.argsort(-change, kind="stable")[:_MOST_CLASSES_LOGGED] if change[i] > 1e-4]
    if not most:
        return "each class is shown as often as without it"
    parts = [f"{names[c] if c < len(names) else c} {before[c]:.2%} to {after[c]:.2%}" for c in most]
    return f"share of images that show a class, most changed of {len(shown)}: {', '.join(parts)}"


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Which images an iteration trains on: a function of the sampler's seed and the iteration alone.

    All ranks walk the same stream of batches, and each takes every n-th image of a batch of n ranks: N ranks
    train on the images that one would train on. An image comes with the number of its draw, which seeds its
    augmentation. With grouping, a batch has wide images only or none, over all ranks; detectron2 groups on
    each rank by itself.
    """

    def __init__(self, sampler: Any, *, images: int, wide: np.ndarray | None) -> None:
        """Take the stream of images.

        Args:
            sampler: detectron2's, or of its kind.
            images: number in a batch, over all ranks.
            wide: (N,) bool: images that are wider than high, which are kept apart from the others; None: all
                images mix.
        """
        self.sampler, self.images, self.wide = sampler, images, wide
        self.rank, self.ranks = comm.get_rank(), comm.get_world_size()
        self.start = 0  # the batch to begin with

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's part of each batch: (number of the draw, place in the list of images)."""
        for batch in itertools.islice(self._batches(), self.start, None):
            yield batch[self.rank :: self.ranks]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        groups: tuple[list[tuple[int, int]], ...] = ([], [])
        for draw, image in enumerate(self.sampler._infinite_indices()):
            group = groups[0 if self.wide is None else int(self.wide[image])]
            group.append((draw, image))
            if len(group) == self.images:
                yield group[:]
                group.clear()


class SeededSamples(Dataset[dict[str, Any]]):
    """Mapped records; the augmentation of each is seeded by (seed, number of the draw).

    So is their "sampling_seed", which losses that choose examples at random read. Both are the same in any
    number of workers and ranks, and after a resumption.
    """

    def __init__(self, records: list[dict[str, Any]], mapper: Callable[[Any], Any], *, seed: int) -> None:
        """Take the records, which are packed as detectron2 does, so that workers share them."""
        self.records, self.mapper, self.seed = DatasetFromList(records, copy=False), mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        """Map the record of (number of the draw, place in the list)."""
        draw, image = key
        with seeded(self.seed, draw):
            sample = self.mapper(self.records[image])
        sample["sampling_seed"] = derived_seed(self.seed, draw, _FOR_LOSSES)
        return sample


class Content(NamedTuple):
    """Checksums of what is trained on; a folder that was moved has the same."""

    image_content: int  # of the images' names below their folders, and their sizes
    annotation_content: int


def content_of(records: Sequence[dict[str, Any]], folders: Sequence[str]) -> Content:
    """Compute the checksums of records; a million annotations take about a second.

    Args:
        records: in detectron2's format.
        folders: of images. Names outside them count from the folder that they have in common.
    """
    names = [os.path.abspath(str(record["file_name"])) for record in records]
    roots = sorted((os.path.join(os.path.abspath(x), "") for x in folders), key=len, reverse=True)
    root_of = [next((root for root in roots if name.startswith(root)), "") for name in names]
    outside = {os.path.dirname(name) for name, root in zip(names, root_of, strict=True) if not root}
    common = os.path.join(os.path.commonpath(outside), "") if outside else ""
    encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
    images = annotations = 0
    for name, root, record in zip(names, root_of, records, strict=True):
        below = os.fsencode(name.removeprefix(root or common))
        images = zlib.crc32(encoder.encode((below, record.get("height"), record.get("width"))), images)
        annotations = zlib.crc32(encoder.encode(record.get("annotations")), annotations)
    return Content(images, annotations)


def _plain(value: Any) -> Any:
    """Return an array or a number of NumPy's as lists and numbers, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _image_folders(names: Iterable[str]) -> list[str]:
    """Return the folders of the images of those datasets of which they are known."""
    metadata = [MetadataCatalog.get(name) for name in names]
    ours = [x.images.root for x in metadata if x.get("images") is not None]
    return ours + [x.image_root for x in metadata if x.get("image_root")]


class TrainingLoader:
    """Batches without end, from the iteration that `start_at` sets."""

    def __init__(
        self,
        samples: SeededSamples,
        build_sampler: Callable[[int], Any],
        *,
        images: int,
        wide: np.ndarray | None,
        workers: int,
        timeout: float,
        content: Content,
    ) -> None:
        """Compose the loader.

        Args:
            samples: what is drawn from.
            build_sampler: from a seed to detectron2's sampler, or one of its kind.
            images: see `TrainingBatches`.
            wide: see `TrainingBatches`.
            workers: number of processes that map samples; 0: none but this one.
            timeout: seconds without a batch after which reading counts as hung; 0: for ever.
            content: what tells these data from others.
        """
        self.samples, self.timeout, self.content = samples, timeout, content
        self._build_sampler = build_sampler
        self.batches = TrainingBatches(build_sampler(samples.seed), images=images, wide=wide)
        self._loader = DataLoader(
            samples,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            # Of its own, or making an iterator would draw from the generator of all.
            generator=torch.Generator(),
        )

    @property
    def seed(self) -> int:
        """What order and augmentations come from."""
        return self.samples.seed

    @property
    def images(self) -> int:
        """Images of a batch, over all ranks."""
        return self.batches.images

    def start_at(self, images: int) -> None:
        """Let the next iterator begin after so many images."""
        self.batches.start = images // self.batches.images

    def place(self, images: int) -> dict[str, int]:
        """Return what `go_on` needs after so many images."""
        return {"images": images, "batch": self.images, "seed": self.seed, **self.content._asdict()}

    def go_on(self, place: dict[str, int], *, take_seed: bool) -> list[str]:
        """Begin the next iterator at a place.

        Args:
            place: of `place`.
            take_seed: draw as from its seed, not from this loader's.

        Returns:
            What differs, so that other images follow.

        Raises:
            ValueError: if it is no place.
        """
        if any(type(x) is not int for x in place.values()) or not 0 <= place["images"] <= _MOST_DRAWS:
            raise ValueError(f"the place in the data {place}"[:200])
        if take_seed:
            self.samples.seed = place["seed"]
            self.batches.sampler = self._build_sampler(place["seed"])
        self.start_at(place["images"])
        changed = []
        if place["seed"] != self.seed:
            changed.append(f"SEED {self.seed} instead of {place['seed']}")
        if place["batch"] != self.images:
            changed.append(f"SOLVER.IMS_PER_BATCH {self.images} instead of {place['batch']}")
        # Checkpoints from before 0.1.0 have no such numbers.
        changed += [
            f"other {what} in DATASETS.TRAIN"
            for what, number in zip(("images", "annotations"), self.content, strict=True)
            if place.get(f"{what[:-1]}_content", number) != number
        ]
        return changed

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield this rank's samples, batch by batch.

        Raises:
            HungError: if a batch takes too long; only in the main thread.
            WorkerLostError: if a worker was killed.
        """
        others = set(multiprocessing.active_children())
        batches = iter(self._loader)
        _let_no_death_raise()
        workers = set(multiprocessing.active_children()) - others
        while True:
            try:
                # PyTorch's own timeout does not watch over the hand-over of a sample that is ready.
                with _deadline(self.timeout):
                    batch = next(batches)
            except Exception as error:
                # Whose worker dies while it hands over a sample sees one of several errors, perhaps before
                # the worker is quite dead.
                if isinstance(error, HungError) or not wait([x.sentinel for x in workers], timeout=1):
                    raise
                raise WorkerLostError(
                    "a process that reads images was killed, most often because memory ran out: lower "
                    "DATALOADER.NUM_WORKERS or the size of the images"
                ) from error
            yield batch


class HungError(UserError):
    """No batch came in time."""


class WorkerLostError(UserError):
    """A process that reads images is gone."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise HungError(
            f"no batch came in {seconds:g} seconds (DATALOADER.FOCAL.TIMEOUT): reading images hangs"
        )

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, start = signal.signal(signal.SIGALRM, end), time.monotonic()
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # Whoever else has set the alarm gets it.
        left = max(others - (time.monotonic() - start), 1e-3) if others else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def _let_no_death_raise() -> None:
    """Take back PyTorch's handler of SIGCHLD.

    With it, the death of a worker raises wherever the program is, even half-way through an optimizer's step.
    Whoever waits for a batch finds out as well.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the main one finishes its iteration with its workers' help.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build_training_loader(cfg: CfgNode, mapper: Callable[[Any], Any]) -> Any:
    """Build the loader of `DATASETS.TRAIN`: a `TrainingLoader`, but for data that are no list of records.

    Those (a `torch.utils.data.Dataset` in detectron2's catalog) get detectron2's loader.

    Args:
        cfg: full config.
        mapper: from a record to a sample.

    Raises:
        UserError: if no image is left to train on, or for a sampler that there is not.
    """
    check_sampler(cfg)
    records = training_records(cfg)
    if not isinstance(records, list):
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        if not all("width" in x and "height" in x for x in records):
            raise UserError(
                "DATALOADER.ASPECT_RATIO_GROUPING is True, but some records of DATASETS.TRAIN have no width "
                "and height: set it to False, or give them"
            )
        wide = np.array([x["width"] > x["height"] for x in records])
    return TrainingLoader(
        SeededSamples(records, mapper, seed=seed),
        lambda seed: build_sampler(cfg, records, seed=seed),
        images=cfg.SOLVER.IMS_PER_BATCH,
        wide=wide,
        workers=cfg.DATALOADER.NUM_WORKERS,
        timeout=cfg.DATALOADER.FOCAL.TIMEOUT,
        content=content_of(records, _image_folders(cfg.DATASETS.TRAIN)),
    )
