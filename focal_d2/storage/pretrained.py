"""Pretrained weights of backbones from timm: `MODEL.WEIGHTS: timm://NAME`, from timm's hub."""

from __future__ import annotations

import warnings
from types import ModuleType

from focal_d2.errors import UserError, describe_error, did_you_mean

_HUB = "timm://"
_FILE = "model.safetensors"  # all of timm's models have it on their hub


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
    return path.startswith(_HUB)


def check_pretrained(address: str) -> str:
    """Return the name of a model on timm's hub, if timm knows it.

    Args:
        address: timm://NAME, with the name of pretrained weights (resnet18.a1_in1k) or of an architecture
            (resnet18), which stands for the weights that timm prefers.

    Raises:
        UserError: if it does not.
    """
    timm = import_timm(f"MODEL.WEIGHTS {address}")
    name = address.removeprefix(_HUB)
    pretrained = timm.list_models(pretrained=True)
    if name not in pretrained and name not in {x.partition(".")[0] for x in pretrained}:
        near = did_you_mean(name, pretrained)
        raise UserError(f"{address}: timm has no pretrained weights of that name{near}")
    return name


def fetch_pretrained(address: str) -> str:
    """Return the local copy of the weights that an address names; the hub's library downloads them if needed.

    Raises:
        UserError: if they can't be fetched.
    """
    name = check_pretrained(address)
    timm = import_timm(address)
    repository = timm.models.get_pretrained_cfg(name).hf_hub_id
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
