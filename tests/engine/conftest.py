from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from detectron2.utils.logger import setup_logger


@pytest.fixture
def small_job(job) -> Path:
    """A job with a small network and small checkpoints: several are written in a test."""
    config, _ = job
    content = yaml.safe_load(config.read_text())
    content["MODEL"]["RESNETS"] = {
        "DEPTH": 50,
        "STEM_OUT_CHANNELS": 32,
        "WIDTH_PER_GROUP": 32,
        "RES2_OUT_CHANNELS": 32,
        "NORM": "BN",
    }
    content["MODEL"]["FPN"]["OUT_CHANNELS"] = 32
    content["MODEL"]["RETINANET"]["NORM"] = ""
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.fixture(autouse=True)
def _fresh_loggers():
    """A job's log handlers hold the streams and folders of the test that ran it."""
    yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "focal_d2"):
        logging.getLogger(name).handlers.clear()
