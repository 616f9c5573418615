"""Every hostile file: those of the tests, made by the tests' own makers, and more."""

# ruff: noqa: E501 - the bytes of a file stay on one line

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from PIL import Image

from focal_d2.commands.cli import run_command
from tests.config import test_files as test_config_files
from tests.config.test_legal_values import NONSENSE
from tests.conftest import REPOSITORY, CocoDataset
from tests.data import test_broken_inputs, test_pixels
from tests.data.hostile_images import FOREIGN
from tests.data.readers import test_fuzz
from tests.engine import test_resume
from tests.hostile.harness import Case, Place
from tests.storage import test_checkpoint, test_downloads, test_weights, test_yaml_text

DATA = "mine"  # the NAME of the good dataset


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a backbone that costs nothing: the programs get it, since they are forked from this process."""
    return FPN(_Stages(), list(_Stages.STRIDES), 32, norm="", top_block=LastLevelP6P7(32, 32, "res5"))


class _Stages(Backbone):
    STRIDES: ClassVar = {"res3": 8, "res4": 16, "res5": 32}

    def __init__(self) -> None:
        super().__init__()
        self.res3 = torch.nn.Conv2d(3, 32, 8, stride=8)
        self.res4 = torch.nn.Conv2d(32, 32, 2, stride=2)
        self.res5 = torch.nn.Conv2d(32, 32, 2, stride=2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for name in self.STRIDES:
            found[name] = x = getattr(self, name)(x)
        return found

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=32, stride=stride) for name, stride in self.STRIDES.items()}


_SMALL = {
    "SEED": 1,
    "MODEL": {
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_tiny_fpn_backbone", "FREEZE_AT": 0},
        "FPN": {"NORM": "", "OUT_CHANNELS": 32},
        "RETINANET": {"NUM_CLASSES": 3, "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.001},
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 1, "BASE_LR": 0.001},
    "INPUT": {"MIN_SIZE_TRAIN": [0], "MIN_SIZE_TEST": 0},
}


def make_template(folder: Path) -> None:
    """Write what is good: images, annotations, checkpoints of two iterations and a saved step.

    The process must end afterwards: once PyTorch has computed a gradient, a fork of it hangs.

    Args:
        folder: to be made.
    """
    from tests.commands.test_replay import save

    data = CocoDataset(folder / "data", images=3)
    run = folder.parent / "run"
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(data.images, data.annotations, run)))
    settings = ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
    run_command("train", ["--config-file", str(config), *settings])
    (folder / "run").mkdir()
    for name in ("model_0000000.pth", "model_final.pth", "last_checkpoint"):
        (run / name).rename(folder / "run" / name)
    config.unlink()
    step = save(folder.parent / "steps", MODEL__BACKBONE__NAME="build_tiny_fpn_backbone", MODEL__FPN__NORM="")
    step.rename(folder / "step")


def _config(images: Path, annotations: Path, out: Path) -> dict[str, Any]:
    config = copy.deepcopy(_SMALL)
    entry = {"NAME": DATA, "IMAGES": str(images), "ANNOTATIONS": str(annotations)}
    config |= {"_BASE_": str(REPOSITORY / "configs/Base-FocalRetinaNet.yaml"), "OUTPUT_DIR": str(out)}
    return {**config, "DATASETS": {"FOCAL": [entry], "TRAIN": [DATA], "TEST": []}}


def good_config(place: Place, **changes: Any) -> Path:
    """Write a good config; returns its path.

    Args:
        place: of the case.
        changes: values of keys with dots written as double underscores.
    """
    data = place.input / "data"
    config = _config(data / "images", data / "annotations.json", place.out)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config
        for x in sections:
            section = section.setdefault(x, {})
        section[name] = value
    path = place.input / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def job(place: Place, **changes: Any) -> list[str]:
    """Return the arguments of a good job."""
    return ["--config-file", str(good_config(place, **changes))]


def arguments(program: str, place: Place, *overrides: str, **changes: Any) -> list[str]:
    """Return the arguments with which a program reads the files in their usual places."""
    weights = ["MODEL.WEIGHTS", str(place.input / "run/model_final.pth")]
    tested = {"DATASETS__TEST": [DATA]} if program in ("eval", "doctor", "anchors") else {}
    base = job(place, **(tested | changes))
    match program:
        case "eval":
            return [*base, *weights, *overrides]
        case "resume":
            return [*base, "--resume", "SOLVER.MAX_ITER", "3", *overrides]
        case "predict":
            pictures = [str(place.input / "data/images"), "--output", str(place.out / "pictures")]
            return [*base, *pictures, *weights, *overrides]
        case "doctor":
            return [*base, *overrides]
        case "study":
            study = ["--grid", str(place.input / "grid.yaml"), "--output", str(place.out / "study")]
            return [*base, *study, *overrides]
        case "replay":
            return [str(place.input / "step")]
    return [*base, *overrides]


GOOD = "good files"
Groups = Iterator[Case]


def corpus() -> list[Case]:
    """Return all cases, by group."""
    groups = (addresses, programs, checkpoints, yaml_bombs, configs, values, images, annotations)
    groups += (boxes, weights, steps, grids, names, places, terminal)
    return [case for group in groups for case in group()]


def good() -> Groups:
    """Good files, for comparison."""
    for program in ("train", "eval", "resume", "predict", "doctor", "replay", "anchors"):

        def make(place: Place, program: str = program) -> list[str]:
            _copy_run(place)
            return arguments(program, place)

        yield Case(GOOD, f"{program} on good files", program, make)


def _copy_run(place: Place) -> None:
    for path in (place.input / "run").iterdir():
        (place.out / path.name).write_bytes(path.read_bytes())


def trusted() -> Groups:
    """Files that run code, given to programs that trust them: what this harness must see."""

    def config(place: Place) -> list[str]:
        path = place.input / "trusted.yaml"
        path.write_text("SEED: !!python/object/apply:os.system ['touch planted']")
        return ["--config-file", str(path), "--trust-files"]

    def weights(place: Place) -> list[str]:
        path = place.input / "trusted.pth"
        torch.save({"model": test_weights.Evil(place.folder / "home/planted")}, path)
        return [*job(place), "--trust-files", "MODEL.WEIGHTS", str(path)]

    yield Case("trusted files", "a config", "train", config)
    yield Case("trusted files", "weights", "eval", weights)


# 1: addresses


def addresses() -> Groups:
    """A config that names an address, with and without leave to fetch it."""
    lookalikes = [
        *test_downloads.LOOKALIKES,
        "//127.0.0.1/a.pkl",
        "file:/etc/passwd",
        "http:/127.0.0.1:9/x.pkl",
    ]
    lookalikes += [
        "https://dl.fbaipublicfiles.com:443/detectron2/a.pkl",
        "detectron2:\\\\a.pkl",
        "http://[::1",
    ]
    lookalikes += ["HtTp://127.0.0.1:9/x", "http://127.0.0.1:9/\r\nX: y", "s3://bucket/x", "manifold://x"]
    lookalikes += [
        "detectron2://",
        "catalog://",
        "catalog://ImageNetPretrained/MSRA/R-50?x",
        "http://" + "a" * 10**5,
    ]
    lookalikes += ["detectron2://" + "%2e" * 3000, "https://dl.fbaipublicfiles.com/detectron2/%00.pkl"]
    for text in lookalikes:
        for key in ("_BASE_", "MODEL.WEIGHTS"):
            yield Case("1 addresses", f"{key} {text[:60]!r}", "train", _with_address(text, key, False))
        yield Case(
            "1 addresses", f"eval of {text[:60]!r}", "eval", _with_address(text, "MODEL.WEIGHTS", False)
        )
    for key in ("OUTPUT_DIR", "DATASETS.PROPOSAL_FILES_TRAIN"):
        value = '["http://h/a.pkl"]' if key.endswith("TRAIN") else "http://h/x"
        yield Case("1 addresses", f"{key} {value}", "train", lambda p, k=key, v=value: [*job(p), k, v])
    proposals = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "['evil.pkl']"]
    yield Case("1 addresses", "pickled proposals", "train", lambda p: [*job(p), *proposals])
    for path in [*test_downloads.PATHS, "a/./../..", ".%00.", "a.yaml%0d%0aX:y", "CON", "~/x", "a\u202eb"]:
        for key in ("_BASE_", "MODEL.WEIGHTS"):
            name = f"{key} http://HOST/{path[:50]!r}"
            yield Case("1 addresses", name, "train", _with_path(path, key, False))
            yield Case(
                "1 addresses",
                f"--allow-download {name}",
                "train",
                _with_path(path, key, True),
                may_connect=True,
            )


def _with_address(text: str, key: str, allow: bool) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        flags = ["--allow-download"] if allow else []
        config = job(place, **({"_BASE_": text} if key == "_BASE_" else {"MODEL__WEIGHTS": text}))
        return [*config, *flags]

    return make


def _with_path(path: str, key: str, allow: bool) -> Callable[[Place], list[str]]:
    """Name a path of the server of the run, whose port is in the environment."""
    return lambda place: _with_address(f"http://127.0.0.1:{os.environ['HOSTILE_PORT']}/{path}", key, allow)(
        place
    )


# 2: programs


def programs() -> Groups:
    """Pictures of other formats under the names of those that are read."""
    foreign = {**FOREIGN, **_more_foreign()}
    for kind, data in foreign.items():
        for program in ("train", "predict", "doctor"):
            for backend in ("pil", "opencv"):
                if program == "doctor" and backend == "opencv":
                    continue

                def make(
                    place: Place, data: bytes = data, program: str = program, backend: str = backend
                ) -> list[str]:
                    _replace_images(place, data)
                    return arguments(program, place, INPUT__FOCAL__BACKEND=backend)

                yield Case(
                    "2 pictures that start programs", f"{kind} as .png ({program}, {backend})", program, make
                )


def _more_foreign() -> dict[str, bytes]:
    ps = FOREIGN["EPS"]
    jpeg = test_pixels.JPEGS["jpeg"]
    png = test_pixels.PNG
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return {
        "EPS after white space": b"\n \n" + ps,
        "EPS with a byte order mark": b"\xef\xbb\xbf" + ps,
        "PostScript without EPSF": ps.replace(b" EPSF-3.0", b""),
        "JPEG and then EPS": jpeg + ps,
        "PNG and then EPS": png + ps,
        "EPS with a JPEG inside": ps + jpeg,
        "EPS in a TIFF's header": b"II*\0" + ps,
        "MVG": b"push graphic-context\nviewbox 0 0 9 9\nfill 'url(https://h/\"|touch planted\")'\npop graphic-context\n",
        "SVG": svg,
        "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch/F(sh)>>>>endobj\ntrailer<</Root 1 0 R>>",
        "an HTML page": b"<html><script>alert(1)</script></html>",
        "a shell script": b"#!/bin/sh\ntouch planted\n",
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(500),
        "GRIB": b"GRIB" + bytes(3) + b"\1" + bytes(500),
        "BUFR": b"BUFR" + bytes(500),
        "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">2IHH", 64, 64, 8, 3) + bytes(500),
        "FLI": b"\0\0\0\0\x11\xaf" + bytes(200),
        "PCD": bytes(2048) + b"PCD_" + bytes(2048),
        "MPEG": b"\0\0\1\xb3" + bytes(500),
        "WAL": bytes(32) + struct.pack("<2I", 64, 64) + bytes(500),
        "FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(5000),
        "OpenEXR": b"\x76\x2f\x31\x01" + bytes(500),
        "a pickle": pickle.dumps(test_weights.Evil("planted")),
        "NumPy": b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128)
        + b"cos\nsystem\n",
    }


def _replace_images(place: Place, data: bytes) -> None:
    for path in (place.input / "data/images").iterdir():
        path.write_bytes(data)


# 3, 4, 12: checkpoints


def checkpoint_files() -> dict[str, Callable[[Path], None]]:
    """Return what writes hostile files of weights, by a name that ends in the format."""
    w = test_weights
    makers: dict[str, Callable[[Path], None]] = {}
    for name, (make, _) in w.UNSOUND.items():
        makers[f"{name}.pth"] = make
    for name, (suffix, content, _) in w.GREEDY.items():
        if suffix == "pth":
            makers[f"{name}.pth"] = w.torch_file(content)
            makers[f"{name}, older format.pth"] = w.bytes_of(
                *w.magic(b"\x80\2" + content + b".", pickle.dumps(["0"], 2))
            )
        else:
            makers[f"{name}.pkl"] = w.bytes_of(b"\x80\2" + content + b".")
    for i, data in enumerate(w.LIES):
        makers[f"a length that lies {i}.pkl"] = w.bytes_of(data)
    for name, (make, _) in w.REFUSED.items():
        makers[f"{name}.pkl"] = lambda path, make=make: path.write_bytes(
            pickle.dumps({"model": make(path.parent / "planted")}, 2)
        )
        makers[f"{name}.pth"] = lambda path, make=make: torch.save(
            {"model": make(path.parent / "planted")}, path
        )
        makers[f"{name}, older format.pth"] = lambda path, make=make: torch.save(
            {"model": make(path.parent / "planted")}, path, _use_new_zipfile_serialization=False
        )
    for name, content in _hostile_pickles().items():
        makers[f"{name}.pkl"] = w.bytes_of(b"\x80\2" + content + b".")
        makers[f"{name}.pth"] = w.torch_file(content)
        makers[f"{name}.pyth"] = w.torch_file(content)
        makers[f"{name}, older format.pth"] = w.bytes_of(
            *w.magic(b"\x80\2" + content + b".", pickle.dumps(["0"], 2))
        )
    makers |= {
        "many entries.pth": _many_entries,
        "a sparse file of 4 TB.pth": lambda path: _sparse(path, b"PK\3\4"),
        "a sparse file of 4 TB.pkl": lambda path: _sparse(path, b"\x80\2"),
        "a sparse pickle, older format.pth": lambda path: _sparse(path, b"".join(w.magic())),
        "a GZIP file.pth": w.bytes_of(b"\x1f\x8b\x08" + bytes(100)),
        "a bomb, compressed.pth": _compressed,
        "TorchScript.pth": _script,
        "a pickle in a name.pth": w.archive_of(("a/data.pkl/x", w.DEEP), ("a/data.pkl", w.GOOD)),
        "a name with NUL.pth": w.archive_of(("a/data.pkl\0x", w.DEEP), ("a/data.pkl", w.GOOD)),
        "a name of Windows.pth": w.archive_of(("a\\data.pkl", w.DEEP), ("a/data.pkl", w.GOOD)),
        "names of 60,000 characters.pth": w.archive_of(("a/" + "b" * 60_000, b""), ("a/data.pkl", w.GOOD)),
        "a byteorder of 5 MB.pth": w.archive_of(("a/data.pkl", w.GOOD), ("a/byteorder", bytes(5 * 2**20))),
    }
    return makers


def _hostile_pickles() -> dict[str, bytes]:
    """Return pickles, without start and end, that get past a check of one kind or another."""
    w = test_weights
    tensor = w.REBUILD + b"K\0"
    mine = w.text(b"model")
    weight = w.text(b"backbone.fpn_lateral3.weight")
    good_tensor = w.tensor_of(b"K\4\x85", b"K\1\x85")
    return {
        **{f"endless: {name}": content for name, (content, _) in w.ENDLESS.items()},
        "a module of torch, called": b"ctorch\n_dynamo\n)R",
        "torch.hub": b"ctorch\nhub\n",
        "a storage that is a list of lists": b"ctorch._utils\n_rebuild_tensor_v2\n(" + w.LISTS + b"Q",
        "a list of lists for weights": b"}" + mine + w.LISTS + b"s",
        "a list of lists for a weight": b"}" + mine + b"}" + weight + w.LISTS + b"ss",
        "a list of itself for weights": b"}" + mine + b"]q\0h\0as",
        "a list of itself for a weight": b"}" + mine + b"}" + weight + b"]q\0h\0ass",
        "a dictionary of itself": b"}q\0" + mine + b"h\0s",
        "lists in lists for a weight": b"}" + mine + b"}" + weight + b"]" * 100_000 + b"a" * 99_999 + b"ss",
        "dictionaries in dictionaries": b"}" + mine + (b"}" + w.text(b"a")) * 60_000 + b"N" + b"s" * 60_001,
        "metadata of itself": b"}" + mine + b"ccollections\nOrderedDict\n)Rq\0}X\x09\0\0\0_metadatah\0sbs",
        "metadata that is a list": b"}" + mine + b"ccollections\nOrderedDict\n)R}X\x09\0\0\0_metadata]sbs",
        "an array that is never filled": b"}"
        + mine
        + b"}"
        + weight
        + b"cnumpy.core.multiarray\n_reconstruct\n)Rss",
        "a type for a weight": b"}" + mine + b"}" + weight + b"ctorch\nFloatStorage\nss",
        "a function for a weight": b"}" + mine + b"}" + weight + b"ccollections\nOrderedDict\nss",
        "a key of 5 MB": b"}" + mine + b"}" + w.text(b"x" * 5 * 2**20) + good_tensor + b"ss",
        "a key of escapes": b"}" + mine + b"}" + w.text(b"\x1b]0;owned\x07\x1b[2J") + good_tensor + b"ss",
        "a key of lines": b"}" + mine + b"}" + w.text(b"a\nTraceback: x\r\nb") + good_tensor + b"ss",
        "a key that is a number": b"}" + mine + b"}K\1" + good_tensor + b"ss",
        "a key that is None": b"}N" + good_tensor + b"s",
        "weights that are a text": b"}" + mine + mine + b"s",
        "a weight of 2^40 on the meta device": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R",
        "a file within": b"ctorch\nload\n" + w.text(b"/etc/passwd") + b"\x85R",
        "a class of PyTorch": b"ctorch.nn.modules.linear\nLinear\n)\x81",
        "a function of PyTorch by a path": b"ctorch\nhub.load\n)R",
        "a builtin": b"cbuiltins\neval\n" + w.text(b"open('planted','w')") + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\nctorch\nfloat32\n" + w.text(b"__class__") + b"\x86R",
        "a dtype of objects": b"cnumpy\ndtype\n" + w.text(b"O") + b"\x85R",
        "marks alone": b"(" * 400_000 + b"N",
        "a counter of a counter": b"ccollections\nCounter\n}q\0" + w.text(b"a") + b"h\0s\x85R",
        "NaN as size": tensor + b"G\x7f\xf8\0\0\0\0\0\0\x85K\1\x85\x89}tR",
        "an offset of 2^62": tensor[:-2] + w.number(2**62) + b"K\1\x85K\1\x85\x89}tR",
        "400 axes": tensor + b"(" + b"K\1" * 400 + b"t(" + b"K\1" * 400 + b"t\x89}tR",
        "a storage that is called ..": tensor.replace(b"X\1\0\0\0" + b"0", w.text(b"../data.pkl"))
        + b"K\1\x85K\1\x85\x89}tR",
        "a storage with a long name": tensor.replace(b"X\1\0\0\0" + b"0", w.text(b"0" * 10**6))
        + b"K\1\x85K\1\x85\x89}tR",
        "a gradient of a tensor": tensor + b"K\1\x85K\1\x85" + good_tensor + b"}tR",
        "a float of 10^6 digits": b"F" + b"1" * 10**6 + b"\n",
        "a whole number of 10^6 digits": b"L" + b"1" * 10**6 + b"L\n",
        "an unfinished text": b"X\xff\xff\xff\x7fabc",
        "places of the memo without end": b"N"
        + b"".join(b"r" + i.to_bytes(4, "little") for i in range(0, 2**31, 2**13)),
    }


def _sparse(path: Path, start: bytes) -> None:
    path.write_bytes(start)
    os.truncate(path, 2**42)


def _many_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", test_weights.GOOD)
        for i in range(200_000):
            archive.writestr(f"a/{i}", b"")


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a/data.pkl", b"(" + b"N" * 2**27)


def _script(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(torch.nn.ReLU()).save(str(path))


def checkpoints() -> Groups:
    """Files of weights: to start from, to evaluate and predict with, to resume from."""
    makers = checkpoint_files()
    for name, make in makers.items():
        group = "3, 4 checkpoints"
        suffix = name.rpartition(".")[2]

        def write(place: Place, make: Callable[[Path], None] = make, suffix: str = suffix) -> str:
            path = place.input / f"weights.{suffix}"
            make(path)
            return str(path)

        yield Case(group, f"{name} to evaluate", "eval",
                   lambda p, write=write: [*job(p), "MODEL.WEIGHTS", write(p)])  # fmt: skip
        if suffix == "pth":
            yield Case(group, f"{name} to resume from", "resume",
                       lambda p, make=make: _resume_from(p, make))  # fmt: skip
    for name in (
        "lists in lists for a weight.pkl",
        "a list of lists for weights.pth",
        "deep.pth",
        "TorchScript.pth",
    ):
        for program in ("train", "predict"):
            yield Case("3, 4 checkpoints", f"{name} ({program})", program,
                       lambda p, n=name, g=program: _start_from(p, g, n, makers[n]))  # fmt: skip


def _resume_from(place: Place, make: Callable[[Path], object]) -> list[str]:
    _copy_run(place)
    make(place.out / "model_final.pth")
    return arguments("resume", place)


def _start_from(place: Place, program: str, name: str, make: Callable[[Path], None]) -> list[str]:
    path = place.input / f"weights.{name.rpartition('.')[2]}"
    make(path)
    return [*arguments(program, place), "MODEL.WEIGHTS", str(path)]


def _content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def weights() -> Groups:
    """Checkpoints that are read, of values that no run has."""
    for name, damage in test_checkpoint.DAMAGES.items():
        if "weight" in name and name != "weights alone":
            continue  # they change an entry that this model does not have
        yield Case("12 weights and states", f"{name} to resume from", "resume",
                   lambda p, damage=damage: _resume_from(p, damage))  # fmt: skip
    for name, spoil in {**test_resume.SPOILT, **_spoilt_states()}.items():

        def make(path: Path, spoil: Callable[[Any], object] = spoil) -> None:
            content = _content(path)
            spoil(content["trainer"])
            torch.save(content, path)

        yield Case(
            "12 weights and states", f"state: {name}", "resume", lambda p, make=make: _resume_from(p, make)
        )
    for name, spoil in _spoilt_weights().items():

        def make(path: Path, spoil: Callable[[Any], Any] = spoil) -> None:
            content = _content(path)
            spoil(content)
            torch.save(content, path)

        yield Case("12 weights and states", f"weights: {name}, to resume from", "resume",
                   lambda p, make=make: _resume_from(p, make))  # fmt: skip
        yield Case("12 weights and states", f"weights: {name}, to evaluate", "eval",
                   lambda p, make=make: (make(p.input / "run/model_final.pth"), arguments("eval", p))[1])  # fmt: skip


def _every_leaf(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(state, dict):
        for key, x in state.items():
            yield (*path, key)
            yield from _every_leaf(x, (*path, key))
    elif isinstance(state, (list, tuple)):
        for i, x in enumerate(state[:2]):
            yield from _every_leaf(x, (*path, i))


def _spoilt_states() -> dict[str, Callable[[Any], object]]:
    bad: dict[str, Any] = {
        "None": None,
        "a text": "x" * 10,
        "2^70": 2**70,
        "-1": -1,
        "NaN": math.nan,
        "a list": [[]],
        "a dictionary": {"x": {}},
        "a tensor": torch.zeros(3),
        "a tensor of 2^40": torch.zeros(1).expand(2**20, 2**20),
    }

    def spoil(state: Any, keys: tuple[Any, ...], value: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    found: dict[str, Callable[[Any], object]] = {}
    path = os.environ.get("HOSTILE_TEMPLATE")
    if not path:
        return found
    trainer = _content(Path(path) / "run/model_final.pth")["trainer"]
    draw = random.Random(0)
    leaves = list(dict.fromkeys(_every_leaf(trainer)))
    # Of hundreds of parameters of one kind, two.
    leaves = [x for x in leaves if len(x) < 5 or all(not isinstance(k, int) or k < 2 for k in x)]
    for keys in leaves:
        for name in draw.sample(sorted(bad), 3):
            label = f"{'.'.join(map(str, keys))} is {name}"
            found[label] = lambda s, keys=keys, name=name: spoil(s, keys, bad[name])
    return found


def _spoilt_weights() -> dict[str, Callable[[Any], Any]]:
    key = "head.cls_score.weight"

    def set_to(make: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
        return lambda content: content["model"].update({key: make(content["model"][key])})

    return {
        "NaN": set_to(lambda x: torch.full_like(x, math.nan)),
        "infinity": set_to(lambda x: torch.full_like(x, math.inf)),
        "1e38": set_to(lambda x: torch.full_like(x, 1e38)),
        "float64 of 1e300": set_to(lambda x: torch.full_like(x, 1e300, dtype=torch.float64)),
        "int8": set_to(lambda x: x.to(torch.int8)),
        "bool": set_to(lambda x: x > 0),
        "complex": set_to(lambda x: x.to(torch.complex64)),
        "float8": set_to(lambda x: x.to(torch.float8_e4m3fn)),
        "an array of float16": set_to(lambda x: x.numpy().astype(np.float16)),
        "an array of bool": set_to(lambda x: x.numpy() > 0),
        "a number": set_to(lambda x: 3.0),
        "None": set_to(lambda x: None),
        "a list": set_to(lambda x: [1, 2]),
        "expanded": set_to(lambda x: x[:1, :1, :1, :1].expand(x.shape)),
        "another shape": set_to(lambda x: x[None]),
        "no axis": set_to(lambda x: x[0, 0, 0, 0]),
        "2^40 numbers of stride 0": set_to(lambda x: torch.zeros(1).expand(2**20, 2**20)),
        "requires a gradient": set_to(lambda x: x.clone().requires_grad_()),
        "a parameter": set_to(torch.nn.Parameter),
        "anchors": lambda content: content["model"].update(
            {"anchor_generator.cell_anchors.0": torch.full((9, 4), 1e30)}
        ),
        "a normaliser of 0": lambda content: content["model"].update(
            {"loss_normalizer.value": torch.zeros(())}
        ),
        "a normaliser of NaN": lambda content: content["model"].update(
            {k: torch.full_like(x, math.nan) for k, x in content["model"].items() if "normalizer" in k}
        ),
        "10,000 more": lambda content: content["model"].update(
            {f"x{i}": torch.zeros(1) for i in range(10_000)}
        ),
        "a matching heuristic": lambda content: content.update(matching_heuristics=True, __author__="Caffe2"),
        "a model of itself": lambda content: content["model"].update({"model": content["model"]}),
        "an author of 5 MB": lambda content: content.update(__author__="x" * 5 * 2**20),
    }


# 5: YAML


def yaml_bombs() -> Groups:
    """Texts that would take any amount of memory, or make objects, wherever YAML is read."""
    texts: dict[str, str | bytes] = {
        **test_yaml_text.BOMBS,
        **{f"config: {k}": v for k, (v, _) in test_config_files.HOSTILE.items()},
    }
    texts |= _more_yaml()
    for name, text in texts.items():
        content = (
            text
            if isinstance(text, bytes)
            else text.replace("PLANTED", "planted").encode("utf-8", "surrogatepass")
        )

        def config(place: Place, text: str | bytes = text) -> list[str]:
            path, _ = test_config_files.write(place.input, text)
            return ["--config-file", str(path), "MODEL.DEVICE", "cpu"]

        yield Case("5 YAML", f"{name} as a config", "doctor", config)
        if name.startswith("config: _BASE_"):
            continue

        def grid(place: Place, content: bytes = content) -> list[str]:
            (place.input / "grid.yaml").write_bytes(content)
            return arguments("study", place)

        def classes(place: Place, content: bytes = content) -> list[str]:
            (place.input / "names.yaml").write_bytes(content)
            data = place.input / "data"
            entry = {
                "NAME": DATA,
                "IMAGES": str(data / "images"),
                "ANNOTATIONS": str(data / "annotations.json"),
            }
            entry["CLASSES"] = str(place.input / "names.yaml")
            return [*job(place, DATASETS__FOCAL=[entry]), "--no-images"]

        def data_file(place: Place, content: bytes = content) -> list[str]:
            (place.input / "data.yaml").write_bytes(content)
            entry = {
                "NAME": DATA,
                "FORMAT": "yolo",
                "ANNOTATIONS": str(place.input / "data.yaml"),
                "SPLIT": "train",
            }
            return [*job(place, DATASETS__FOCAL=[entry]), "--no-images"]

        def step(place: Place, content: bytes = content) -> list[str]:
            text = content.decode("utf-8", "replace")
            return _step_with(place, lambda c: c.update(config=text))

        yield Case("5 YAML", f"{name} as a grid", "study", grid)
        yield Case("5 YAML", f"{name} as class names", "doctor", classes)
        yield Case("5 YAML", f"{name} as a data.yaml", "doctor", data_file)
        yield Case("5 YAML", f"{name} in a saved step", "replay", step)
    yield Case("5 YAML", "a chain of 61 bases", "doctor", _chain)


def _more_yaml() -> dict[str, str | bytes]:
    tags = [
        "int",
        "float",
        "bool",
        "null",
        "timestamp",
        "binary",
        "set",
        "omap",
        "pairs",
        "str",
        "seq",
        "map",
    ]
    tags += ["merge", "value"]
    return {
        **{f"an empty {tag}": f"SEED: !!{tag} ''" for tag in tags},
        **{f"a {tag} of a list": f"SEED: !!{tag} [a, b]" for tag in tags},
        **{f"a {tag} of a mapping": f"SEED: !!{tag} {{a: b}}" for tag in tags},
        "a bool that is none": "SEED: !!bool maybe",
        "a float that is none": "SEED: !!float .",
        "a float of signs": "SEED: !!float -",
        "an int of signs": "SEED: !!int '-'",
        "an int of base 2": "SEED: 0b" + "1" * 5000,
        "an int of underscores": "SEED: 1" + "_" * 10**6,
        "a float of 10^6 digits": "SEED: " + "1" * 10**6 + ".5",
        "a float of zeros": "SEED: 0." + "0" * 10**6 + "1",
        "a float of colons": "SEED: 1" + ":59" * 20_000 + ".5",
        "a binary that is none": "SEED: !!binary '!!!'",
        "a date of year 0": "SEED: 0000-01-01",
        "a time zone": "SEED: 2001-12-14t21:59:43.10-99:99",
        "a fraction of a second": "SEED: 2001-12-14t21:59:43." + "1" * 1000,
        "a tag of 500 kB": "SEED: !" + "a" * 500_000 + " 1",
        "a key of 500 kB": "? " + "k" * 500_000 + "\n: 1",
        "a key of 500 kB twice": "".join(f'"{"k" * 250_000}": {i}\n' for i in range(2)),
        "a text of 500 kB": "SEED: " + "x" * 500_000,
        "an anchor of 500 kB": "SEED: &" + "a" * 500_000 + " 1\nX: *" + "b" * 100_000,
        "escapes": 'SEED: "\\e]0;owned\\a\\e[2J"\n"\\e[31mKEY": 1',
        "surrogates": 'SEED: "\\ud800"',
        "a NEL": "SEED: 1\x85X: 2",
        "a key that is a list": "? [a, b]\n: 1",
        "a key that is a mapping": "? {a: b}\n: 1",
        "a key that is null": "~: 1",
        "a key that is NaN": ".nan: 1\n.NaN: 2",
        "a key that is a date": "2020-01-01: 1",
        "a key that is a number": "1: 2\nMODEL: {3: 4}",
        "keys of Python": "__class__: 1\n__dict__: {}\n__init__: x",
        "keys of yacs": "__deprecated_keys__: [SEED]\n__immutable__: true\n__new_allowed__: true\n__renamed_keys__: {}",
        "keys of yacs below": "MODEL: {__deprecated_keys__: [x], __immutable__: true, __new_allowed__: true}",
        "methods of a config": "merge_from_file: x\nclone: 1\nMODEL: {freeze: 1, dump: {}}",
        "a version": "VERSION: 10000000",
        "a version that is a text": "VERSION: x\nMODEL: {}",
        "a version that is a list": "VERSION: [1]",
        "a negative version": "VERSION: -5",
        "version 1 of a text": "MODEL: {WEIGHT: {A: 1}}",
        "version 1 of keys": "VERSION: 1\nMODEL: {RPN: {HEAD_NAME: {A: 1}}}\nTEST: {BBOX_AUG: 3}",
        "a section for a value": "SEED: {A: 1}\nOUTPUT_DIR: {A: 1}",
        "a value for a section": "MODEL: 3\nSOLVER: [1]\nDATASETS: x",
        "a section that is null": "MODEL:\nSOLVER: ~",
        "an empty file": "",
        "comments": "# " * 500_000,
        "a list": "- a\n- b",
        "a text": "just text",
        "a number": "3",
        "directives": "%YAML 9.9\n---\nSEED: 1",
        "directives without end": "%TAG ! tag:x,2000:\n" * 20_000 + "---\nSEED: 1",
        "a tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nSEED: !name:os.system ''",
        "a verbatim tag": "SEED: !<tag:yaml.org,2002:python/object/apply:os.system> [touch planted]",
        "a tag with escapes": "SEED: !!python%2Fobject/apply:os.system [touch planted]",
        "flow without end": "[{" * 20_000,
        "question marks": "? " * 30_000,
        "dashes": "- " * 30_000,
        "quotes": "'" * 500_001,
        "a block of 900 kB": "SEED: |\n" + " x\n" * 300_000,
        "blanks": "SEED:" + " " * 10**6 + "1",
        "lines": "SEED: 1" + "\n" * 10**6,
        "a wide alias": "a: &a [" + "1," * 40_000 + "]\nb: [*a]\nc: [*a]\nd: [*a]",
        "keys that collide": "".join(f"{i << 40}: 1\n" for i in range(20_000)),
        "UTF-16": "SEED: 1".encode("utf-16"),
        "UTF-32": "SEED: 1".encode("utf-32"),
        "bidirectional marks": "SEED: 1 \u202e# \u2066\nX\u200b: 1",
        "a base that is null": "_BASE_: ~",
        "a base that is empty": "_BASE_: ''",
        "a base that is a list of lists": "_BASE_: [[a]]",
        "a base below": "MODEL: {_BASE_: /etc/passwd}",
        "a base of /etc": "_BASE_: /etc/passwd",
        "a base of /proc": "_BASE_: /proc/self/environ",
        "a base of /dev/stdin": "_BASE_: /dev/stdin",
        "a base with NUL": '_BASE_: "a\\0b"',
        "a base of 100,000 characters": "_BASE_: " + "a" * 100_000,
        "a base of a tilde": "_BASE_: ~nobody/x",
        "a base with escapes": '_BASE_: "\\e]0;x\\a"',
    }


def _chain(place: Place) -> list[str]:
    for i in range(61):
        base = f"_BASE_: {i + 1}.yaml\n" if i < 60 else ""
        (place.input / f"{i}.yaml").write_text(f"{base}X: [{'1,' * 90_000}]")
    return ["--config-file", str(place.input / "0.yaml")]


# Values


def configs() -> Groups:
    """Overrides that are code or any text."""
    texts = ["__import__('os').system('touch planted')", "!!python/name:os.system", "[" * 5000, "-" * 50_000]
    texts += [
        "(lambda: 0)()",
        "{**{}}",
        "'a' * 10**9",
        "[0] * 10**9",
        "9**9**9**9",
        'f\'{open("planted","w")}\'',
    ]
    texts += [
        "1_0",
        "0o10",
        "0x" + "f" * 10_000,
        "1e400",
        "nan",
        "\0",
        "\x1b[31m",
        "\ud800",
        "{'a': 1}",
        "b'x'",
    ]
    for key in ("SEED", "SOLVER.STEPS", "DATASETS.FOCAL", "MODEL.WEIGHTS", "MODEL", "X.Y"):
        for text in texts:
            if "\0" in text:
                continue  # no command line can hold it
            yield Case(
                "5 overrides", f"{key} {text[:40]!r}", "train", lambda p, k=key, t=text: [*job(p), k, t]
            )


# The ranges of detectron2's keys hold for parts that the packages registered.
_KNOWN_PARTS = {
    "MODEL__BACKBONE__NAME": "build_focal_resnet_fpn_backbone",
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 8,
    "MODEL__RESNETS__NORM": "BN",
}


def values() -> Groups:
    """Values of keys outside their ranges."""
    more: list[tuple[str, Any]] = [
        ("MODEL.PIXEL_MEAN", [1.0]), ("MODEL.PIXEL_STD", [1e-300] * 3), ("MODEL.PIXEL_MEAN", [1e308] * 3),
        ("MODEL.DEVICE", "meta"), ("MODEL.DEVICE", "cuda:99999"), ("MODEL.DEVICE", "privateuseone"),
        ("MODEL.DEVICE", "\x1b[31m"), ("INPUT.FORMAT", "XYZ"), ("MODEL.META_ARCHITECTURE", "os.system"),
        ("MODEL.BACKBONE.NAME", "eval"), ("MODEL.RETINANET.NORM", "eval"), ("MODEL.RESNETS.NORM", "Conv2d"),
        ("MODEL.FPN.IN_FEATURES", ["res9"]), ("MODEL.FPN.IN_FEATURES", []), ("MODEL.RETINANET.IN_FEATURES", []),
        ("MODEL.RESNETS.DEPTH", 7), ("MODEL.RESNETS.OUT_FEATURES", []), ("MODEL.RESNETS.NUM_GROUPS", 0),
        ("MODEL.RESNETS.NUM_GROUPS", 10**9), ("MODEL.RESNETS.WIDTH_PER_GROUP", 10**9),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 10**9), ("MODEL.RESNETS.RES2_OUT_CHANNELS", 10**9),
        ("MODEL.RESNETS.RES5_DILATION", 0), ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True] * 4),
        ("MODEL.FPN.FUSE_TYPE", "x"), ("MODEL.FPN.NORM", "x"), ("MODEL.RETINANET.NUM_CONVS", 10**6),
        ("MODEL.RETINANET.NUM_CONVS", -1), ("MODEL.RETINANET.PRIOR_PROB", 0.0), ("MODEL.RETINANET.PRIOR_PROB", 1.0),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", -1), ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 10**18),
        ("MODEL.RETINANET.NMS_THRESH_TEST", -1.0), ("MODEL.RETINANET.SCORE_THRESH_TEST", 2.0),
        ("MODEL.RETINANET.IOU_THRESHOLDS", [2.0, 3.0]), ("MODEL.RETINANET.IOU_LABELS", [0, 5, 1]),
        ("MODEL.RETINANET.IOU_LABELS", []), ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", -1.0),
        ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "x"), ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", -1e9),
        ("MODEL.ANCHOR_GENERATOR.NAME", "x"), ("MODEL.ANCHOR_GENERATOR.OFFSET", 5.0),
        ("MODEL.ANCHOR_GENERATOR.ANGLES", [[]]), ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.0] * 10_000]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0] * 10_000]), ("MODEL.ANCHOR_GENERATOR.SIZES", [[1], [2]]),
        ("SOLVER.IMS_PER_BATCH", 0), ("SOLVER.IMS_PER_BATCH", 10**9), ("SOLVER.IMS_PER_BATCH", -2),
        ("SOLVER.REFERENCE_WORLD_SIZE", 3), ("SOLVER.REFERENCE_WORLD_SIZE", -1), ("SOLVER.CHECKPOINT_PERIOD", 0),
        ("SOLVER.LR_SCHEDULER_NAME", "x"), ("SOLVER.CLIP_GRADIENTS.ENABLED", "yes"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x"), ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1.0),
        ("SOLVER.MOMENTUM", 2.0), ("SOLVER.WEIGHT_DECAY", -1.0),
        ("SOLVER.NUM_DECAYS", -1), ("SOLVER.BASE_LR_END", -1.0), ("SOLVER.BIAS_LR_FACTOR", 1e300),
        ("TEST.EVAL_PERIOD", -1), ("TEST.DETECTIONS_PER_IMAGE", -5), ("TEST.DETECTIONS_PER_IMAGE", 10**18),
        ("TEST.EXPECTED_RESULTS", [["bbox", "AP", 38.5, 0.2]]),
        ("TEST.EXPECTED_RESULTS", "__import__('os')"), ("TEST.AUG.ENABLED", True), ("TEST.PRECISE_BN.ENABLED", True),
        ("TEST.PRECISE_BN.NUM_ITER", 10**12), ("DATALOADER.SAMPLER_TRAIN", "x"),
        ("DATALOADER.ASPECT_RATIO_GROUPING", 7), ("INPUT.RANDOM_FLIP", "x"), ("INPUT.CROP.SIZE", [1e9, 1e9]),
        ("INPUT.CROP.SIZE", []), ("INPUT.CROP.ENABLED", True), ("INPUT.MASK_FORMAT", "x"),
        ("INPUT.MIN_SIZE_TRAIN", [100_000]), ("INPUT.MAX_SIZE_TEST", -1), ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "x"),
        ("DATASETS.TRAIN", ["nothing"]), ("DATASETS.TRAIN", []), ("DATASETS.TRAIN", [DATA] * 1000),
        ("DATASETS.TEST", "mine"), ("DATASETS.FOCAL", "x"), ("DATASETS.FOCAL", [[]]),
        ("DATASETS.FOCAL", [{"NAME": ["a"]}]), ("DATASETS.FOCAL", [3]), ("OUTPUT_DIR", ""),
        ("OUTPUT_DIR", "a\0b"), ("VIS_PERIOD", -1),
        ("GLOBAL.HACK", "x"), ("CUDNN_BENCHMARK", "x"), ("SEED", -(10**20)), ("SEED", 1.5),
        ("MODEL.WEIGHTS", "/etc/passwd"), ("MODEL.WEIGHTS", "/dev/zero"), ("MODEL.WEIGHTS", "."),
        ("MODEL.WEIGHTS", "a\0b"), ("MODEL.WEIGHTS", "x" * 5000), ("MODEL.WEIGHTS", "/proc/self/mem"),
        ("MODEL.FOCAL.LOSS.NAME", "os.system"), ("MODEL.FOCAL.LOSS.NAME", ""), ("MODEL.KEYPOINT_ON", True),
        ("MODEL.MASK_ON", True), ("MODEL.FOCAL.COMPILE", "x"), ("MODEL.FOCAL.AMP.DTYPE", "float128"),
    ]  # fmt: skip
    for key, value in [*((k, v) for k, v, _ in NONSENSE), *more]:
        name = key.replace(".", "__")
        yield Case(
            "values of keys",
            f"{key} {str(value)[:50]!r}",
            "train",
            lambda p, n=name, v=value: job(p, **(_KNOWN_PARTS | {n: v})),
        )


# 2, 6: images


def images() -> Groups:
    """Files of the formats that are read: damaged, and small ones that would be large."""
    files = {name: data for name, (data, _) in test_pixels.LARGE.items()}
    files |= _more_images()
    draw = random.Random(0)
    sound = {**test_pixels.JPEGS, "png": test_pixels.PNG, **test_pixels.BY_PILLOW}
    for kind, data in sound.items():
        if not isinstance(data, bytes):
            continue
        for i in range(3):
            damaged = bytearray(data)
            for _ in range(4):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            files[f"{kind}, 4 bytes changed ({i})"] = bytes(damaged)
        files[f"{kind}, cut"] = data[: len(data) * 2 // 3]
    for name, data in files.items():
        for program, backend in (
            ("train", "pil"),
            ("train", "opencv"),
            ("predict", "pil"),
            ("doctor", "pil"),
        ):

            def make(
                place: Place, data: bytes = data, program: str = program, backend: str = backend
            ) -> list[str]:
                _replace_images(place, data)
                small = {"INPUT__MIN_SIZE_TRAIN": [64], "INPUT__MIN_SIZE_TEST": 64}
                return arguments(program, place, INPUT__FOCAL__BACKEND=backend, **small)

            yield Case("6 pictures", f"{name} ({program}, {backend})", program, make)


def _tiff(*tags: tuple[int, int, int, int], data: bytes = bytes(64)) -> bytes:
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<2H2I", *tag) for tag in tags).replace(b"DATA", struct.pack("<I", start))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def _more_images() -> dict[str, bytes]:
    png = test_pixels.PNG
    header = [
        (256, 4, 1, 64),
        (257, 4, 1, 64),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (273, 4, 1, 200),
    ]

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    bomb = zlib.compress(bytes(2**28), 9)
    before = png[:33]
    after = png[33:]
    large = io.BytesIO()
    Image.new("L", (9999, 9999)).save(large, "JPEG", quality=1)
    strips = [(259, 3, 1, 5), (278, 4, 1, 2**31 - 1), (279, 4, 1, 16)]
    return {
        "a JPEG of 9,000² in 2,000 scans": test_pixels.scans(9000, 2000),
        "a JPEG of 64² in 20,000 scans": test_pixels.scans(64, 20_000),
        "a JPEG of 9,999² (allowed)": large.getvalue(),
        "a PNG of 9,999² (allowed)": test_pixels.empty_png(9992),
        "a compressed text of 256 MB": before + chunk(b"zTXt", b"a\0\0" + bomb) + after,
        "an international text of 256 MB": before + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb) + after,
        "a profile of 256 MB": before + chunk(b"iCCP", b"a\0\0" + bomb) + after,
        "100,000 texts": before + chunk(b"tEXt", b"a\0b") * 100_000 + after,
        "100 texts of 1 MB": before + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9)) * 100 + after,
        "a chunk of 2 GB": before + struct.pack(">I", 2**31 - 1) + b"tEXt",
        "pixels of 256 MB for 64²": before + chunk(b"IDAT", bomb) + chunk(b"IEND", b""),
        "an animation of 2^31 frames": before + chunk(b"acTL", struct.pack(">2I", 2**31 - 1, 0)) + after,
        "a PNG of side 0": test_pixels.PNG[:16] + bytes(8) + test_pixels.PNG[24:],
        "a PNG of side 2^31": test_pixels.PNG[:16] + b"\x7f\xff\xff\xff" * 2 + test_pixels.PNG[24:],
        "a TIFF of 2^31 values of a tag": _tiff(*header, (270, 2, 2**31 - 1, 8)),
        "a TIFF of 2^32 - 1 doubles": _tiff(*header, (33550, 12, 2**32 - 1, 8)),
        "a TIFF of one strip of 2^31 rows": _tiff(*header, *strips),
        "a TIFF whose directory leads back": b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8),
        "a TIFF of EXIF in EXIF": _tiff(*header, (34665, 4, 1, 8)),
        "a TIFF of 2^16 bands": _tiff(*header[:4], (277, 3, 1, 65535), (273, 4, 1, 200)),
        "a TIFF of JPEG tiles": _tiff(*header, (259, 3, 1, 7), (322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 1, 8), (325, 4, 1, 2**31)),
        "a TIFF of LZMA": _tiff(*header, (259, 3, 1, 34925), (279, 4, 1, 64)),
        "a TIFF of old JPEG": _tiff(*header, (259, 3, 1, 6), (513, 4, 1, 8), (514, 4, 1, 2**31)),
        "a BigTIFF": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(100),
        "a GIF of 20,000 frames": test_pixels.gif(1000, 1)[:-1] * 1 + test_pixels.gif(1000, 1)[19:-1] * 20_000 + b";",
        "a GIF of comments": b"GIF89a" + struct.pack("<2H", 9, 9) + b"\0\0\0" + b"!\xfe" + b"\xff" + b"a" * 255 + (b"\xff" + b"a" * 255) * 20_000,
        "a BMP of negative height": b"BM" + struct.pack("<IHHI3i2H6I", 100, 0, 0, 54, 40, 64, -64, 1, 24, *[0] * 6) + bytes(64 * 64 * 3),
        "a BMP of RLE": b"BM" + struct.pack("<IHHI3i2H6I", 100, 0, 0, 54 + 1024, 40, 9999, 9999, 1, 8, 1, *[0] * 5) + bytes(1024) + b"\0\1",
        "a BMP of 2^32 colours": b"BM" + struct.pack("<IHHI3i2H6I", 100, 0, 0, 54, 40, 64, 64, 1, 8, 0, 0, 0, 0, 2**32 - 1, 0) + bytes(5000),
        "a PPM of spaces": b"P6" + b" " * 10**6 + b"64 64 255\n",
        "a PPM of 10^6 digits": b"P6 " + b"9" * 10**6 + b" 64 255\n",
        "a PPM of texts": b"P3 64 64 255\n" + b"9" * 10**6,
        "a PFM": b"PF\n64 64\n-1.0\n" + bytes(64 * 64 * 12),
        "a PPM of maxval 0": b"P6 64 64 0\n" + bytes(64 * 64 * 3),
        "a WebP of animation without end": test_pixels.webp_of(64)[:-8],
        "a WebP of a lying length": b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\x7f/" + b"\xff" * 5,
        "a JPEG of restarts": test_pixels.JPEGS["jpeg"][:-2] + b"\xff\xd0" * 10**5 + b"\xff\xd9",
        "a JPEG of 60,000 segments": b"\xff\xd8" + (b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0") * 60_000 + test_pixels.JPEGS["jpeg"][2:],
        "a JPEG of EXIF that leads back": b"\xff\xd8\xff\xe1" + struct.pack(">H", 34) + b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\0\0\0\0" + test_pixels.JPEGS["jpeg"][2:],
        "an MPO of 2^32 pictures": b"\xff\xd8\xff\xe2" + struct.pack(">H", 40) + b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\xff\xff\xff\xff\0\0\0\0" + bytes(4) + test_pixels.JPEGS["jpeg"][2:],
        "nothing": b"",
        "a zero": b"\0",
        "zeros": bytes(10**6),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
    }  # fmt: skip


# 6, 13: annotations


def annotations() -> Groups:
    """Annotations of each format: the tests' broken ones, and larger ones."""
    for name, (style, change, _) in test_broken_inputs.CASES.items():

        def broken(place: Place, style: str = style, change: Callable[[Any], object] = change) -> list[str]:
            folder = place.input / "broken"
            folder.mkdir()
            data = test_broken_inputs.Broken(folder, style)
            change(data)
            entry = {**data.entry, "NAME": DATA}
            return job(place, DATASETS__FOCAL=[entry], MODEL__RETINANET__NUM_CLASSES="auto")

        yield Case("13 annotations", name, "train", broken)
    for style, texts in _hostile_annotations().items():
        for name, text in texts.items():
            for program in ("doctor", "train"):

                def make(
                    place: Place, style: str = style, text: str | bytes = text, program: str = program
                ) -> list[str]:
                    entry = _write_annotations(place, style, text)
                    flags = {"DATASETS__FOCAL": [entry], "MODEL__RETINANET__NUM_CLASSES": "auto"}
                    return arguments(program, place, **flags)

                yield Case("13 annotations", f"{style}: {name} ({program})", program, make)


