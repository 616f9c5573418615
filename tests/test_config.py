from __future__ import annotations

from detectron2.config import CfgNode, get_cfg

from focal_d2 import add_focal_config
from focal_d2.config import _COUNTERPARTS, unread_keys
from tests.conftest import make_cfg


def test_unread_keys_names_what_is_read():
    cfg = make_cfg(
        MODEL__ROI_HEADS__NUM_CLASSES=7,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.5,
        MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=64,
        MODEL__MASK_ON=True,
    )
    assert unread_keys(cfg) == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 7, which FocalRetinaNet does not read: it reads "
        "MODEL.RETINANET.NUM_CLASSES, which is 3",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST is 0.5, which FocalRetinaNet does not read: it reads "
        "MODEL.RETINANET.SCORE_THRESH_TEST, which is 0.05",
        "FocalRetinaNet does not read MODEL.MASK_ON, MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    ]


def test_unread_keys_is_silent_on_good_configs_and_other_models():
    assert unread_keys(make_cfg()) == []
    other = make_cfg(MODEL__META_ARCHITECTURE="GeneralizedRCNN", MODEL__ROI_HEADS__NUM_CLASSES=7)
    assert unread_keys(other) == []


def test_counterparts_are_keys():
    cfg = get_cfg()
    add_focal_config(cfg)
    for pair in _COUNTERPARTS.items():
        for key in pair:
            section, name = key.split(".")
            assert name in cfg.MODEL[section], key


def test_a_written_config_has_no_unread_keys():
    cfg = make_cfg()
    again = make_cfg()
    again.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    assert unread_keys(again) == []
