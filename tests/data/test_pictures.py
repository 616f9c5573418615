from __future__ import annotations

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.data.pictures import write_picture
from tests.conftest import REPOSITORY


def test_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/a\.png: No such file or directory"):
        write_picture(tmp_path / "gone" / "a.png", np.zeros((4, 4, 3), np.uint8))


def test_opencv_is_given_no_file_to_write():
    # Its imwrite ends the process for a name that is not UTF-8.
    files = [p for room in ("focal_d2", "examples") for p in (REPOSITORY / room).rglob("*.py")]
    assert len(files) > 100
    assert not [p for p in files if "cv2.imwrite(" in p.read_text()]
