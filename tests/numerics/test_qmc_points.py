import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.numerics import qmc
from tensormill.numerics.qmc.halton import primes
from tensormill.numerics.qmc.randomization import BITS, random_unit
from tensormill.numerics.qmc.sequence import bit_reverse

NETS = ("lms_ds", "lms", "ds", "nus", None)
HALTONS = ("dp", "lms_ds", "lms", "ds", "nus", None)


def every_sequence(d, **more):
    yield from (qmc.DigitalNet(d, randomize=r, seed=3, **more) for r in NETS)
    yield from (qmc.DigitalNet(d, randomize=r, alpha=2, seed=3, **more) for r in ("lms_ds", "nus", None))
    yield from (qmc.Halton(d, randomize=r, seed=3, **more) for r in HALTONS)
    yield qmc.Lattice(d, seed=3, **more)


def test_sobol_equals_scipy():
    scipy_qmc = pytest.importorskip("scipy.stats.qmc")
    expected = torch.from_numpy(scipy_qmc.Sobol(50, scramble=False).random(4096))
    assert torch.equal(qmc.DigitalNet(50, randomize=None, order="gray").sample(4096), expected)
    natural = qmc.DigitalNet(50, randomize=None).sample(4096)
    index = torch.arange(4096)
    assert torch.equal(natural[index ^ (index >> 1)], expected)


def test_every_direction_number_equals_torch():
    matrices = torch.quasirandom.SobolEngine(2048, scramble=False).sobolstate
    assert torch.equal(qmc.joe_kuo_matrices(2048, 30), matrices)


def test_halton_equals_scipy():
    scipy_qmc = pytest.importorskip("scipy.stats.qmc")
    expected = torch.from_numpy(scipy_qmc.Halton(20, scramble=False).random(3000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = qmc.Halton(20, randomize=None).sample(3000)
    torch.testing.assert_close(ours, expected, rtol=0, atol=4e-16)


def test_points_equal_qmcpy():
    qmcpy = pytest.importorskip("qmcpy")

    def theirs(sequence):
        return torch.from_numpy(np.asarray(sequence(1024, warn=False)).astype(np.float64))

    for alpha in (1, 2, 3):
        ours = qmc.DigitalNet(6, randomize=None, alpha=alpha).sample(1024)
        assert torch.equal(ours, theirs(qmcpy.DigitalNetB2(6, randomize="FALSE", alpha=alpha)))
    lattice = qmcpy.Lattice(9, randomize="FALSE")
    vector = torch.from_numpy(lattice.gen_vec.astype(np.int64).ravel())
    ours = qmc.Lattice(9, vector, log2_max_points=20, shift=False).sample(1024)
    assert torch.equal(ours, theirs(lattice))
    torch.testing.assert_close(
        qmc.Halton(9, randomize=None).sample(1024),
        theirs(qmcpy.Halton(9, randomize="FALSE")),
        rtol=0,
        atol=4e-16,
    )


def test_facts():
    expected = [[0, 0, 0], [4, 4, 4], [6, 2, 2], [2, 6, 6], [3, 3, 5], [7, 7, 1], [5, 1, 7], [1, 5, 3]]
    assert (qmc.DigitalNet(3, randomize=None, order="gray").sample(8) * 8).tolist() == expected
    assert qmc.Halton(3, randomize=None).sample(2)[1].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 5])
    assert qmc.shipped_generating_vector()[:4].tolist() == [1, 765333, 464429, 505289]
    assert primes(10) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29] and len(primes(1000)) == 1000
    assert primes(1000)[-1] == 7919 and primes(0) == []


def stratified(x, shape):
    """Whether every elementary interval of this shape (a power of two per dimension) holds equally many points."""
    cells = torch.zeros(len(x), dtype=torch.int64)
    for j, bits in enumerate(shape):
        cells = (cells << bits) + (x[:, j] * (1 << bits)).long()
    counts = torch.bincount(cells, minlength=1 << sum(shape))
    return bool((counts == len(x) >> sum(shape)).all())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 11),
    left=st.integers(0, 11),
    randomize=st.sampled_from(NETS),
    start=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_first_two_dimensions_are_a_net(m, left, randomize, start, seed):
    """Every aligned block of 2^m Sobol' points is a (0, m, 2)-net, scrambled or not."""
    left = min(left, m)
    block = qmc.DigitalNet(2, randomize=randomize, seed=seed).sample(1 << m, start << m)
    assert stratified(block, (left, m - left))


