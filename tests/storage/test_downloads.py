"""Addresses in configs: what may be fetched, and where the copy lies. All servers are on this machine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from focal_d2 import UserError
from focal_d2.engine import load_config
from focal_d2.storage import downloads
from focal_d2.storage.checkpoint import FocalCheckpointer, check_file
from focal_d2.storage.downloads import check_address, fetch
from tests.storage.test_checkpoint import Detector, save

CONTENT = b"SEED: 7\n"
ZOO = "https://dl.fbaipublicfiles.com/detectron2/"


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder with an empty cache folder in it; nothing outside the cache may be written."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    return tmp_path


def written(folder: Path) -> list[str]:
    """List the files outside the cache."""
    files = [x.relative_to(folder) for x in folder.rglob("*") if x.is_file()]
    return sorted(str(x) for x in files if x.parts[0] != "cache")


@contextmanager
def server(answers: dict[str, tuple[int, dict[str, str], bytes]] | None = None) -> Iterator[str]:
    """Answer every path with CONTENT, or as `answers` says; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = (answers or {}).get(self.path, (200, {}, CONTENT))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


@contextmanager
def dripping(before: bytes, every: float) -> Iterator[str]:
    """Accept one connection, send some bytes, and then one a time."""
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(before)
            while not stop.wait(every):
                try:
                    connection.sendall(b"a")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.pth"
        stop.set()
        thread.join()


