"""Check the values of a config against the ranges of `focal_d2.config.RANGES`."""

from __future__ import annotations

from detectron2.config import CfgNode

from focal_d2.config import RANGES, key_value
from focal_d2.config.ranges import check_value
from focal_d2.config.unread_keys import has_known_parts, is_of_other_backbone, is_unused


def check_values(cfg: CfgNode, *sections: str) -> None:
    """Check the keys of a config, each by itself. What depends on two keys is checked where they are read.

    Args:
        cfg: full config.
        sections: beginnings of the keys to check; none: all that the config's job reads. A part of the model
            that neither detectron2 nor focal_d2 registered may give a key of detectron2 another meaning.

    Raises:
        UserError: naming the key, the value and the legal ones.
    """
    known = bool(sections) or has_known_parts(cfg)
    for key, range in RANGES.items():
        if sections:
            is_read = key.startswith(sections) and not is_of_other_backbone(cfg, key)
        else:
            is_read = (known or not key.startswith("MODEL.")) and not is_unused(cfg, key)
        if is_read:
            check_value(key, key_value(cfg, key), range)
