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


def test_products_of_single_bits_are_counted_right():
    """The kernel that measures their rate, in the emulation: what it sums is what is asked of it on a GPU."""
    from emulation.kernels import emulate

    kernel = emulate(roofline.bit_rate_module(), "bit_rate")
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(1 << 31), 1 << 31, (384, 32), generator=generator).to(torch.int32)
    sums = torch.zeros(2, 256, 128, dtype=torch.int32)
    roofline.launch_bit_rate(kernel, bits, sums, 1)
    assert roofline.right_bit_sums(bits, sums)
    once = sums.clone()
    roofline.launch_bit_rate(kernel, bits, sums, 3)
    assert torch.equal(sums, 3 * once) and not roofline.right_bit_sums(bits, sums)


def test_the_kernel_that_multiplies_single_bits_compiles():
    from emulation.kernels import compile_or_skip, disassembly, resources

    code = compile_or_skip(roofline.bit_rate_module(), "sm_90a")
    assert resources(code)["bit_rate"].stack == 0
    assert "BGMMA.64x256x256.AND.POPC" in disassembly(code)


def test_where_there_is_no_instruction_for_bits_there_is_no_rate():
    assert roofline._bit_rate(torch.device("cpu")) is None
