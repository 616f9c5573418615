"""In which precision each kind of CPU computes."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.modeling import precision
from focal_d2.modeling.precision import Bfloat16Support, autocast_type, is_narrow, judge_cpu
from tests.conftest import make_resnet_cfg

ZEN_4 = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}
AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
SAPPHIRE_RAPIDS = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}
ARM = {"architecture": "aarch64", "bf16": True, "sve_bf16": True}


@pytest.mark.parametrize(
    "capabilities, vendor, trusted, reason",
    [
        (SAPPHIRE_RAPIDS, "GenuineIntel", True, "has amx_bf16"),
        (SAPPHIRE_RAPIDS, None, True, "has amx_bf16"),
        ({"amx_bf16": True}, "AuthenticAMD", True, "has amx_bf16"),
        (ZEN_4, "AuthenticAMD", True, "has avx512_bf16 and is AMD's"),
        (ZEN_4, "GenuineIntel", False, "without amx_bf16, and its vendor is GenuineIntel, not AuthenticAMD"),
        (ZEN_4, "HygonGenuine", False, "its vendor is HygonGenuine"),
        (ZEN_4, None, False, "without amx_bf16, and its vendor cannot be read"),
        (AVX2, "AuthenticAMD", False, "has neither amx_bf16 nor avx512_bf16"),
        (AVX2, "GenuineIntel", False, "has neither"),
        (ARM, None, False, "has neither"),
        ({}, "AuthenticAMD", False, "is not described by PyTorch"),
        ({}, None, False, "is not described by PyTorch"),
    ],
)
def test_judge_cpu_trusts_amx_and_amd_only(capabilities, vendor, trusted, reason):
    support = judge_cpu(capabilities, vendor)
    assert support.trusted == trusted
    assert reason in support.reason


@pytest.mark.parametrize(
    "content, vendor",
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "AuthenticAMD"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", None),
        ("", None),
        (None, None),  # there is no such file
    ],
)
def test_bfloat16_support_reads_the_vendor(monkeypatch, content, vendor):
    def read_text(self):
        assert str(self) == "/proc/cpuinfo"
        if content is None:
            raise FileNotFoundError(str(self))
        return content

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: ZEN_4, raising=False)
    assert precision.bfloat16_support() == judge_cpu(ZEN_4, vendor)
    monkeypatch.delattr("torch.cpu.get_capabilities")  # PyTorch 2.7
    assert not precision.bfloat16_support().trusted


@pytest.mark.parametrize(
    "trusted, name, expected, level, message",
    [
        (True, "auto", torch.bfloat16, logging.INFO, "auto: computing in bfloat16, because this CPU has it"),
        (False, "auto", None, logging.INFO, "auto: computing in float32, because this CPU has it"),
        (True, "bfloat16", torch.bfloat16, None, None),
        (False, "bfloat16", torch.bfloat16, logging.WARNING, "is bfloat16, but this CPU has it"),
    ],
)
def test_autocast_type_on_a_cpu_says_what_it_decides(
    monkeypatch, caplog, trusted, name, expected, level, message
):
    monkeypatch.setattr(precision, "bfloat16_support", lambda: Bfloat16Support(trusted, "has it"))
    caplog.set_level(logging.INFO, logger="focal_d2")
    assert autocast_type(name, enabled=True, device="cpu") == expected
    records = [(x.levelno, x.getMessage()) for x in caplog.records]
    assert len(records) == (message is not None)
    assert all(n == level and message in text for n, text in records)
    assert autocast_type(name, enabled=False, device="cpu") is None
    assert len(caplog.records) == len(records)


def test_autocast_type_on_a_gpu_does_not_look_at_the_cpu(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_support", None)
    assert autocast_type("auto", enabled=True, device="cuda:1") == torch.bfloat16
    assert autocast_type("bfloat16", enabled=True, device="cuda") == torch.bfloat16
    assert autocast_type("float16", enabled=True, device="cuda") == torch.float16


def test_autocast_type_refuses_float16_on_a_cpu_and_unknown_names():
    with pytest.raises(UserError, match="float16, which needs a GPU"):
        autocast_type("float16", enabled=True, device="cpu")
    with pytest.raises(UserError, match='DTYPE is "half"; legal values: auto, bfloat16, float16'):
        build_model(make_resnet_cfg(MODEL__FOCAL__AMP__DTYPE="half"))


@pytest.mark.parametrize("capabilities, expected", [(SAPPHIRE_RAPIDS, torch.bfloat16), (AVX2, None)])
def test_auto_is_the_models_default(monkeypatch, capabilities, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert build_model(make_resnet_cfg(MODEL__FOCAL__AMP__ENABLED=True)).amp == expected


def test_is_narrow_asks_for_two_cells_before_the_last_level():
    assert is_narrow(torch.zeros(1, 3, 256, 64), coarsest_stride=128)
    assert not is_narrow(torch.zeros(1, 3, 32, 65), coarsest_stride=128)
    assert not is_narrow(torch.zeros(1, 3, 64, 64, device="meta"), coarsest_stride=128)


def test_narrow_strided_convolutions_are_refused_in_channels_last():
    narrow = {"MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__RES2_OUT_CHANNELS": 8}
    assert build_model(make_resnet_cfg(**narrow, MODEL__RESNETS__NORM="BN"))
    with pytest.raises(UserError, match=r"res3\.0\.shortcut is a 1 × 1 convolution of stride 2 from 8 to 16"):
        build_model(make_resnet_cfg(**narrow, MODEL__RESNETS__NORM="BN", MODEL__FOCAL__CHANNELS_LAST=True))
    assert build_model(make_resnet_cfg(MODEL__FOCAL__CHANNELS_LAST=True))
