"""Load a config from a file and overrides, with all checks that need no data."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from focal_d2.config import add_focal_config, check_choice, key_value, leaves, set_value
from focal_d2.config.architectures import CLASS_KEYS
from focal_d2.config.files import merge_file, merge_text
from focal_d2.config.legal_values import check_values
from focal_d2.data.dataset_checks import count_classes
from focal_d2.data.entries import register_datasets
from focal_d2.data.image_files import allow_pixels
from focal_d2.errors import UNLESS_TRUSTED, UserError, did_you_mean, one_line
from focal_d2.evaluation import check_backend
from focal_d2.modeling.backbones.timm_fpn import resolve_pixel_values
from focal_d2.modeling.build import resolve_device
from focal_d2.modeling.losses import LOSSES, parameter_names
from focal_d2.storage.card import read_card
from focal_d2.storage.configs import check_config_file, find_config, is_checkpoint
from focal_d2.storage.downloads import is_address
from focal_d2.storage.yaml_text import LONGEST_NUMBER

_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")
_KERNELS = "MODEL.FOCAL.KERNELS"
_COMMAND_LINE = "command line"

# yacs's message about a value of another type than the default's, and plain words for the types.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?:\w+\.)*(?P<type>\w+)'> vs\. <class '(?:\w+\.)*(?P<given>\w+)'>\) "
    r"with values \(.* vs\. (?P<value>.*)\) for config key: (?P<key>\S+)",
    re.DOTALL,
)
# Python writes no number of more than 4,300 decimal digits, and reads those of other bases of any length.
_LONG_NUMBER = re.compile(rf"\b0[xob][\da-f_]{{{LONGEST_NUMBER + 1},}}", re.IGNORECASE)
# A list of texts without quotes, as in YAML; it is no literal of Python.
_PLAIN_LIST = re.compile(r"\[[^][(){}:]*\]")
_TYPES = {"bool": "True or False", "int": "a whole number", "str": "a text", "CfgNode": "a section"}


def load_config(
    config_file: str,
    overrides: Sequence[str] = (),
    *,
    trust_files: bool = False,
    allow_download: bool = False,
) -> CfgNode:
    """Read a YAML config over the defaults, apply overrides, and run the checks that need no data.

    `MODEL.DEVICE` may be "auto": CUDA if there is a CUDA device, else the CPU. The datasets of
    `DATASETS.FOCAL` are registered. `MODEL.RETINANET.NUM_CLASSES` and `MODEL.ROI_HEADS.NUM_CLASSES` may be
    "auto": the number of classes of the first dataset in `DATASETS.TRAIN`, or in `DATASETS.TEST` if the files
    of the former are missing. Only then are data read.

    Args:
        config_file: path of a YAML file, or the name of one that comes with the package (`focal-d2 configs`);
            "" for the defaults alone. Of a checkpoint (.pth): the config in it, with `MODEL.WEIGHTS` that
            file and `MODEL.DEVICE` auto; it has no datasets and no schedule.
        overrides: KEY VALUE pairs.
        trust_files: let the YAML, or the checkpoint, run code, as detectron2 does. If false, YAML is read by
            `focal_d2.config.files`.
        allow_download: let `_BASE_` name addresses outside detectron2's stores.

    Raises:
        UserError: for anything the user can correct.
    """
    cfg = get_cfg()
    add_focal_config(cfg)
    if is_checkpoint(config_file):
        _merge_checkpoint(cfg, os.path.expanduser(config_file), trust_files=trust_files)
    elif config_file:
        config_file = find_config(config_file)
        check_config_file(config_file, config_file)
        with _config_errors(cfg, config_file), _other_types(cfg):
            if trust_files:
                cfg.merge_from_file(config_file)
            else:
                merge_file(cfg, config_file, allow_download=allow_download)
    _check_pairs(overrides)
    with _config_errors(cfg, _COMMAND_LINE), _other_types(cfg):
        _add_loss_parameters(cfg, overrides)
        cfg.merge_from_list(_with_lists(cfg, overrides))
    _refuse_nulls(cfg)
    _refuse_control_characters(cfg)
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = map(os.path.expanduser, (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS))
    if not trust_files:
        _refuse_unsafe_values(cfg)
    resolve_device(cfg)
    for key, registry, value in (
        ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE),
        ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME),
    ):
        check_choice(key, value, tuple(sorted(name for name, _ in registry)))
    check_values(cfg)
    resolve_pixel_values(cfg)
    # The evaluator is built at the end of training, which is too late to report a wrong backend.
    check_backend(cfg.TEST.FOCAL.EVAL_BACKEND)
    allow_pixels(cfg.INPUT.FOCAL.MAX_PIXELS)  # readers of annotations open images to read their size
    register_datasets(cfg.DATASETS.FOCAL)
    for key in CLASS_KEYS:
        if key_value(cfg, key) == "auto":
            set_value(cfg, key, count_classes(cfg, key))
    cfg.freeze()
    return cfg


def _merge_checkpoint(cfg: CfgNode, path: str, *, trust_files: bool) -> None:
    """Merge the config that a checkpoint has in it, and let the checkpoint be `MODEL.WEIGHTS`."""
    card = read_card(path, trusted=trust_files)
    if card is None:
        raise UserError(
            f"{path} has no config in it: it was written by an older version or by another program; give its "
            "config.yaml, and MODEL.WEIGHTS"
        )
    with _config_errors(cfg, path), _other_types(cfg):
        merge_text(cfg, card.config, path)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = path, "auto"


@contextmanager
def _other_types(cfg: CfgNode) -> Iterator[None]:
    """Accept "auto" as a number of classes, and for kernels the booleans that YAML reads from on and off.

    yacs accepts another type than the default's only if the default is None. So these keys are None while the
    block merges values.
    """
    before = {key: key_value(cfg, key) for key in (*CLASS_KEYS, _KERNELS)}
    for key in before:
        set_value(cfg, key, None)
    yield
    if isinstance(on := key_value(cfg, _KERNELS), bool):
        set_value(cfg, _KERNELS, "on" if on else "off")
    for key, value in before.items():
        if key_value(cfg, key) is None:
            set_value(cfg, key, value)


@contextmanager
def _config_errors(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turn errors of yaml and yacs into a `UserError` that names the source and the nearest legal key."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: not a config; it must be nested lines of KEY: value") from error
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        # str() of a KeyError would have quotes around the message.
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        reason = one_line(text)
        if unknown := re.search(r"[Nn]on-existent (?:config )?key: (\S+)", reason):
            key, known = unknown.group(1), {*leaves(cfg), *_loss_parameter_keys()}
            sections = {name.rpartition(".")[0] for name in known} - {""}
            reason = f"unknown key {key}{did_you_mean(key, [*known, *sections])}"
        elif mismatch := _MISMATCH.search(text):
            reason = _wrong_type(**mismatch.groupdict(), quoted=source == _COMMAND_LINE)
        raise UserError(f"{source}: {reason}") from error


def _wrong_type(key: str, type: str, given: str, value: str, *, quoted: bool) -> str:
    """Describe what a value of a wrong type must be instead.

    Args:
        key: the key with the value.
        type: name of the default's type.
        given: name of the value's type.
        value: as text.
        quoted: whether a list must be written for a shell.
    """
    value = one_line(value, 100)
    wanted = _TYPES.get(type, f"a {type}")
    if type == "float":
        wanted = f"a number with a point, such as {value}.0" if given == "int" else "a number"
    elif type in ("tuple", "list"):
        wanted = "a list"
        if key == "DATASETS.FOCAL":
            wanted = "a list of mappings with NAME, IMAGES, ANNOTATIONS (docs/data.md)"
        elif given in ("str", "int", "float", "bool"):
            items = _parts(value) if given == "str" else [value]
            listed = ", ".join(repr(x) if quoted and given == "str" else x for x in items)
            wanted = f'a list: "[{listed}]"' if quoted else f"a list: [{listed}]"
    return f"{key} is {value}; it must be {wanted}"


def _check_pairs(overrides: Sequence[str]) -> None:
    """Check that overrides are KEY VALUE pairs.

    Raises:
        UserError: for an option among the pairs, which argparse does not notice, a key without a value, or a
            number that is too long.
    """
    for i, text in enumerate(overrides):
        if re.match(r"--[A-Za-z]" if i % 2 else "-", text):
            raise UserError(f"{text} must come before the KEY VALUE pairs, which begin with {overrides[0]}")
        if i % 2 == 0 and re.match(r"[\w.]+=", text):
            raise UserError(f"{text}: write {text.replace('=', ' ', 1)}, without =")
        if i % 2 and _LONG_NUMBER.search(text):
            raise UserError(f"{overrides[i - 1]} has a number of more than {LONGEST_NUMBER} digits")
    if len(overrides) % 2:
        raise UserError(f"overrides must be KEY VALUE pairs; {overrides[-1]} has no value")


def _add_loss_parameters(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Add a key for each parameter of a registered loss that overrides set: yacs refuses unknown keys.

    Files may contain such parameters anyway. Building the loss checks whether it reads them.
    """
    for key in _loss_parameter_keys().intersection(overrides[::2]):
        cfg.MODEL.FOCAL.LOSS.setdefault(key.rpartition(".")[2], None)