# Paths behind a server's address; each would leave the cache folder in one way of reading it or another.
PATHS = [
    "../../site-packages/usercustomize.py",
    "../../../../../../../../../../tmp/planted",
    "%2e%2e/%2e%2e/usercustomize.py",
    "%252e%252e/%252e%252e/usercustomize.py",
    "..%2f..%2fusercustomize.py",
    "..\\..\\usercustomize.py",
    "%5c..%5c..%5cusercustomize.py",
    "a/%2e%2e%2f..",
    "..",
    "a/..;/../../usercustomize.py",
    "a?/../../../usercustomize.py",
    "a#/../../../usercustomize.py",
    "//etc/cron.d/planted",
    "%2fetc%2fcron.d%2fplanted",
    "a/../../..//usercustomize.py?x=/../y",
    "%00/../usercustomize.py",
    "." * 300 + "/../x",
    "a" * 300 + ".pth",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_address_of_a_config_leads_anywhere(world, path):
    with server() as address:
        (world / "config.yaml").write_text(f"_BASE_: '{address}{path}'")
        with pytest.raises(
            UserError, match=r"not in the stores of detectron2 \(unless .*--allow-download of"
        ):
            load_config(str(world / "config.yaml"), ["MODEL.DEVICE", "cpu"])
        with pytest.raises(UserError, match="not in the stores of detectron2"):
            FocalCheckpointer(Detector(), partial=False).load(f"{address}{path}")
        with pytest.raises(UserError, match="not in the stores of detectron2"):
            check_file(f"{address}{path}?matching_heuristics=True")
    assert written(world) == ["config.yaml"]
    assert not (world / "cache").exists()


@pytest.mark.parametrize("path", PATHS)
def test_allowed_download_stays_in_the_cache(world, path):
    with server() as address, suppress(UserError):  # of what no server could be asked for
        copy = Path(fetch(address + path, allow_download=True))
        assert copy.read_bytes() == CONTENT
        assert copy.resolve().is_relative_to(world / "cache/other")
    assert written(world) == []


STORED = [
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "detectron2://COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl",
    "catalog://ImageNetPretrained/MSRA/R-50",
    "catalog://Caffe2Detectron/COCO/35857345/e2e_faster_rcnn_R-50-FPN_1x",
    f"{ZOO}ImageNetPretrained/torchvision/R-50.pkl",
    "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906383/RegNetX-4.0GF_dds_8gpu.pyth",
]


@pytest.mark.parametrize("address", STORED)
def test_detectron2s_stores_need_no_flag_and_share_its_cache(world, address):
    url = check_address(address, allow_download=False)
    assert url.startswith("https://dl.fbaipublicfiles.com/")
    copy = world / "cache" / url.removeprefix("https://dl.fbaipublicfiles.com/")
    copy.parent.mkdir(parents=True)
    copy.write_bytes(CONTENT)
    assert fetch(address, allow_download=False) == str(copy)  # where iopath looks, and without a server


# What looks like a store and is none.
LOOKALIKES = [
    "detectron2://../evil/a.pkl",
    "detectron2://%2e%2e/evil/a.pkl",
    "detectron2://a/%252e%252e/%252e%252e/a.pkl",
    "detectron2://a\\..\\..\\a.pkl",
    "detectron2://a//b.pkl",
    "detectron2:///etc/passwd",
    "detectron2://a.pkl?to=/../x",
    "detectron2://a.pkl#x",
    "detectron2://a/\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/a.pkl",
    f"{ZOO}../evil/a.pkl",
    f"{ZOO}%2e%2e/evil/a.pkl",
    f"{ZOO.replace('https', 'http')}a.pkl",
    "https://dl.fbaipublicfiles.com/other/a.pkl",
    "https://dl.fbaipublicfiles.com.evil.org/detectron2/a.pkl",
    "https://dl.fbaipublicfiles.com@evil.org/detectron2/a.pkl",
    "https://evil.org/https://dl.fbaipublicfiles.com/detectron2/a.pkl",
    "HTTPS://dl.fbaipublicfiles.com/detectron2/../a.pkl",
    "file:///etc/passwd",
    "ftp://127.0.0.1/a.pkl",
]


@pytest.mark.parametrize("address", LOOKALIKES)
def test_what_only_looks_like_a_store_is_refused(world, address):
    with pytest.raises(UserError, match="not in the stores"):
        fetch(address, allow_download=False)
    assert not (world / "cache").exists()


@pytest.mark.parametrize("address", ["catalog://nothing", "catalog://../ImageNetPretrained/MSRA/R-50"])
def test_catalog_without_such_a_model(address):
    with pytest.raises(UserError, match="detectron2's catalog has no such model"):
        fetch(address, allow_download=True)


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1/a", "file:///etc/passwd", "http://", "http://h:x/", "http://h/ a"]
)
def test_other_schemes_are_refused_with_the_flag_too(world, address):
    with pytest.raises(UserError, match="can't be fetched; legal are https://"):
        fetch(address, allow_download=True)


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://127.0.0.1/a", "{}../evil/a.pkl", "http://127.0.0.2/a"]
)
def test_redirects_out_of_a_store_are_refused(world, monkeypatch, to):
    answers = {}
    with server(answers) as address:
        monkeypatch.setattr(downloads, "_HOST", address)
        answers["/detectron2/a.pkl"] = (302, {"Location": to.format(address)}, b"")
        answers["/detectron2/b.pkl"] = (302, {"Location": "/detectron2/c.pkl"}, b"")
        for allow in (False, True):
            with pytest.raises(UserError, match="not in the stores of detectron2|HTTPError: .*302"):
                fetch("detectron2://a.pkl", allow_download=allow)
        assert Path(fetch("detectron2://b.pkl", allow_download=False)).read_bytes() == CONTENT
    assert not list(world.rglob("a.pkl"))
    assert not list(world.rglob("*.tmp"))


def test_links_in_the_cache_are_not_written_through(world, monkeypatch):
    cache, outside = world / "cache/detectron2", world / "outside"
    cache.mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (cache / "folder").symlink_to(outside)
    (cache / "a.pkl").symlink_to(outside / "a.pkl")  # leads nowhere yet
    (cache / "b.pkl.lock").symlink_to(outside / "kept")
    with server() as address:
        monkeypatch.setattr(downloads, "_HOST", address)
        with pytest.raises(UserError, match="folder is linked to a place outside the cache folder"):
            fetch("detectron2://folder/x.pkl", allow_download=False)
        assert Path(fetch("detectron2://a.pkl", allow_download=False)).read_bytes() == CONTENT
        with pytest.raises(UserError, match="OSError: .*Too many levels of symbolic links"):
            fetch("detectron2://b.pkl", allow_download=False)
    assert (outside / "kept").read_text() == "kept"
    assert os.listdir(outside) == ["kept"]


@pytest.mark.parametrize(
    "before", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"]
)
@pytest.mark.parametrize("every", [60.0, 0.1])
def test_silent_and_dripping_servers_get_a_timeout(world, before, every):
    with (
        dripping(before, every) as address,
        pytest.raises(UserError, match="can't be fetched into .*[Tt]ime"),
    ):
        fetch(address, allow_download=True)
    assert not [x for x in (world / "cache").rglob("*") if x.is_file() and x.suffix != ".lock"]


