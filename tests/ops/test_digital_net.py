"""What is special to digital_net: identities of nets, the digits that a dtype keeps, threads, refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import use_implementation
from tensormill.ops import digital_net
from tensormill.ops.digital_net import operator

IMPLEMENTATIONS = [i.name for i in operator.implementations if "cpu" in i.devices and i.missing() is None]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
needs_cpu = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="the compiled kernels are not installed")


def random_net(d, m, bits, seed, replications=1):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (replications, d, m + 1), generator=generator)
    digits = words & ((1 << bits) - 1)
    return digits[..., :-1], digits[..., -1]


@settings(max_examples=60, deadline=None)
@given(
    d=st.sampled_from([1, 2, 3, 8, 33, 64, 130]),
    m=st.integers(1, 62),
    bits=st.integers(1, 63),
    n=st.integers(0, 300),
    where=st.floats(0, 1),
    gray=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_every_implementation_gives_the_same_bits(d, m, bits, n, where, gray, shifted, dtype, seed):
    n = min(n, 1 << m)
    start = min(int(where * ((1 << m) - n)), (1 << m) - n)
    matrices, shift = random_net(d, m, bits, seed, 2)
    call = (matrices, shift if shifted else None, start, n, bits, gray, dtype)
    expected = operator.reference(*call)
    for name in IMPLEMENTATIONS:
        with use_implementation(digital_net=name):
            assert torch.equal(operator(*call), expected), name


@every_implementation
def test_orders_shifts_and_parts(implementation):
    matrices, shift = (t[0] for t in random_net(5, 12, 40, seed=0))

    def points(n=4096, start=0, **more):
        with use_implementation(digital_net=implementation):
            return digital_net(matrices, n=n, start=start, bits=40, dtype=torch.int64, **more)

    natural, index = points(), torch.arange(4096)
    assert torch.equal(points(order="gray"), natural[index ^ (index >> 1)])
    assert torch.equal(points(shift=shift), natural ^ shift)
    parts = [points(n, start) for start, n in ((0, 1), (1, 62), (63, 1938), (2001, 2095))]
    assert torch.equal(torch.cat(parts), natural)
    i, j = torch.randint(0, 4096, (2, 100), generator=torch.Generator().manual_seed(1))
    assert torch.equal(natural[i ^ j], natural[i] ^ natural[j])  # linear


@every_implementation
def test_digits_are_cut_and_never_rounded_up(implementation):
    ones = torch.full((1, 3), (1 << 63) - 1)
    for dtype, digits in ((torch.float64, 52), (torch.float32, 23)):
        with use_implementation(digital_net=implementation):
            x = digital_net(ones, n=8, bits=63, dtype=dtype)
            exact = digital_net(torch.tensor([[5, 1]]), n=4, bits=3, dtype=dtype)
        assert x.max().item() == 1 - 2.0**-digits
        assert exact.flatten().tolist() == [0, 5 / 8, 1 / 8, 4 / 8]


@needs_cpu
@pytest.mark.parametrize(
    ("replications", "n", "d"), [(1, 1 << 15, 7), (1, 70001, 1), (9, 3000, 5), (40, 1024, 2)]
)
def test_threads_share_the_work(replications, n, d):
    matrices, shift = random_net(d, 32, 63, seed=n, replications=replications)
    call = (matrices, shift, 777, n, 63, False, torch.float64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = operator(*call)
        torch.set_num_threads(1)
        one = operator(*call)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(several, one)
    with use_implementation(digital_net="blocks"):
        assert torch.equal(operator(*call), one)


@needs_cpu
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    code = (
        "import torch; from tensormill.ops.digital_net import operator as o; "
        "from tensormill.ops.digital_net.cpu import *\n"
        "for s in o.samples:\n"
        "    if s.large: continue\n"
        "    a = o.inputs(s.shape, torch.device('cpu'), torch.Generator().manual_seed(1))\n"
        "    assert torch.equal(digital_net(*a), o.reference(*a)), s.name\n"
        "print(instruction_set())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TENSORMILL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in (isa, "portable")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"matrices": torch.eye(3)}, "expected int64"),
        ({"matrices": torch.ones(4, dtype=torch.int64)}, "expected int64 of shape"),
        ({"matrices": [[1]]}, "given matrices <class 'list'>"),
        ({"matrices": torch.zeros(2, 63, dtype=torch.int64)}, "at most 62"),
        ({"matrices": torch.tensor([[1, 16]])}, "expected 4 bits"),
        ({"matrices": torch.tensor([[1, -1]])}, "from -1 to 1"),
        ({"shift": torch.zeros(3, dtype=torch.int64)}, r"shape \(1,\)"),
        ({"shift": torch.zeros(1)}, "given shift"),
        ({"shift": torch.tensor([16])}, "given shift with numbers"),
        ({"shift": 3}, "given shift"),
        ({"bits": 64}, "1 to 63"),
        ({"bits": 0}, "1 to 63"),
        ({"n": 5}, "at most 4"),
        ({"n": 2, "start": 3}, "at most 4"),
        ({"n": -1}, "0 or more"),
        ({"n": 2.0}, "integers"),
        ({"order": "linear"}, '"gray"'),
        ({"dtype": torch.float16}, "torch.float32"),
    ],
)
def test_refusals(change, match):
    arguments = {"matrices": torch.tensor([[8, 4]]), "n": 4, "bits": 4, **change}
    with pytest.raises(InvalidArgument, match=match):
        digital_net(**arguments)