def _loss_parameter_keys() -> set[str]:
    return {f"MODEL.FOCAL.LOSS.{name}" for loss in LOSSES.values() for name in parameter_names(loss)}


def _with_lists(cfg: CfgNode, overrides: Sequence[str]) -> list[Any]:
    """Read `[mine_train, other]` as a list of texts, as YAML does, if the key's default is a list."""
    values = leaves(cfg)
    result: list[Any] = list(overrides)
    for i in range(1, len(result), 2):
        text = str(result[i]).strip()
        if isinstance(values.get(result[i - 1]), (list, tuple)) and _PLAIN_LIST.fullmatch(text):
            try:
                ast.literal_eval(text)
            except (ValueError, SyntaxError):
                result[i] = _parts(text)
    return result


def _parts(text: str) -> list[str]:
    """Return the items of a list that is written with or without quotes and brackets."""
    items = (item.strip().strip("\"'").strip() for item in text.strip("[]() ").split(","))
    return [item for item in items if item]


def _refuse_nulls(cfg: CfgNode) -> None:
    """Refuse null for a key with a default: yacs accepts it, and the job would fail at its first use."""
    defaults = get_cfg()
    add_focal_config(defaults)
    values = leaves(cfg)
    for key, default in leaves(defaults).items():
        if default is not None and values.get(key) is None:
            raise UserError(f"{key} is null; it must be a {type(default).__name__} (default: {default})")


def _refuse_control_characters(cfg: CfgNode) -> None:
    """Refuse texts that would begin another line, or move the cursor, in logs, tables or files."""
    for key, value in leaves(cfg).items():
        for text in _texts(value):
            if _CONTROL.search(text):
                raise UserError(f"{key} has the text {text!r}; control characters are refused")


def _refuse_unsafe_values(cfg: CfgNode) -> None:
    """Refuse values with which detectron2 would fetch files or run code from them.

    detectron2 downloads an address in any key. Only for `MODEL.WEIGHTS` does our checkpointer do that.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            f"MODEL.LOAD_PROPOSALS is True: proposals are pickles that can run code{UNLESS_TRUSTED}"
        )
    for key, value in leaves(cfg).items():
        addresses = [text for text in _texts(value) if is_address(text)]
        if addresses and key != "MODEL.WEIGHTS":
            raise UserError(
                f"{key}: {addresses[0]} is an address; only MODEL.WEIGHTS and _BASE_ can name one"
            )


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return [text for x in value for text in _texts(x)]
    return [value] if isinstance(value, str) else []