@pytest.mark.parametrize("randomize", NETS)
def test_one_dimensional_projections_are_permutations(randomize):
    x = qmc.DigitalNet(40, randomize=randomize, seed=0).sample(512)
    for j in range(40):
        assert sorted((x[:, j] * 512).long().tolist()) == list(range(512))


@pytest.mark.parametrize("randomize", HALTONS)
def test_halton_is_balanced_in_every_base(randomize):
    sequence = qmc.Halton(4, randomize=randomize, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for j, base in enumerate((2, 3, 5, 7)):
            x = sequence.sample(base**3)[:, j]
            assert sorted((x * base**3 + 1e-6).long().tolist()) == list(range(base**3))
        x = sequence.sample(36)  # 4 x 9 boxes
    assert len(set(((x[:, 0] * 4 + 1e-6).long() * 9 + (x[:, 1] * 9 + 1e-6).long()).tolist())) == 36


def test_lattice_is_a_group_and_contained_in_the_next():
    vector = [1, 5, 19]
    whole = qmc.Lattice(3, vector, shift=False, log2_max_points=6).sample(64)
    assert torch.equal(
        qmc.Lattice(3, vector, shift=False, log2_max_points=6, order="linear").sample(64)[
            bit_reverse(torch.arange(64), 6)
        ],
        whole,
    )
    sums = torch.frac(whole[:, None] + whole[None]).flatten(0, 1)
    assert {tuple(p) for p in sums.tolist()} == {tuple(p) for p in whole.tolist()}
    half = qmc.Lattice(3, vector, shift=False, log2_max_points=6, order="linear").sample(32)
    assert {tuple(p) for p in half.tolist()} == {tuple(p) for p in whole[:32].tolist()}
    index = torch.arange(4096)
    natural = qmc.Lattice(3, seed=1).sample(4096)
    torch.testing.assert_close(
        qmc.Lattice(3, seed=1, order="gray").sample(4096), natural[index ^ (index >> 1)]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (7, 3), (1000, 50), (1023, 2049), (3000, 1), (5, 0)])
def test_a_point_depends_on_its_index_alone(start, n, dtype):
    for d in (1, 3, 70):
        for sequence in (
            every_sequence(d, dtype=dtype) if d == 3 else (qmc.DigitalNet(d, seed=1, dtype=dtype),)
        ):
            whole = sequence.sample(4096)
            assert torch.equal(sequence.sample(n, start), whole[start : start + n])
            assert whole.dtype == dtype and whole.min() >= 0 and whole.max() < 1


def test_random_reset_and_fast_forward():
    for sequence in every_sequence(2):
        whole = sequence.sample(64)
        assert torch.equal(torch.cat([sequence.random(16), sequence.random(48)]), whole)
        assert torch.equal(sequence.reset().fast_forward(5).random(3), whole[5:8])


def test_seeds_replications_and_prefixes():
    for make in (qmc.DigitalNet, qmc.Halton, qmc.Lattice):
        several = make(4, seed=9, replications=3).sample(128)
        assert several.shape == (3, 128, 4)
        assert not torch.equal(several[0], several[1])
        assert torch.equal(make(2, seed=9, replications=2).sample(128), several[:2, :, :2])
        assert torch.equal(make(4, seed=9).sample(128), several[0])
        assert not torch.equal(make(4, seed=10).sample(128), several[0])
        torch.manual_seed(1)
        first = make(2).sample(8)
        torch.manual_seed(1)
        assert torch.equal(make(2).sample(8), first)
    nus = qmc.DigitalNet(3, randomize="nus", seed=2, replications=2)
    assert not torch.equal(*nus.sample(64))


@pytest.mark.parametrize(
    "sequence",
    [s for s in every_sequence(3, replications=500) if getattr(s, "randomize", "shift") not in (None, "lms")],
    ids=lambda s: f"{type(s).__name__}-{getattr(s, 'randomize', 'shift')}-{getattr(s, 'alpha', 1)}",
)
def test_a_randomised_point_is_uniform(sequence):
    stats = pytest.importorskip("scipy.stats")
    x = sequence.sample(8)  # (500, 8, 3): replications of a point are independent
    for i, j in ((0, 0), (3, 1), (7, 2)):
        assert stats.kstest(x[:, i, j].numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(x[:, 5].numpy().T) - np.eye(3)).max() < 5 / math.sqrt(500)