@pytest.mark.parametrize(
    "headers, body, match",
    [
        ({"Content-Length": "20"}, CONTENT, "it ended after 8 of 20 bytes"),
        ({}, b"", "it ended after 0 of at least 1 bytes"),
        ({"Content-Length": "1000000000000"}, CONTENT, "it has 1000000000000 bytes, more than 1048576"),
        ({"Connection": "close", "Content-Length": "-1"}, CONTENT, "it ended after"),
        ({}, bytes(2**20 + 1), "more than 1048576"),
        ({"Content-Length": "many"}, CONTENT, "invalid literal"),
    ],
)
def test_downloads_are_whole_and_bounded(world, headers, body, match):
    with server({"/a": (200, headers, body)}) as address, pytest.raises(UserError, match=match):
        fetch(f"{address}a", allow_download=True, limit=2**20)
    with server({"/a": (404, {}, b"")}) as address, pytest.raises(UserError, match="HTTP Error 404"):
        fetch(f"{address}a", allow_download=True)
    assert not list(world.rglob("*.tmp"))


def test_same_name_on_another_server_is_another_file(world, monkeypatch):
    with server({"/detectron2/a.yaml": (200, {}, b"SEED: 8")}) as one, server() as two:
        first, second = (fetch(f"{x}detectron2/a.yaml", allow_download=True) for x in (one, two))
        assert (Path(first).read_bytes(), Path(second).read_bytes()) == (b"SEED: 8", CONTENT)
        monkeypatch.setattr(downloads, "_HOST", two)
        assert Path(fetch("detectron2://a.yaml", allow_download=False)).read_bytes() == CONTENT


def test_configs_and_weights_load_from_allowed_addresses(world):
    weights = Path(save(Detector(value=3), world / "a.pth")).read_bytes()
    answers = {
        "/configs/sub/c.yaml": (200, {}, b"_BASE_: ../base.yaml\nSOLVER: {MAX_ITER: 4}"),
        "/a.pth": (200, {}, weights),
    }
    with server(answers) as address:
        (world / "config.yaml").write_text(f"_BASE_: {address}configs/sub/c.yaml")
        cfg = load_config(str(world / "config.yaml"), ["MODEL.DEVICE", "cpu"], allow_download=True)
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (7, 4)
        ours = FocalCheckpointer(Detector(), partial=False, allow_download=True)
        for query in ("", "?matching_heuristics=True"):
            ours.load(f"{address}a.pth{query}")
            assert ours.model.value == 3
        # A file from elsewhere names no file of this machine.
        answers["/other.yaml"] = (200, {}, f"_BASE_: {world}/config.yaml".encode())
        (world / "config.yaml").write_text(f"_BASE_: {address}other.yaml")
        assert load_config(str(world / "config.yaml"), ["MODEL.DEVICE", "cpu"], allow_download=True).SEED == 7


@pytest.mark.parametrize(
    "override",
    [
        ["OUTPUT_DIR", "http://127.0.0.1/x"],
        ["DATASETS.TRAIN", "('https://h/a',)"],
        ["DATASETS.FOCAL", "[{'NAME': 'a', 'IMAGES': 'http://h/x', 'ANNOTATIONS': 'a.json'}]"],
        ["DATASETS.FOCAL", "[{'NAME': 'a', 'IMAGES': 'x', 'ANNOTATIONS': 'detectron2://a.json'}]"],
        ["DATASETS.PROPOSAL_FILES_TRAIN", "('http://h/a.pkl',)"],
    ],
)
def test_no_other_key_can_be_an_address(override):
    with pytest.raises(
        UserError, match=f"{override[0]}: .* is an address; only MODEL.WEIGHTS and _BASE_ can"
    ):
        load_config("", ["MODEL.DEVICE", "cpu", *override])


def test_proposals_are_refused(tmp_path):
    """detectron2 reads them with pickle, which runs what they name."""
    with pytest.raises(
        UserError, match="MODEL.LOAD_PROPOSALS is True: proposals are pickles .*--trust-files"
    ):
        load_config("", ["MODEL.DEVICE", "cpu", "MODEL.LOAD_PROPOSALS", "True"])
    assert load_config("", ["MODEL.DEVICE", "cpu", "MODEL.LOAD_PROPOSALS", "True"], trust_files=True)
