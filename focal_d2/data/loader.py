"""The training loader, whose batches depend on the seed and the iteration only, and that of evaluations."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from focal_d2.data.cache import with_cache
from focal_d2.data.handover import hand_over
from focal_d2.data.mixing import Mixing, build_mixing, check_unmixed
from focal_d2.data.sampling import build_sampler, check_sampler, training_records
from focal_d2.data.seeding import derived_seed, seeded
from focal_d2.data.workers import (
    HungError,
    WorkerLostError,
    deadline,
    let_no_death_raise,
    start_worker,
    starting_workers,
)
from focal_d2.detectron2_compat import infinite_indices
from focal_d2.errors import UserError

# More images than any training draws: to continue after so many would take an hour of counting.
_MOST_DRAWS = 10**9

# Tell the seeds of a sample's losses, and of what is mixed into it, from that of its augmentation.
_FOR_LOSSES = 1
_FOR_MIXING = 2


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
        for draw, image in enumerate(infinite_indices(self.sampler)):
            group = groups[0 if self.wide is None else int(self.wide[image])]
            group.append((draw, image))
            if len(group) == self.images:
                yield group[:]
                group.clear()


class SeededSamples(Dataset[dict[str, Any]]):
    """Mapped records; the augmentation of each is seeded by (seed, number of the draw).

    So are what is mixed into it, and its "sampling_seed", which losses that choose examples at random read.
    All are the same in any number of workers and ranks, and after a resumption.
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Callable[[Any], Any],
        *,
        mixing: Mixing | None,
        seed: int,
    ) -> None:
        """Take the records, which are packed as detectron2 does, so that workers share them.

        Args:
            records: in detectron2's format.
            mapper: from a record to a sample.
            mixing: puts other samples into one; None: each is of one record.
            seed: of all draws.
        """
        self.records, self.mapper, self.seed = DatasetFromList(records, copy=False), mapper, seed
        self.mixing = mixing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        """Map the record of (number of the draw, place in the list)."""
        draw, image = key
        with seeded(self.seed, draw):
            sample = self._read(image)
        if self.mixing is not None and draw < self.mixing.end:
            with seeded(self.seed, draw, _FOR_MIXING):
                sample = self.mixing(sample, self._read)
        sample["sampling_seed"] = derived_seed(self.seed, draw, _FOR_LOSSES)
        return sample

    def _read(self, image: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.mapper(self.records[image])
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
    """Batches without end, which have a state: the position in the data after the last trained batch.

    `count_batch` counts the trained batches. Batches that were only read, because workers read ahead or a
    step failed, are read again when training resumes.
    """

    def __init__(
        self,
        samples: SeededSamples,
        build_sampler: Callable[[int], Any],
        *,
        resumes_seed: bool,
        images: int,
        wide: np.ndarray | None,
        workers: int,
        timeout: float,
        pinned: bool,
        content: Content,
    ) -> None:
        """Compose the loader.

        Args:
            samples: what is drawn from.
            build_sampler: from a seed to detectron2's sampler, or one of its kind.
            resumes_seed: `load_state_dict` takes the saved seed, because the config has none. Otherwise the
                seed of `samples` is kept.
            images: see `TrainingBatches`.
            wide: see `TrainingBatches`.
            workers: number of processes that map samples; 0: none but this one.
            timeout: seconds without a batch after which reading counts as hung; 0: for ever.
            pinned: copy images to pinned memory, for a GPU.
            content: what tells these data from others.
        """
        self.samples, self.timeout, self.content = samples, timeout, content
        self._build_sampler = build_sampler
        self._resumes_seed = resumes_seed
        self._images_done = 0
        self.batches = TrainingBatches(build_sampler(samples.seed), images=images, wide=wide)
        self._loader = DataLoader(
            samples,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=partial(hand_over, pinned=pinned),
            pin_memory=pinned,
            worker_init_fn=start_worker,
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
        """Begin the next iterator, and the count of images, after so many images."""
        self._images_done = images
        self.batches.start = images // self.images

    def count_batch(self) -> None:
        """Count one more batch as trained on."""
        self._images_done += self.images

    def state_dict(self) -> dict[str, int]:
        """Return how many images were trained on, and the numbers that decide which images those are."""
        return {
            "images": self._images_done,
            "batch": self.images,
            "seed": self.seed,
            **self.content._asdict(),
        }

    def load_state_dict(self, state: dict[str, int]) -> list[str]:
        """Begin the next iterator where a state was taken.

        Args:
            state: of `state_dict`. Only the number of images is required.

        Returns:
            A clause for each setting that changed, so that other images follow; empty if the same images do.

        Raises:
            ValueError: if the state is damaged.
        """
        if any(type(x) is not int for x in state.values()) or not 0 <= state["images"] <= _MOST_DRAWS:
            raise ValueError(f"the position in the data {state}"[:200])
        self.start_at(state["images"])
        if "seed" not in state:
            return ["the checkpoint does not say which images were drawn"]
        if self._resumes_seed:
            self.samples.seed = state["seed"]
            self.batches.sampler = self._build_sampler(state["seed"])
        changed = []
        if state["seed"] != self.seed:
            changed.append(f"SEED {self.seed} instead of {state['seed']}")
        if state["batch"] != self.images:
            changed.append(f"SOLVER.IMS_PER_BATCH {self.images} instead of {state['batch']}")
        # Checkpoints from before 0.1.0 have no checksums.
        changed += [
            f"other {what} in DATASETS.TRAIN"
            for what, number in zip(("images", "annotations"), self.content, strict=True)
            if state.get(f"{what[:-1]}_content", number) != number
        ]
        return changed

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield this rank's samples, batch by batch.

        Raises:
            HungError: if a batch takes too long; only in the main thread.
            WorkerLostError: if a worker was killed.
        """
        others = set(multiprocessing.active_children())
        with starting_workers():
            batches = iter(self._loader)
        let_no_death_raise()
        workers = set(multiprocessing.active_children()) - others
        while True:
            try:
                # PyTorch's own timeout does not watch over the hand-over of a sample that is ready.
                with deadline(self.timeout):
                    batch = next(batches)
            except Exception as error:
                if isinstance(error, HungError):
                    # The thread that pins memory may wait for one of them, and PyTorch waits for the thread.
                    for worker in workers:
                        worker.kill()
                    raise
                # Whose worker dies while it hands over a sample sees one of several errors, perhaps before
                # the worker is quite dead.
                if not wait([x.sentinel for x in workers], timeout=1):
                    raise
                raise WorkerLostError(
                    "a process that reads images was killed, most often because memory ran out: lower "
                    "DATALOADER.NUM_WORKERS or the size of the images"
                ) from error
            yield batch


class _HandedOver:
    """A mapper whose samples are prepared for their way; None, which makes detectron2 draw again, stays."""

    def __init__(self, mapper: Callable[[Any], Any], *, pinned: bool) -> None:
        self.mapper, self.pinned = mapper, pinned

    def __call__(self, record: Any) -> Any:
        sample = self.mapper(record)
        return None if sample is None else hand_over(sample, pinned=self.pinned)


def build_evaluation_loader(cfg: CfgNode, dataset_name: str, mapper: Callable[[Any], Any]) -> DataLoader:
    """Build detectron2's test loader; for a GPU its images come from pinned memory."""
    collate = partial(hand_over, pinned=_pins(cfg))
    loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper, collate_fn=collate)
    loader.pin_memory = _pins(cfg)  # detectron2's function has no argument for it
    return loader


def _pins(cfg: CfgNode) -> bool:
    """Return whether images go to pinned memory: then the copy to a GPU does not block the host."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


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
    pinned = _pins(cfg)
    if not isinstance(records, list):
        check_unmixed(cfg)
        mapper = with_cache(cfg, mapper, None)
        # Each sample by itself: detectron2 makes the batches elsewhere.
        return build_detection_train_loader(
            cfg, mapper=_HandedOver(mapper, pinned=pinned), dataset=records, pin_memory=pinned
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        if not all("width" in x and "height" in x for x in records):
            raise UserError(
                "DATALOADER.ASPECT_RATIO_GROUPING is True, but some records of DATASETS.TRAIN have no width "
                "and height: set it to False, or give them"
            )
        wide = np.array([x["width"] > x["height"] for x in records])
    mapper = with_cache(cfg, mapper, records)
    return TrainingLoader(
        SeededSamples(records, mapper, mixing=build_mixing(cfg, records), seed=seed),
        lambda seed: build_sampler(cfg, records, seed=seed),
        resumes_seed=cfg.SEED < 0,
        images=cfg.SOLVER.IMS_PER_BATCH,
        wide=wide,
        workers=cfg.DATALOADER.NUM_WORKERS,
        timeout=cfg.DATALOADER.FOCAL.TIMEOUT,
        pinned=pinned,
        content=content_of(records, _image_folders(cfg.DATASETS.TRAIN)),
    )
