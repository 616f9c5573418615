from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from focal_d2 import Predictor, UserError
from focal_d2.data.pictures import read_image
from focal_d2.data.pixels import ImageReader
from focal_d2.inference import Detections
from tests.conftest import make_cfg

uvicorn = pytest.importorskip("uvicorn")
from focal_d2.serve import Limits, build_app  # noqa: E402 - after the check that the packages are there


class Stub:
    """A predictor that finds one box, and may take as long as a test wants."""

    class_names = ("tree",)
    thresholds = (0.0,)
    operating_point = None
    window = 0

    def __init__(self):
        self.release = threading.Event()
        self.release.set()

    def in_tiles(self):
        return None

    def __call__(self, path):
        assert self.release.wait(20)
        read_image(path, ImageReader("BGR", "pil", 10**6))
        boxes = np.array([[1, 2, 3, 4]], np.float32)
        return Detections(boxes, np.array([0.5], np.float32), np.array([0]), self.class_names, 8, 9, path)


@contextmanager
def serving(predictor, limits=Limits(), hosts=("127.0.0.1",)):  # noqa: B008 - frozen
    app = build_app(predictor, limits, hosts=list(hosts))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def ask(port, method="GET", path="/", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def detect(port, body, **headers):
    status, headers, content = ask(port, "POST", "/detect", body, headers)
    return status, headers, json.loads(content)


def png(size=(64, 48), colour=(90, 120, 60)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def port():
    with serving(Stub(), Limits(megabytes=0.05)) as number:
        yield number


def test_the_answer_is_what_the_predictor_finds(tmp_path):
    cfg = make_cfg(
        MODEL__WEIGHTS=str(tmp_path / "model.pth"),
        MODEL__RETINANET__SCORE_THRESH_TEST=0.01,
        MODEL__RETINANET__NUM_CLASSES=3,
    )
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    predictor = Predictor(cfg, threshold=0.0)
    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = predictor(str(tmp_path / "a.png"))
    with serving(predictor) as port:
        status, _, answer = detect(port, (tmp_path / "a.png").read_bytes())
        described = json.loads(ask(port, path="/model")[2])
    assert (status, answer["width"], answer["height"], answer["tiles"]) == (200, 128, 96, False)
    assert len(answer["detections"]) == len(found) > 5
    boxes, scores, labels = found.rounded()
    assert [x["box"] for x in answer["detections"]] == boxes
    assert [x["score"] for x in answer["detections"]] == scores
    assert [x["name"] for x in answer["detections"]] == [str(k) for k in labels]
    assert described["class_names"] == ["0", "1", "2"]


def test_a_large_picture_is_detected_in_tiles(tmp_path):
    cfg = make_cfg(MODEL__WEIGHTS=str(tmp_path / "model.pth"), TEST__FOCAL__TILES__WINDOW=128)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with serving(Predictor(cfg, threshold=0.0)) as port:
        assert [detect(port, png(size))[2]["tiles"] for size in ((256, 200), (257, 200))] == [False, True]


def test_the_page_is_one_file_that_loads_nothing_else(port):
    status, headers, content = ask(port)
    assert status == 200
    assert b"<!doctype html>" in content[:20]
    for outside in (b"http://", b"https://", b"src=", b"@import"):
        assert outside not in content.replace(b"http://www.w3.org/2000/svg", b"")
    assert "default-src 'none'" in headers["content-security-policy"]


def bomb(side):
    """A PNG of side × side pixels in a few kilobytes."""
    row = b"\0" * (side // 8 + 1)
    data = zlib.compressobj(9)
    body = b"".join(data.compress(row) for _ in range(side)) + data.flush()

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"", 400, "the request has no body"),
        (b"nonsense", 422, "cannot read the picture: not an image of a format that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "cannot read the picture"),
        (png()[:60], 422, "cannot read the picture"),
        (b"GIF89a" + b"\xff" * 20, 422, "cannot read the picture"),
        (b"x" * 50_001, 413, "the picture has more than 0.05 MB"),
    ],
)
def test_what_is_no_picture_is_one_line(port, body, status, message):
    got, _, answer = detect(port, body)
    assert got == status
    assert answer["error"].startswith(message)
    assert "\n" not in answer["error"]
    assert "/tmp" not in answer["error"]


def test_a_decompression_bomb_is_refused(tmp_path):
    cfg = make_cfg(MODEL__WEIGHTS=str(tmp_path / "model.pth"), INPUT__FOCAL__MAX_PIXELS=1_000_000)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with serving(Predictor(cfg)) as port:
        status, _, answer = detect(port, bomb(4000))
        assert (status, "pixels" in answer["error"]) == (422, True), answer
        assert detect(port, png((1, 1)))[0] == 200


def test_a_body_without_a_length_is_limited_too(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST /detect HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            client.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_an_upload_that_does_not_end_is_given_up():
    with (
        serving(Stub(), Limits(seconds=0.2)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        client.sendall(b"POST /detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nx")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_more_pictures_than_may_wait_are_refused_with_a_time():
    stub = Stub()
    stub.release.clear()
    with serving(stub, Limits(waiting=2)) as port:
        answers: list[tuple[int, dict[str, str], dict[str, str]]] = []
        clients = [threading.Thread(target=lambda: answers.append(detect(port, png()))) for _ in range(6)]
        for client in clients:
            client.start()
        for _ in range(1000):  # three are taken, and the others answered at once
            if len(answers) == 3:
                break
            time.sleep(0.02)
        refused = list(answers)
        stub.release.set()
        for client in clients:
            client.join(20)
        assert [status for status, _, _ in refused] == [503] * 3
        for _, headers, answer in refused:
            assert answer["error"] == "busy: 3 pictures are waiting"
            assert int(headers["retry-after"]) >= 1
        assert [status for status, _, _ in answers[3:]] == [200] * 3
        assert detect(port, png())[0] == 200


def test_a_server_of_this_machine_answers_to_its_own_names_only(port):
    assert ask(port, headers={"Host": "evil.example"})[0] == 400


def test_a_fault_of_the_predictor_ends_no_server():
    class Faulty(Stub):
        def __call__(self, path):
            if not self.release.is_set():
                return super().__call__(path)
            raise UserError(f"cannot read image {path}: it is broken")

    with serving(Faulty()) as port:
        status, _, answer = detect(port, png())
        assert (status, answer) == (422, {"error": "cannot read the picture: it is broken"})
        assert ask(port, path="/model")[0] == 200
