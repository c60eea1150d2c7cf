"""Ceilings are measured and cached; limits follow from them."""

import json

import pytest
import torch

from tensormill import roofline
from tensormill.roofline import Ceilings, Cost

MACHINE = Ceilings("test", read_bandwidth=2e10, copy_bandwidth=1e10, rates={"fp32": 1e12, "int8": 4e12})


def test_limit_is_the_larger_of_bytes_and_operations():
    assert MACHINE.limit_seconds(Cost({"fp32": 1e6}, 1e10, 1e10)) == pytest.approx(1.0)
    assert MACHINE.limit_seconds(Cost({"fp32": 3e12}, 1.0, 1.0)) == pytest.approx(3.0)
    assert MACHINE.limit_seconds(Cost({"fp32": 1e12, "int8": 4e12}, 0, 0)) == pytest.approx(2.0)
    assert MACHINE.limit_seconds(Cost({"b1": 1e15}, 2e10, 0)) == pytest.approx(
        1.0
    )  # unknown unit: bytes alone


def test_ceilings_are_measured_once_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_CACHE", str(tmp_path))
    calls = []

    def measured(device):
        calls.append(device)
        return MACHINE

    monkeypatch.setattr(roofline, "measure_ceilings", measured)
    assert roofline.ceilings("cpu") == MACHINE
    assert roofline.ceilings("cpu") == MACHINE
    assert len(calls) == 1
    (file,) = tmp_path.iterdir()
    file.write_text("{ damaged")
    assert roofline.ceilings("cpu") == MACHINE
    assert len(calls) == 2
    stored = json.loads(file.read_text())
    stored["version"]["torch"] = "0.1"  # measured with another torch: measured again
    file.write_text(json.dumps(stored))
    roofline.ceilings("cpu")
    assert len(calls) == 3


def test_an_unwritable_cache_only_costs_time(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TENSORMILL_CACHE", str(blocked / "below"))
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device: MACHINE)
    assert roofline.ceilings("cpu") == MACHINE


@pytest.mark.slow
def test_measured_ceilings_are_plausible():
    machine = roofline.measure_ceilings("cpu")
    assert 1e9 < machine.read_bandwidth < 1e12
    assert 1e9 < machine.rates["fp32"] < 1e14
    assert all(rate >= machine.rates["fp32"] for unit, rate in machine.rates.items() if unit != "fp64")
    assert "threads" in machine.device
    assert str(torch.get_num_threads()) in machine.device


def test_asking_for_fast_products_leaves_the_random_state_alone():
    roofline._has_fast_16_bit_matmul.cache_clear()
    before = torch.get_rng_state()
    roofline.has_fast_matmul(torch.bfloat16, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