def test_nested_scrambling_is_nested_and_independent():
    """Points that share k digits keep sharing exactly k; flips of different nodes are independent fair coins."""
    plain = qmc.DigitalNet(1, randomize=None).integers(256)[None] << (BITS - 32)
    scrambled = torch.cat([qmc.nested_uniform_scramble(plain, BITS, seed) for seed in range(400)])
    for given_points, result in ((plain, scrambled[:1]), (plain, scrambled[7:8])):
        before = (given_points[0] ^ given_points[0].T).double().log2().floor()
        after = (result[0] ^ result[0].T).double().log2().floor()
        assert torch.equal(before, after)
    bits = ((scrambled[..., 0] ^ plain[..., 0]) >> (BITS - 8)).unsqueeze(-1) >> torch.arange(7, -1, -1) & 1
    coins = [
        bits[:, i, level].double() for i, level in ((0, 0), (0, 1), (1, 1), (0, 2), (2, 2), (0, 5), (255, 7))
    ]
    correlation = torch.corrcoef(torch.stack(coins))
    means = torch.stack(coins).mean(1)
    assert (means - 0.5).abs().max() < 5 * 0.5 / 20 and (correlation - torch.eye(7)).abs().max() < 5 / 20
    low = (scrambled[:, 3, 0] & 1).double().mean()  # the last digit, far below the levels that are nested
    assert abs(low - 0.5) < 0.125


def test_linear_scrambling_is_a_product_with_triangular_matrices():
    matrices = qmc.joe_kuo_matrices(3, 8)
    scrambled = qmc.linear_matrix_scramble(matrices, 8, 12, 5, 2)

    def as_bits(columns, bits):
        return (columns.unsqueeze(-2) >> torch.arange(bits - 1, -1, -1)[:, None]) & 1

    before, after = as_bits(matrices, 8).double(), as_bits(scrambled, 12).double()
    for r in range(2):
        for j in range(3):
            # columns of the Sobol' matrices form a unit upper triangle, so the scrambling can be read off
            left = torch.remainder(after[r, j] @ torch.linalg.inv(before[j]).round(), 2)
            assert torch.equal(left.triu(1), torch.zeros_like(left))
            assert torch.equal(left.diagonal(), torch.ones(8, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(alpha=st.integers(1, 4), d=st.integers(1, 3), bits=st.integers(1, 15), data=st.data())
def test_interlacing_places_every_digit(alpha, d, bits, data):
    words = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=alpha * d, max_size=alpha * d))
    result = qmc.interlace(torch.tensor(words), alpha, bits, alpha * bits)
    for j in range(d):
        strings = [f"{w:0{bits}b}" for w in words[alpha * j : alpha * (j + 1)]]
        expected = "".join("".join(digits) for digits in zip(*strings, strict=True))
        assert f"{int(result[j]):0{alpha * bits}b}" == expected


def test_higher_order_converges_faster():
    """f = product of x e^x: two derivatives make n^-2, checked against the order-1 net at the same n."""
    errors = {}
    for alpha in (1, 2):
        x = qmc.DigitalNet(2, alpha=alpha, replications=16, seed=1).sample(1 << 14)
        errors[alpha] = ((x * x.exp()).prod(-1).mean(1) - 1).square().mean().sqrt().item()
    assert errors[2] < errors[1] / 8


def test_component_by_component_is_the_best_of_all():
    for log2, first in ((6, 6), (8, 5)):
        found = qmc.component_by_component(4, log2, first=first)
        prefix = [1]
        for j in range(1, 4):
            candidates = [z for z in range(1, 1 << (log2 - 1), 2) if z not in prefix]
            levels = range(first, log2 + 1)
            table = np.array([[qmc.lattice_error([*prefix, z], m) for m in levels] for z in candidates])
            criterion = (table / table.min(0)).max(1)
            ours = min(int(found[j]), (1 << log2) - int(found[j]))
            assert criterion[candidates.index(ours)] == pytest.approx(criterion.min(), rel=1e-6)
            prefix.append(ours)


