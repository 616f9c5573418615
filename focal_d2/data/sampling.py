"""Which images are trained on, and how often: the records of training and the samplers over them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from focal_d2.annotations import Table, has_table
from focal_d2.config import check_choice
from focal_d2.data.datasets import load_table
from focal_d2.detectron2_compat import SamplerHooks
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


class ClassBalancedSampler(SamplerHooks, Sampler[int]):
    """An infinite stream of images in which every class has its turn equally often.

    Class-aware sampling (arXiv 1512.05830): the C classes that the data show come in rounds, each in a new
    order; a class's turn draws the next of the images that show it, and those come in rounds too. So an image
    has the share 1/C of the sum of 1/n(c) over its classes c, which n(c) images show. What an image shows
    beside the class whose turn it is comes on top. Beyond the paper, which has one class an image: images
    without boxes are drawn at random positions, as often as under uniform sampling.

    All ranks walk the same stream, and each takes every n-th image of n ranks.
    """

    def __init__(self, classes: Sequence[np.ndarray], *, seed: int) -> None:
        """Set up the stream of images.

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
        """Yield this rank's images, as positions in the list of images."""
        return itertools.islice(self.infinite_indices(), self.rank, None, self.ranks)

    def infinite_indices(self) -> Iterator[int]:
        """Yield the draws of all ranks."""
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
    """Return the pairs of an image and a class that it shows: (P,) positions of images, (P,) classes."""
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


def image_classes(cfg: CfgNode, records: Any = None, *, with_crowds: bool = False) -> list[np.ndarray]:
    """Return the different classes that each image of `DATASETS.TRAIN` shows, N arrays int64 ascending.

    Args:
        cfg: full config.
        records: those of `training_records`, where they are at hand. The tables of the datasets are read
            instead, if all have one.
        with_crowds: ignored regions count, too, unless they are of any class.
    """
    if all(map(has_table, cfg.DATASETS.TRAIN)):
        table = training_table(cfg, [(name, load_table(name).whole()) for name in cfg.DATASETS.TRAIN])
        return table.image_classes(with_ignored=with_crowds)
    shown = [
        {
            a["category_id"]
            for a in record.get("annotations", ())
            if (a["category_id"] != ANY_CLASS if with_crowds else not a.get("iscrowd", 0))
        }
        for record in (training_records(cfg) if records is None else records)
    ]
    return [np.array(sorted(classes), dtype=np.int64) for classes in shown]


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


def training_table(cfg: CfgNode, tables: Iterable[tuple[str, Table]]) -> Table:
    """Join the tables of datasets to train on, without the images that `training_records` leaves out.

    Args:
        cfg: full config.
        tables: the name of each dataset, and its table; at least one.
    """
    parts = []
    for name, table in tables:
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            # Records that a program or detectron2 registered keep their boxes without area.
            counts = table.objects if has_table(name) else ~table.ignored
            kept = np.unique(table.image[counts])
            table = table if len(kept) == len(table) else table.of_images(kept.tolist())
        parts.append(table)
    return parts[0] if len(parts) == 1 else Table.joined(parts)


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
    classes = image_classes(cfg, records)
    sampler: Sampler[int]
    if name == _CLASS_BALANCED:
        weights = class_balanced_weights(classes)
        sampler = ClassBalancedSampler(classes, seed=seed)
    else:
        factors = repeat_factors(cfg, records, name)
        weights = (factors / factors.sum()).numpy()
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
    logger.info(f"{name}: {describe_shares(classes, weights, names)}")
    return sampler


def repeat_factors(cfg: CfgNode, records: Any, name: str) -> torch.Tensor:
    """Return how often detectron2's sampler of that name repeats each record: (N,) float32."""

    def by_class(classes: Sequence[np.ndarray]) -> torch.Tensor:
        shown = [{"annotations": [{"category_id": k} for k in image.tolist()]} for image in classes]
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            shown, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )

    if name == _REPEAT_FACTOR:
        return by_class(image_classes(cfg, records, with_crowds=True))
    of_dataset = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    unknown = sorted(of_dataset.keys() - set(cfg.DATASETS.TRAIN))
    if unknown:
        raise UserError(f"DATASETS.TRAIN_REPEAT_FACTOR names {unknown[0]}, which DATASETS.TRAIN does not")
    parts = []
    for dataset in cfg.DATASETS.TRAIN:
        one = cfg.clone()
        one.defrost()
        one.DATASETS.TRAIN = (dataset,)
        # detectron2 counts the classes of crowds.
        classes = image_classes(one, with_crowds=True)
        part = torch.full((len(classes),), float(of_dataset.get(dataset, 1.0)))
        parts.append(part if name == "WeightedTrainingSampler" else part * by_class(classes))
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
