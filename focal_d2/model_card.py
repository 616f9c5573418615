"""The card that a training puts into its checkpoints."""

from __future__ import annotations

import functools

import yaml
from detectron2.config import CfgNode

from focal_d2.config import key_value
from focal_d2.config.architectures import class_key
from focal_d2.data.datasets import known_class_names
from focal_d2.storage.card import ModelCard

_SECTIONS = ("VERSION", "MODEL", "INPUT", "TEST")
# Which file and which machine, and what that machine compiles.
_OF_THE_RUN = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.FOCAL.COMPILE", "TEST.EXPECTED_RESULTS")


def card_of(cfg: CfgNode) -> ModelCard:
    """Describe the model of a config.

    Args:
        cfg: full config. The class names are those of the first dataset of `DATASETS.TRAIN`, or of
            `DATASETS.TEST` if that is empty or its files are missing.
    """
    names = (known_class_names(name) for name in (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1]))
    classes = next((x for x in names if x is not None), None)
    counted_by = class_key(cfg)
    if classes is not None and counted_by and len(classes) != key_value(cfg, counted_by):
        classes = None
    content = yaml.safe_load(cfg.dump())
    content = {section: content[section] for section in _SECTIONS}
    for key in _OF_THE_RUN:
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, content).pop(name)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return ModelCard(None if classes is None else tuple(classes), text)