def test_shipped_vector_beats_random_ones_and_korobov():
    vector = qmc.shipped_generating_vector()
    assert len(vector) == 1024 and bool((vector % 2 == 1).all())
    for log2 in (10, 13):
        ours = qmc.lattice_error(vector[:10], log2)
        random = [qmc.lattice_error(qmc.Lattice(10, "random", seed=s).gen_vector, log2) for s in range(10)]
        assert ours < min(random) and ours < qmc.lattice_error(qmc.korobov(10, log2, candidates=20), log2)
    assert qmc.korobov(2, 6).tolist()[0] == 1


def test_hashes_look_uniform():
    stats = pytest.importorskip("scipy.stats")
    x = random_unit(3, 1, 200, 50)
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(x.numpy().T) - np.eye(50)).max() < 6 / math.sqrt(200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qmc.DigitalNet(0), "1 or more"),
        (lambda: qmc.DigitalNet(3000), "at most 2048"),
        (lambda: qmc.DigitalNet(1500, alpha=2), "given 3000 dimensions, expected at most 2048"),
        (lambda: qmc.DigitalNet(2, randomize="owen"), '"lms_ds"'),
        (lambda: qmc.DigitalNet(2, order="linear"), '"natural" or "gray"'),
        (lambda: qmc.DigitalNet(2, alpha=0), "from 1 to 8"),
        (lambda: qmc.DigitalNet(2, "niederreiter"), '"joe_kuo"'),
        (lambda: qmc.DigitalNet(2, torch.eye(2)), "int64"),
        (lambda: qmc.DigitalNet(1, torch.tensor([[16, 8]]), bits=4), "more than 4 bits"),
        (lambda: qmc.DigitalNet(1, torch.tensor([[16, 8]]), bits=64), "at most 63 bits"),
        (lambda: qmc.DigitalNet(1, torch.tensor([[2, 1]]), bits=2).sample(8), "at most 4"),
        (lambda: qmc.DigitalNet(2, randomize="nus").generating_matrices(), "not linear|expected a linear"),
        (lambda: qmc.DigitalNet(2, dtype=torch.float16), "float64 or torch.float32"),
        (lambda: qmc.DigitalNet(2, seed=-1), "0 to 2"),
        (lambda: qmc.DigitalNet(2, replications=0), "None or 1 or more"),
        (lambda: qmc.DigitalNet(2).sample(-1), "0 or more"),
        (lambda: qmc.DigitalNet(2).points(12), "power of two"),
        (lambda: qmc.DigitalNet(2, replications=2).points(4), "replications=None"),
        (lambda: qmc.Lattice(2000), "at most 1024"),
        (lambda: qmc.Lattice(2, [1, 3]), "log2_max_points with it"),
        (lambda: qmc.Lattice(2, "fibonacci"), '"cbc"'),
        (lambda: qmc.Lattice(2, [1.0, 3.0], log2_max_points=3), "integers"),
        (lambda: qmc.Lattice(2, order="hilbert"), '"linear"'),
        (lambda: qmc.Lattice(2, order="linear").sample(12), "power of two"),
        (lambda: qmc.Lattice(2, log2_max_points=21), "at most 20"),
        (lambda: qmc.Lattice(2).sample(1, 2**20), "expected at most 1048576"),
        (lambda: qmc.Halton(2, randomize="owen"), '"dp"'),
        (lambda: qmc.component_by_component(3, 30), "4 to 24"),
        (lambda: qmc.component_by_component(5, 4), "1 to 4"),
        (lambda: qmc.component_by_component(2, 5, weights=[1.0, 0.0]), "positive"),
        (lambda: qmc.korobov(2, 1), "2 to 24"),
        (lambda: qmc.joe_kuo_matrices(2, 63), "1 to 62"),
    ],
)
@pytest.mark.filterwarnings("ignore:12 points")
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_other_numbers_than_powers_of_two_are_warned_about():
    with pytest.warns(UserWarning, match="take 128"):
        qmc.DigitalNet(2).sample(100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    for ours, theirs in zip(every_sequence(3), every_sequence(3, device="cuda"), strict=True):
        for n, start in ((4096, 0), (100, 1000)):
            expected = ours.sample(n, start)
            if isinstance(ours, qmc.DigitalNet):
                assert torch.equal(theirs.sample(n, start).cpu(), expected)
            torch.testing.assert_close(theirs.sample(n, start).cpu(), expected, rtol=0, atol=4e-16)