def _write_annotations(place: Place, style: str, text: str | bytes) -> dict[str, Any]:
    folder = place.input / "theirs"
    folder.mkdir()
    path = (
        folder
        / {"coco": "a.json", "csv": "a.csv", "voc": "0.xml", "yolo": "0.txt", "data.yaml": "data.yaml"}[style]
    )
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if style == "data.yaml":
        return {"NAME": DATA, "FORMAT": "yolo", "ANNOTATIONS": str(path), "SPLIT": "train"}
    source = path if style in ("coco", "csv") else folder
    entry = {
        "NAME": DATA,
        "FORMAT": style,
        "IMAGES": str(place.input / "data/images"),
        "ANNOTATIONS": str(source),
    }
    return {**entry, **({"CLASSES": ["a", "b"]} if style == "yolo" else {})}


def _coco(**changes: Any) -> str:
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(3)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0, "area": 9}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            content[key][0].update(value)
        else:
            content[key] = value
    return json.dumps(content)


def _hostile_annotations() -> dict[str, dict[str, str | bytes]]:
    seeds = test_fuzz.SEEDS
    xml = seeds["voc"].replace("a.png", "0.png").replace(">9<", ">64<").replace(">8<", ">64<")
    row = "0.png,1,2,30,40,a\n"
    head = "image,xmin,ymin,xmax,ymax,label\n"
    escape = "\x1b]0;owned\x07\x1b[2J\r\n"
    deep = "<a>" * 200_000
    return {
        "coco": {
            "a bbox of 10^6 numbers": _coco(annotations={"bbox": [1] * 10**6}),
            "10^6 categories": _coco(categories=[{"id": i, "name": str(i)} for i in range(10**6)]),
            "a category's id of 2^62": _coco(categories={"id": 2**62}, annotations={"category_id": 2**62}),
            "an image of 10^9 pixels": _coco(images={"width": 10**9, "height": 10**9}),
            "an image of 2^40 pixels": _coco(images={"width": 2**20, "height": 2**20}),
            "RLE of 2^60": _coco(annotations={"segmentation": {"size": [2**30, 2**30], "counts": "~" * 1000}}),
            "RLE of numbers": _coco(annotations={"segmentation": {"size": [2**30, 2**30], "counts": [2**60] * 1000}}),
            "RLE without a box": _coco(annotations=[{"id": 1, "image_id": 0, "category_id": 1, "segmentation": {"size": [2**31, 2**31], "counts": "P" * 10**5}}]),
            "a polygon of 10^6 points": _coco(annotations=[{"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[1, 2] * 10**6]}]),
            "a polygon in polygons": _coco(annotations=[{"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[[[[1]]]]]}]),
            "keys of 10^5 digits": _coco().replace('"id": 1', f'"id": {"9" * 10**5}'),
            "floats of 10^6 digits": _coco().replace("30", "3" * 10**6 + ".5"),
            "an exponent": _coco().replace("30", "1e" + "9" * 1000),
            "deep objects": _coco(info=0).replace('"info": 0', '"info": ' + '{"a":' * 50_000 + "1" + "}" * 50_000),
            "deep lists in a box": _coco().replace("[1, 2, 30, 40]", "[" * 900 + "]" * 900),
            "surrogates in names": _coco(categories={"name": "\ud800"}),
            "a name of escapes": _coco(categories={"name": escape}),
            "a name of 10^6 characters": _coco(categories={"name": "a" * 10**6}),
            "a name with markup": _coco(categories={"name": "<script>alert(1)</script>'\"&"}),
            "a name with NUL": _coco(categories={"name": "a\0b"}),
            "a name of bars": _coco(categories={"name": "| a | b\n|---|"}),
            "a file of escapes": _coco(images={"file_name": escape + ".png"}),
            "a file with markup": _coco(images={"file_name": "<img src=x onerror=alert(1)>.png"}),
            "a file of 10^6 characters": _coco(images={"file_name": "a" * 10**6}),
            "a file with surrogates": _coco(images={"file_name": "\ud800.png"}),
            "a file of dots": _coco(images={"file_name": "./" * 3000 + "0.png"}),
            "a file that is /proc": _coco(images={"file_name": "/proc/self/environ"}),
            "an address for a file": _coco(images={"file_name": "http://127.0.0.1:9/0.png"}),
            "an id that is an object": _coco(images={"id": {"a": 1}}),
            "an id that is NaN": _coco(images={"id": math.nan}),
            "keys twice": _coco()[:-1] + ', "annotations": []}',
            "keys twice, in capitals": _coco()[:-1] + ', "ANNOTATIONS": []}',
            "10^6 keys": json.dumps({**json.loads(_coco()), **{f"k{i}": 0 for i in range(500_000)}}),
            "strings": '{"images": "' + "a" * 10**7 + '"}',
            "two values": _coco() + _coco(),
            "NDJSON": _coco() + "\n{}\n",
            "UTF-7": b"+AHsAIg-",
            "a sparse start": bytes(10**6),
            "a pickle": pickle.dumps(test_weights.Evil("planted")),
            "a Python literal": "__import__('os').system('touch planted')",
        },
        "csv": {
            "a field of 10^7 characters": head + "0.png," + "1" * 10**7 + ",2,3,4,a\n",
            "10^6 rows": head + row * 10**6,
            "10^6 columns": head + "0.png" + "," * 10**6 + "\n",
            "a header of 10^6 columns": "a," * 10**6 + "\n" + row,
            "an open quote": head + '"' + "0.png,1,2,3,4,a\n" * 10**5,
            "quotes": head + '""""""' * 10**5,
            "NUL": head + "0.png\0,1,2,3,4,a\n",
            "escapes": head + f'0.png,1,2,3,4,"{escape}"\n',
            "a formula": head + "0.png,1,2,30,40,=cmd|' /C calc'!A0\n",
            "hexadecimal": head + "0.png,0x1,1_0,inf,nan,a\n",
            "other digits": head + "0.png,\u0661,\u0662,\u0663\u0663,\u0664\u0664,a\n",
            "10^5 digits": head + "0.png," + "1" * 10**5 + ",2,30,40,a\n",
            "separators": ";,\t|" * 10**5,
            "carriage returns": head.replace("\n", "\r") + row.replace("\n", "\r") * 10,
            "UTF-16": (head + row).encode("utf-16"),
            "nothing": "",
            "spaces": " " * 10**6,
        },
        "voc": {
            "200,000 levels": deep,
            "200,000 levels, closed": deep + "</a>" * 200_000,
            "10^5 attributes": "<annotation " + " ".join(f'a{i}="1"' for i in range(10**5)) + "/>",
            "an external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + xml.replace(">x<", ">&x;<"),
            "an entity of a server": '<!DOCTYPE a [<!ENTITY x SYSTEM "http://127.0.0.1:9/x">]>' + xml.replace(">x<", ">&x;<"),
            "an external DTD": '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd">' + xml,
            "a parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]>' + xml,
            "quadratic entities": '<!DOCTYPE a [<!ENTITY x "' + "a" * 50_000 + '">]><annotation>' + "&x;" * 50_000 + "</annotation>",
            "billion laughs in an attribute": "<!DOCTYPE a [" + '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10)) + ']><annotation a="&e9;"/>',
            "an XInclude": '<annotation xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="/etc/passwd"/></annotation>',
            "a style sheet": '<?xml-stylesheet href="file:///etc/passwd"?>' + xml,
            "a name of 10^7 characters": xml.replace(">x<", ">" + "a" * 10**7 + "<"),
            "escapes in a name": xml.replace(">x<", ">&#27;[31m<").replace("&#27;", "\x9b"),
            "10^5 objects": xml.replace("</object>", "</object>" + "<object/>" * 10**5),
            "10^5 boxes": xml.replace("</bndbox>", "</bndbox>" + "<bndbox/>" * 10**5),
            "10^5 digits": xml.replace(">3<", ">" + "3" * 10**5 + "<"),
            "a file out of the folder": xml.replace(">0.png<", ">../../../../etc/passwd<"),
            "an image of 10^9 pixels": xml.replace(">64<", ">1000000000<"),
            "UTF-7": b'<?xml version="1.0" encoding="UTF-7"?><annotation/>',
            "an encoding of Python": b'<?xml version="1.0" encoding="rot13"?><annotation/>',
            "an encoding that is none": b'<?xml version="1.0" encoding="' + b"x" * 1000 + b'"?><annotation/>',
            "namespaces": "<a " + " ".join(f'xmlns:n{i}="u{i}"' for i in range(20_000)) + "/>",
            "comments": "<annotation>" + "<!-- a -->" * 10**5 + "</annotation>",
            "CDATA": "<annotation><filename><![CDATA[" + "a" * 10**6 + "]]></filename></annotation>",
        },
        "yolo": {
            "a line of 10^7 characters": "0 " + "1" * 10**7,
            "a line of 10^6 numbers": "0 " + "0.5 " * 10**6,
            "10^6 lines": "0 0.5 0.5 0.25 0.25\n" * 10**6,
            "a class of 10^5 digits": "9" * 10**5 + " 0.5 0.5 0.25 0.25",
            "a class of 2^62": f"{2**62} 0.5 0.5 0.25 0.25",
            "hexadecimal": "0 0x1p-1 0.5 0.25 0.25",
            "NaN": "0 nan inf -inf 1e999",
            "other digits": "\u0660 0.\u0665 0.5 0.25 0.25",
            "NUL": "0 0.5 0.5 0.25 0.25\0",
            "escapes": f"{escape} 0.5 0.5 0.25 0.25",
        },
        "data.yaml": {
            "a folder of /": "path: /\ntrain: .\nnames: [a]",
            "a folder of /proc": "path: /proc\ntrain: self\nnames: [a]",
            "a folder out of it": "train: ../../..\nnames: [a]",
            "a program to fetch the data": 'download: "import os; os.system(\'touch planted\')"\ntrain: images\nnames: [a]',
            "an address to fetch": "download: http://127.0.0.1:9/x.zip\ntrain: images\nnames: [a]",
            "an address as a folder": "train: http://127.0.0.1:9/\nnames: [a]",
            "10^9 classes": "train: images\nnc: 1000000000\nnames: [a]",
            "classes by numbers": "train: images\nnames: {0: a, 1000000000000: b}",
            "escapes in a name": 'train: images\nnames: ["\\e[31m"]',
            "a list of folders": "train: [" + "images," * 10_000 + "]\nnames: [a]",
            "a tilde": "path: ~root\ntrain: x\nnames: [a]",
        },
    }  # fmt: skip


def boxes() -> Groups:
    """A great many boxes in one image, or images, or classes."""
    for number in (10**5, 10**6):

        def make(place: Place, number: int = number) -> list[str]:
            rows = [{"id": i, "image_id": 0, "category_id": 1, "bbox": [i % 50, i % 40, 9, 9], "iscrowd": 0, "area": 81}
                    for i in range(number)]  # fmt: skip
            entry = _write_annotations(place, "coco", _coco(annotations=rows))
            return job(place, DATASETS__FOCAL=[entry], MODEL__RETINANET__NUM_CLASSES="auto")

        for program in ("doctor", "anchors"):
            yield Case("6 boxes", f"{number} boxes in one image ({program})", program,
                       lambda p, m=make, g=program: [*m(p), *(["--no-images"] if g == "doctor" else [])])  # fmt: skip

    def many(place: Place) -> list[str]:
        rows = [{"id": i, "file_name": f"{i}.png", "width": 10**5, "height": 10**5} for i in range(3)]
        entry = _write_annotations(place, "coco", _coco(images=rows))
        return [*job(place, DATASETS__FOCAL=[entry], MODEL__RETINANET__NUM_CLASSES="auto"), "--no-images"]

    yield Case("6 boxes", "images of 10^5 x 10^5 by their annotations", "doctor", many)
    yield Case(
        "6 boxes", "images of 10^5 x 10^5 by their annotations (anchors)", "anchors", lambda p: many(p)[:-1]
    )


# Saved steps


def _step_with(place: Place, change: Callable[[Any], object]) -> list[str]:
    path = place.input / "step/step_rank0.pth"
    content = _content(path)
    change(content)
    torch.save(content, path)
    return [str(path.parent)]


def steps() -> Groups:
    """Saved steps: hostile files, and each field with values of other kinds."""
    for name, make in checkpoint_files().items():
        if not name.endswith(".pth"):
            continue

        def write(place: Place, make: Callable[[Path], None] = make) -> list[str]:
            make(place.input / "step/step_rank0.pth")
            return [str(place.input / "step")]

        yield Case("saved steps", name, "replay", write)
    bad: dict[str, Any] = {
        "None": None, "a text": "x", "escapes": "\x1b[31m", "2^70": 2**70, "NaN": math.nan, "a list": [[]], "a dictionary": {"x": {}},
        "a tensor": torch.zeros(3), "whole numbers": torch.ones(3, dtype=torch.int64), "a list of dictionaries": [{}],
        "a negative number": -1, "an empty dictionary": {}, "an empty list": [], "a dictionary of texts": {"loss_cls": "x"},
    }  # fmt: skip
    fields = ("iteration", "rank", "learning_rate", "losses", "steps", "normalizer", "config", "model", "batch",
              "random", "cuda_random")  # fmt: skip
    for field in fields:
        for name, value in bad.items():
            yield Case("saved steps", f"{field} is {name}", "replay",
                       lambda p, f=field, v=value: _step_with(p, lambda c: c.update({f: v})))  # fmt: skip
    parts = ("image", "height", "width", "file_name", "image_id", "ignored_boxes", "instances")
    for field in parts:
        for name, value in bad.items():
            yield Case("saved steps", f"batch[0].{field} is {name}", "replay",
                       lambda p, f=field, v=value: _step_with(p, lambda c: c["batch"][0].update({f: v})))  # fmt: skip
    tensors = {
        "an image of no pixels": ("image", torch.zeros(3, 0, 0, dtype=torch.uint8)),
        "an image of one channel": ("image", torch.zeros(1, 64, 64)),
        "an image of NaN": ("image", torch.full((3, 64, 64), math.nan)),
        "an image of 20,000 x 20,000": ("image", torch.zeros(3, 1, 1).expand(3, 20_000, 20_000)),
        "an image of bool": ("image", torch.ones(3, 64, 64, dtype=torch.bool)),
        "an image of complex numbers": ("image", torch.ones(3, 64, 64, dtype=torch.complex64)),
        "ignored boxes of another shape": ("ignored_boxes", torch.zeros(3, 5)),
        "10^5 ignored boxes": ("ignored_boxes", torch.rand(10**5, 4)),
    }
    for name, (key, value) in tensors.items():
        yield Case("saved steps", name, "replay",
                   lambda p, k=key, v=value: _step_with(p, lambda c: c["batch"][0].update({k: v})))  # fmt: skip
    instances = {
        "image_size of 2^40": {"image_size": [2**40, 2**40]},
        "image_size of texts": {"image_size": ["a", "b"]},
        "image_size of one": {"image_size": [1]},
        "no boxes": {"boxes": {}},
        "boxes of another shape": {"boxes": {"gt_boxes": torch.zeros(2, 7)}},
        "boxes of texts": {"boxes": {"gt_boxes": "x"}},
        "boxes of NaN": {"boxes": {"gt_boxes": torch.full((2, 4), math.nan)}},
        "boxes of 1e38": {"boxes": {"gt_boxes": torch.full((2, 4), 1e38)}},
        "classes of 10^9": {"tensors": {"gt_classes": torch.tensor([10**9, -5])}},
        "classes of another number": {"tensors": {"gt_classes": torch.zeros(9, dtype=torch.int64)}},
        "classes that are floats": {"tensors": {"gt_classes": torch.zeros(2)}},
        "fields of Python": {"tensors": {"__class__": torch.zeros(2), "_fields": torch.zeros(2)}},
        "a field called image_size": {"tensors": {"_image_size": torch.zeros(2)}},
    }
    for name, change in instances.items():
        yield Case("saved steps", f"instances: {name}", "replay",
                   lambda p, v=change: _step_with(p, lambda c: c["batch"][0]["instances"].update(v)))  # fmt: skip
    keys = {
        "channels of 10^9": "MODEL: {FPN: {OUT_CHANNELS: 1000000000}}",
        "10^6 convolutions": "MODEL: {RETINANET: {NUM_CONVS: 1000000}}",
        "10^9 classes": "MODEL: {RETINANET: {NUM_CLASSES: 1000000000}}",
        "a device": "MODEL: {DEVICE: meta}",
        "anchors of 1e30": "MODEL: {ANCHOR_GENERATOR: {SIZES: [[1.0e+30]]}}",
        "10^5 anchors": "MODEL: {ANCHOR_GENERATOR: {SIZES: [[" + ", ".join(["32"] * 90_000) + "]]}}",
        "another model": "MODEL: {META_ARCHITECTURE: GeneralizedRCNN}",
        "a norm that is code": "MODEL: {RETINANET: {NORM: eval}}",
        "a loss that is none": "MODEL: {FOCAL: {LOSS: {NAME: x}}}",
        "weights at an address": "MODEL: {WEIGHTS: 'http://127.0.0.1:9/x.pkl'}",
        "a base": "_BASE_: /etc/passwd",
        "an output folder": "OUTPUT_DIR: /planted",
    }
    for name, text in keys.items():

        def change(content: Any, text: str = text) -> None:
            mine = yaml.safe_load(text)
            theirs = yaml.safe_load(content["config"])
            content["config"] = yaml.safe_dump(_merged(theirs, mine))

        yield Case("saved steps", f"config: {name}", "replay", lambda p, c=change: _step_with(p, c))


def _merged(theirs: Any, mine: Any) -> Any:
    if not (isinstance(theirs, dict) and isinstance(mine, dict)):
        return mine
    return {**theirs, **{k: _merged(theirs.get(k), v) for k, v in mine.items()}}


# Grids


def grids() -> Groups:
    """Studies: names and cells."""
    names = [
        "../../x",
        "/etc/x",
        "a\0b",
        "\x1b[31m",
        "{K:999999999}",
        "{K.__class__}",
        "{0.__init__}",
        "x" * 10**5,
    ]
    names += [
        "a|b",
        "a\nb",
        "..",
        "~",
        "$(touch planted)",
        "; touch planted",
        "<script>",
        "=cmd()",
        "\ud83d",
        "CON",
    ]
    for name in names:
        cell = {"NAME": name, "SWEEP": {"SEED2": [1]}}
        yield Case("grids", f"a cell called {name[:40]!r}", "study", lambda p, c=cell: _study(p, [c]))
    more: dict[str, Any] = {
        "10^10 cells": [{"NAME": "a", "SWEEP": {k: [*range(10)] for k in "ABCDEFGHIJ"}}],
        "a setting that is a flag": [{"NAME": "a", "SET": {"--num-gpus": "8"}}],
        "a setting that trusts": [{"NAME": "a", "SET": {"--trust-files": "x"}}],
        "a setting that is an address": [{"NAME": "a", "SET": {"MODEL.WEIGHTS": "http://127.0.0.1:9/x"}}],
        "a setting that is code": [
            {"NAME": "a", "SET": {"SOLVER.STEPS": "__import__('os').system('touch planted')"}}
        ],
        "a setting of lines": [{"NAME": "a", "SET": {"MODEL.FOCAL.LOSS.NAME": "a\nb"}}],
        "a setting of 10^5 characters": [{"NAME": "a", "SET": {"MODEL.FOCAL.LOSS.NAME": "a" * 10**5}}],
        "a setting of itself": [{"NAME": "a", "SET": {"SET": {"A": {}}}}],
        "an output folder": [{"NAME": "a", "SET": {"OUTPUT_DIR": "/planted"}}],
        "a base": [{"NAME": "a", "SET": {"_BASE_": "/etc/passwd"}}],
        "a figure that is NaN": [{"NAME": "a", "PAPER": math.nan, "SET": {"X": 1}}],
        "a figure of 10^400": [{"NAME": "a", "PAPER": 10**400, "SET": {"X": 1}}],
    }
    for name, cells in more.items():
        yield Case("grids", name, "study", lambda p, c=cells: _study(p, c))


def _study(place: Place, cells: list[Any]) -> list[str]:
    grid = json.dumps({"SEEDS": [1], "CELLS": cells})
    (place.input / "grid.yaml").write_text(grid)
    return arguments("study", place, MODEL__FOCAL__LOSS__NAME="nothing")  # if a grid is read, no run begins


# 8, 9, 10, 11: names and places


def names() -> Groups:
    """Names of datasets, and of folders and files."""
    for name in (
        "x\0y",
        "x" * 300,
        "é" * 101,
        "x\ny",
        "x\x1b[31m",
        "\ud800",
        "../x",
        "..",
        "a/b",
        "",
        " ",
        "~",
        "-x",
        "*",
        "{}",
    ):
        for program in ("train", "doctor"):

            def make(place: Place, name: str = name, program: str = program) -> list[str]:
                data = place.input / "data"
                entry = {
                    "NAME": name,
                    "IMAGES": str(data / "images"),
                    "ANNOTATIONS": str(data / "annotations.json"),
                }
                return arguments(
                    program, place, DATASETS__FOCAL=[entry], DATASETS__TRAIN=[name], DATASETS__TEST=[name]
                )

            yield Case("11 names of datasets", f"{name[:40]!r} ({program})", program, make)
    for folder in (
        "a#b",
        "a?b",
        "run:12",
        "a%20b",
        "a b",
        "http:",
        "-x",
        "é",
        "$HOME",
        "*",
        "a'b\"c",
        "[1]",
        "{x}",
        "a\\b",
    ):
        for program in ("train", "resume", "eval", "predict", "doctor"):

            def make(place: Place, folder: str = folder, program: str = program) -> list[str]:
                _copy_run(place)
                target = place.out / folder
                target.mkdir()
                for path in list(place.out.iterdir()):
                    if path != target:
                        path.rename(target / path.name)
                given = arguments(program, place, OUTPUT_DIR=str(target))
                if program == "eval":
                    given[-1] = str(target / "model_final.pth")
                return given

            yield Case("8 names of folders", f"{folder!r} ({program})", program, make)
    for name in (
        b"\xe9.png",
        b"\xff\xfe.png",
        "é.png".encode(),
        b"a\nb.png",
        b"\x1b[31m.png",
        b"-x.png",
        b"a'b.png",
        b"<b>.png",
        b"x" * 250 + b".png",
    ):
        for program in ("predict", "doctor", "train"):

            def make(place: Place, name: bytes = name, program: str = program) -> list[str]:
                images = os.fsencode(place.input / "data/images")
                os.rename(images + b"/0.png", images + b"/" + name)
                path = place.input / "data/annotations.json"
                text = json.dumps(os.fsdecode(name))
                path.write_text(path.read_text().replace('"0.png"', text))
                return arguments(program, place)

            yield Case("9 names of files", f"{name[:30]!r} ({program})", program, make)


def places() -> Groups:
    """Pipes, devices, folders, links and sparse files where files are read."""
    kinds: dict[str, Callable[[Path], object]] = {
        "a pipe": lambda path: os.mkfifo(path),
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/full": lambda path: path.symlink_to("/dev/full"),
        "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a sparse file of 4 TB": lambda path: _sparse(path, b""),
        "a socket": _socket,
        "a file without leave": lambda path: (path.write_bytes(b""), path.chmod(0)),
    }
    targets: dict[str, tuple[str, str]] = {
        "the config": ("config.yaml", "doctor"),
        "an image": ("data/images/0.png", "train"),
        "an image, doctor": ("data/images/0.png", "doctor"),
        "an image, predict": ("data/images/0.png", "predict"),
        "the annotations": ("data/annotations.json", "train"),
        "the annotations, doctor": ("data/annotations.json", "doctor"),
        "the weights": ("run/model_final.pth", "eval"),
        "the checkpoint": ("../out/model_final.pth", "resume"),
        "last_checkpoint": ("../out/last_checkpoint", "resume"),
        "the grid": ("grid.yaml", "study"),
        "the saved step": ("step/step_rank0.pth", "replay"),
        "the page": ("../out/page.html", "doctor"),
        "log.txt": ("../out/log.txt", "train"),
        "metrics.json": ("../out/metrics.json", "train"),
        "config.yaml of the run": ("../out/config.yaml", "train"),
        "training.lock": ("../out/training.lock", "train"),
        "a checkpoint aside": ("../out/model_final.pth.tmp", "train"),
        "the pictures": ("../out/pictures", "predict"),
        "the class names": ("names.yaml", "doctor"),
        "the images' folder": ("data/images", "train"),
    }
    for kind, plant in kinds.items():
        for target, (where, program) in targets.items():

            def make(
                place: Place, plant: Any = plant, where: str = where, program: str = program
            ) -> list[str]:
                if program == "resume":
                    _copy_run(place)
                data = place.input / "data"
                entry = {
                    "NAME": DATA,
                    "IMAGES": str(data / "images"),
                    "ANNOTATIONS": str(data / "annotations.json"),
                }
                if where == "names.yaml":
                    entry["CLASSES"] = str(place.input / where)
                given = arguments(program, place, DATASETS__FOCAL=[entry])
                if where == "../out/page.html":
                    given += ["--html", str(place.out / "page.html")]
                path = place.input / where
                path = path.parent.resolve() / path.name
                if path.is_dir():
                    path.rename(path.with_name("elsewhere"))
                else:
                    path.unlink(missing_ok=True)
                plant(path)
                return given

            yield Case("10 pipes, devices, links", f"{target}: {kind}", program, make)
    outside = ("log.txt", "metrics.json", "config.yaml", "training.lock", "model_final.pth.tmp", "last_checkpoint",
               "last_checkpoint.tmp", "model_final.pth", "model_0000002.pth", "inference", "torchrun.json")  # fmt: skip
    for name in outside:
        for program in ("train", "resume"):

            def make(place: Place, name: str = name, program: str = program) -> list[str]:
                _copy_run(place)
                target = place.folder / "home" / ("kept" if name != "inference" else "folder")
                target.mkdir() if name == "inference" else target.write_text("kept")
                (place.out / name).unlink(missing_ok=True)
                (place.out / name).symlink_to(target)
                return arguments(program, place)

            yield Case("output folders of others", f"{name} is a link out of it ({program})", program, make)
    contents = [
        "../../home/x.pth",
        "/etc/passwd",
        "model_final.pth\n\n",
        "\0",
        "a" * 10**7,
        "\x1b[31m.pth",
        "x.pth",
        "\ud800.pth",
    ]
    for text in contents:

        def make(place: Place, text: str = text) -> list[str]:
            _copy_run(place)
            (place.out / "last_checkpoint").write_text(text, errors="surrogatepass")
            return arguments("resume", place)

        yield Case("output folders of others", f"last_checkpoint with {text[:30]!r}", "resume", make)
    for name in ("training.lock", "torchrun.json", "config.yaml", "metrics.json"):
        for text in ("{", "[" * 10**5, "\x1b[31m", "9" * 10**5, "\0" * 100, '{"a": NaN}', "", "null"):

            def make(place: Place, name: str = name, text: str = text) -> list[str]:
                _copy_run(place)
                (place.out / name).write_text(text)
                return arguments("resume", place)

            yield Case("output folders of others", f"{name} with {text[:10]!r}", "resume", make)


def _socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        listener.bind(path.name)
        os.chdir(before)


def terminal() -> Groups:
    """Texts with terminal escapes, wherever a line can quote them."""
    text = "\x1b]0;owned\x07\x1b[2J\x9b31m"
    spots: dict[str, tuple[str, Callable[[Place], list[str]]]] = {
        "a key": ("train", lambda p: [*job(p), f"SEE{text}", "1"]),
        "a value": ("train", lambda p: [*job(p), "INPUT.FORMAT", text]),
        "a config's name": ("train", lambda p: ["--config-file", f"{text}.yaml"]),
        "an option": ("train", lambda p: [f"--{text}"]),
        "a loss": ("train", lambda p: job(p, MODEL__FOCAL__LOSS__NAME=text)),
        "a file of weights": ("train", lambda p: job(p, MODEL__WEIGHTS=f"{text}.pth")),
        "a folder of images": ("predict", lambda p: [*job(p), text, "--output", str(p.out / "x")]),
        "a dataset": ("predict", lambda p: [*job(p), "--dataset", text, "--output", str(p.out / "x")]),
        "a folder of steps": ("replay", lambda p: [text]),
        "a grid": ("study", lambda p: [*job(p), "--grid", text, "--output", str(p.out / "x")]),
        "seeds": ("study", lambda p: [*job(p), "--grid", "x", "--seeds", text, "--output", str(p.out / "x")]),
        "a device": ("replay", lambda p: [str(p.input / "step"), "--device", text]),
    }
    for name, (program, make) in spots.items():
        yield Case("14 terminal escapes", f"in {name} ({program})", program, make)

    def classes(place: Place, program: str) -> list[str]:
        path = place.input / "data/annotations.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = text
        path.write_text(json.dumps(content))
        return arguments(program, place)

    for program in ("train", "eval", "predict", "doctor", "anchors"):
        yield Case(
            "14 terminal escapes", f"in a class ({program})", program, lambda p, g=program: classes(p, g)
        )
