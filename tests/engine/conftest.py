from __future__ import annotations

import logging

import pytest
from detectron2.utils.logger import setup_logger


@pytest.fixture(autouse=True)
def _fresh_loggers():
    """A job's log handlers hold the streams and folders of the test that ran it."""
    yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "focal_d2"):
        logging.getLogger(name).handlers.clear()
