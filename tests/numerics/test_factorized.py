"""Tucker, CP and tensor-train formats: identities of the index order, arithmetic, error bounds, tensorly."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.numerics import factorized
from tensormill.numerics.factorized import (
    CPTensor,
    FactorSpectra,
    TTTensor,
    TuckerTensor,
    contract_rows,
    fold,
    hooi,
    hosvd,
    khatri_rao,
    kronecker,
    mode_product,
    rhosvd,
    rhosvd_blocks,
    sthosvd,
    tt_svd,
    unfold,
)

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(5,), (4, 7), (3, 1, 5), (6, 5, 4), (2, 3, 4, 5)]


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 7919 * len(shape)))


def tucker(shape, dtype=torch.float64, seed=0, ranks=None):
    ranks = ranks or [min(n, 2 + k % 2) for k, n in enumerate(shape)]
    factors = [
        randn(n, r, dtype=dtype, seed=seed + k) for k, (n, r) in enumerate(zip(shape, ranks, strict=True))
    ]
    return TuckerTensor(randn(*ranks, dtype=dtype, seed=seed + 50), factors)


def canonical(shape, dtype=torch.float64, seed=0, terms=3):
    factors = [randn(n, terms, dtype=dtype, seed=seed + k) for k, n in enumerate(shape)]
    return CPTensor(randn(terms, dtype=dtype, seed=seed + 60), factors)


def train(shape, dtype=torch.float64, seed=0):
    ranks = [1, *([2, 3, 2, 3][: len(shape) - 1]), 1]
    return TTTensor(
        [randn(ranks[k], n, ranks[k + 1], dtype=dtype, seed=seed + k) for k, n in enumerate(shape)]
    )


FORMATS = {"tucker": tucker, "cp": canonical, "tt": train}


def close(actual, expected, factor=200):
    """Within some hundred roundings of the largest entry."""
    eps = torch.finfo(expected.dtype).eps
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=factor * eps * max(scale, 1e-30))


def relative(x, reference):
    return float(torch.linalg.vector_norm(x - reference) / torch.linalg.vector_norm(reference))


def smooth(*shape, dtype=torch.float64):
    """A tensor with geometrically decaying singular values: 1 / (1 + sum of coordinates)."""
    axes = torch.meshgrid(*[torch.linspace(0, 1, n, dtype=torch.float64) for n in shape], indexing="ij")
    return (1 / (1 + sum((k + 1) * a for k, a in enumerate(axes)))).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_unfold_is_row_major_and_fold_its_inverse(shape):
    x = randn(*shape)
    for mode in range(len(shape)):
        matrix = unfold(x, mode)
        others = [k for k in range(len(shape)) if k != mode]
        for flat in range(matrix.shape[1]):
            index, left = [0] * len(shape), flat
            for k in reversed(others):
                left, index[k] = divmod(left, shape[k])
            for i in range(shape[mode]):
                index[mode] = i
                assert matrix[i, flat] == x[tuple(index)]
        assert torch.equal(fold(matrix, mode, shape), x)
        assert torch.equal(unfold(x, mode - len(shape)), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_unfoldings_follow_kronecker_and_khatri_rao(shape, dtype):
    t, c = tucker(shape, dtype), canonical(shape, dtype)
    for k in range(len(shape)):
        others = [j for j in range(len(shape)) if j != k]
        expected = t.factors[k] @ unfold(t.core, k) @ kronecker([t.factors[j] for j in others]).mT
        close(unfold(t.full(), k), expected)
        expected = (c.factors[k] * c.weights) @ khatri_rao([c.factors[j] for j in others]).mT
        close(unfold(c.full(), k), expected)


@pytest.fixture
def tensorly():
    """tensorly on torch's tensors; afterwards on what it computed with before."""
    module = pytest.importorskip("tensorly")
    with module.backend_context("pytorch"):
        yield module


def test_products_agree_with_tensorly(tensorly):
    from tensorly import tenalg

    matrices = [randn(n, 3, seed=n) for n in (4, 2, 5)]
    close(khatri_rao(matrices), tenalg.khatri_rao(matrices))
    close(kronecker(matrices), tenalg.kronecker(matrices))
    t, c, x = tucker((6, 5, 4)), canonical((6, 5, 4)), randn(6, 5, 4)
    close(t.full(), tensorly.tucker_to_tensor((t.core, t.factors)))
    close(c.full(), tensorly.cp_to_tensor((c.weights, c.factors)))
    close(train((6, 5, 4)).full(), tensorly.tt_to_tensor(list(train((6, 5, 4)).cores)))
    for k in range(3):
        assert torch.equal(unfold(x, k), tensorly.unfold(x, k))
        close(mode_product(x, matrices[0].mT[:, :1] @ randn(1, x.shape[k]), k),
              tenalg.mode_dot(x, matrices[0].mT[:, :1] @ randn(1, x.shape[k]), k))  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_equals_the_dense_one(name, shape, dtype):
    a, b = FORMATS[name](shape, dtype, 1), FORMATS[name](shape, dtype, 2)
    x, y = a.full(), b.full()
    assert x.shape == a.shape == shape and a.dtype == dtype and a.ndim == len(shape)
    close((a + b).full(), x + y)
    close((a - b).full(), x - y)
    close((2.5 * a / 2).full(), 1.25 * x)
    close((-a).full(), -x)
    close(a.inner(b), (x.conj() * y).sum(), 3000)
    close(a.norm(), torch.linalg.vector_norm(x), 3000)
    close(a.conj().full(), x.conj())
    assert a.num_stored * x.element_size() == a.nbytes
    indices = torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(*shape, len(shape))
    close(a.at(indices), x)
    assert a.at(indices[:0]).shape == (0, *shape[1:])


@pytest.mark.parametrize("name", FORMATS)
def test_slices_equal_the_dense_ones(name):
    a = FORMATS[name]((4, 5, 3, 2))
    x = a.full()
    for index in (0, -1, (1, 2), (slice(1, 3), 4), (..., 0), (slice(None), ..., slice(0, 2)), (2, ..., 1),
                  (slice(None), -2, slice(0, 3, 2)), (0, 1, 2)):  # fmt: skip
        part = a[index]
        assert part.shape == x[index].shape
        close(part.full(), x[index])
    close(a[3, 4, 2, 1], x[3, 4, 2, 1])
    close(a[[3, 0], :, [1, 1]].full(), x[[3, 0]][:, :, [1, 1]])
    for wrong in (9, (0,) * 5, (slice(None, None, -1),), ([[0]],)):
        with pytest.raises(InvalidArgument):
            a[wrong]


@pytest.mark.parametrize("name", ["tucker", "tt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_removes_what_addition_doubled(name, dtype):
    a = FORMATS[name]((6, 7, 5), dtype)
    doubled = a + a
    assert doubled.ranks != a.ranks
    tol = 100 * torch.finfo(dtype).eps
    rounded = doubled.round(tol)
    assert rounded.ranks == a.ranks
    close(rounded.full(), 2 * a.full(), 500)
    assert float((a - a).norm()) <= 100 * torch.finfo(dtype).eps * float(a.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decompose", [hosvd, sthosvd, hooi])
@pytest.mark.parametrize("shape", [(9,), (12, 7), (13, 9, 11), (6, 5, 7, 4)])
def test_error_is_within_the_tolerance(decompose, shape, dtype):
    x = smooth(*shape, dtype=dtype)
    ranks = []
    for tol in (1e-1, 1e-2, 1e-4):
        t = decompose(x, tol)
        assert relative(t.full(), x) <= tol
        for factor in t.factors:
            close(factor.mH @ factor, torch.eye(factor.shape[1], dtype=dtype))
        ranks.append(t.ranks)
    assert all(a <= b for low, high in itertools.pairwise(ranks) for a, b in zip(low, high, strict=True))
    assert relative(decompose(x).full(), x) <= 100 * torch.finfo(dtype).eps


def test_hosvd_of_a_matrix_is_the_svd():
    x = randn(8, 5)
    values = torch.linalg.svdvals(x)
    t = hosvd(x, rank=3)
    assert t.ranks == (3, 3)
    assert relative(t.full(), x) == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_ranks_of_an_exact_tucker_tensor_are_found(dtype):
    x = tucker((9, 8, 7), dtype, ranks=(2, 3, 4)).full()
    for decompose in (hosvd, sthosvd, hooi):
        t = decompose(x, 1e-10)
        assert t.ranks == (2, 3, 4)
        close(t.full(), x)
    assert tt_svd(x, 1e-10).ranks == (1, 2, 4, 1)


def test_core_of_hosvd_is_all_orthogonal():
    core = hosvd(randn(5, 6, 4)).core
    for k in range(3):
        matrix = unfold(core, k)
        gram = matrix @ matrix.mT
        assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-12 * float(gram.max())


def test_permuted_modes_permute_the_core():
    x = randn(5, 6, 4)
    t, p = hosvd(x), hosvd(x.permute(2, 0, 1))
    close(p.core.abs(), t.core.permute(2, 0, 1).abs(), 1e4)


@pytest.mark.parametrize("rank", [(3, 2, 4), (5, 5, 5)])
def test_hooi_and_hosvd_agree_with_tensorly(tensorly, rank):
    from tensorly.decomposition import tucker as their_tucker

    x = smooth(10, 9, 8) + 0.05 * randn(10, 9, 8)
    theirs = their_tucker(x, rank=list(rank), init="svd", n_iter_max=500, tol=1e-14)
    ours = hooi(x, rank=rank, sweeps=500)
    assert relative(ours.full(), x) <= relative(tensorly.tucker_to_tensor(theirs), x) * (1 + 1e-6)
    for mine, other in zip(ours.factors, theirs.factors, strict=True):
        # Errors that agree to 1e-16 leave subspaces that agree to its root, over the gap of the singular values.
        torch.testing.assert_close(mine @ mine.mT, other @ other.mT, rtol=0, atol=1e-4)
    for mine, k in zip(hosvd(x, rank=rank).factors, range(3), strict=True):
        left = torch.linalg.svd(tensorly.unfold(x, k), full_matrices=False)[0][:, : rank[k]]
        close(mine.abs(), left.abs(), 1e4)
    their_train = tensorly.decomposition.tensor_train(x, rank=[1, rank[0], rank[1], 1])
    mine = tt_svd(x, rank=[rank[0], rank[1]])
    close(mine.full(), tensorly.tt_to_tensor(list(their_train)), 1e4)


def test_hooi_never_raises_the_error():
    x = randn(9, 8, 7)
    errors = [relative(hooi(x, rank=3, sweeps=s).full(), x) for s in (0, 1, 2, 5, 20)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    start = TuckerTensor(randn(3, 3, 3), [randn(n, 3, seed=n) for n in (9, 8, 7)])
    assert hooi(x, init=start, sweeps=30).ranks == (3, 3, 3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 40),
    st.floats(1e-8, 0.3),
    st.integers(0, 10**6),
)
def test_rhosvd_keeps_its_tolerance_whatever_the_scaling(shape, terms, tol, seed):
    c = canonical(shape, seed=seed, terms=terms)
    x = c.full()
    t = rhosvd(c.weights, c.factors, tol)
    error = torch.linalg.vector_norm(t.full() - x)
    # Terms may cancel: rounding is relative to what was summed.
    floor = 100 * torch.finfo(x.dtype).eps * float(c.normalize().weights.abs().sum())
    assert float(error) <= tol * float(torch.linalg.vector_norm(x)) + floor


def test_rhosvd_does_not_depend_on_where_the_size_of_a_term_is():
    factors = [torch.stack([smooth(n)[: n] * torch.linspace(0, 1, n, dtype=torch.float64) ** p for p in range(30)], 1)
               for n in (12, 11, 10)]  # fmt: skip
    weights = randn(30) * torch.logspace(0, -8, 30, dtype=torch.float64)
    scales = torch.logspace(-40, 40, 30, dtype=torch.float64)
    a = rhosvd(weights, factors, 1e-6)
    b = rhosvd(weights / scales, [factors[0] * scales**2, factors[1] / scales, factors[2]], 1e-6)
    assert a.ranks == b.ranks
    close(a.full(), b.full(), 1e4)
    assert a.ranks == sthosvd(CPTensor(weights, factors).full(), 1e-6).ranks


@pytest.mark.parametrize("dtype", DTYPES)
def test_rhosvd_of_an_exact_cp_tensor(dtype):
    c = canonical((9, 8, 7, 3), dtype, terms=2)
    t = rhosvd(c.weights, c.factors, 1e-4 if c.dtype in (torch.float32, torch.complex64) else 1e-10)
    assert t.ranks == (2, 2, 2, 2)
    close(t.full(), c.full(), 2000)
    close(c.to_tucker().full(), c.full())
    assert rhosvd(c.weights, c.factors, rank=1).ranks == (1, 1, 1, 1)


def test_rhosvd_of_nothing_is_zero():
    for weights, terms in ((torch.zeros(3), 3), (torch.zeros(0), 0)):
        t = rhosvd(weights, [torch.ones(4, terms), torch.ones(5, terms)])
        assert t.ranks == (1, 1) and torch.equal(t.full(), torch.zeros(4, 5))


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6, 1e-10])
def test_tt_svd_keeps_its_tolerance(tol):
    x = smooth(7, 6, 8, 5)
    t = tt_svd(x, tol)
    assert relative(t.full(), x) <= tol
    assert relative(tt_svd(x).round(tol).full(), x) <= tol
    assert tt_svd(x, rank=2).ranks == (1, 2, 2, 2, 1)
    assert tt_svd(x).round(rank=[1, 2, 1]).ranks == (1, 1, 2, 1, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients(name):
    a = FORMATS[name]((3, 4, 2))
    tensors = [t.clone().requires_grad_() for t in a._tensors()]

    def rebuild(*parts):
        return TTTensor(parts) if name == "tt" else type(a)(parts[0], parts[1:])

    indices = torch.tensor([[0, 1, 1], [2, 3, 0]])
    assert torch.autograd.gradcheck(lambda *p: (rebuild(*p).full(), rebuild(*p).at(indices)), tensors)
    assert torch.autograd.gradcheck(
        lambda *p: (rebuild(*p)[1].full(), rebuild(*p).inner(rebuild(*p))), tensors
    )


def test_contract_rows_is_the_sum_over_the_core():
    core, rows = randn(2, 3, 4), [randn(7, r, seed=r) for r in (2, 3, 4)]
    close(contract_rows(core, rows), torch.einsum("abc,ma,mb,mc->m", core, *rows))
    close(contract_rows(core[0, 0], rows[2:]), rows[2] @ core[0, 0])


def test_moving():
    a = tucker((3, 4)).to(dtype=torch.float32)
    assert a.dtype == torch.float32 and a.device.type == "cpu" and "TuckerTensor(shape=(3, 4)" in repr(a)
    b = TuckerTensor(a.core.requires_grad_(), a.factors).detach()
    assert not b.core.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TuckerTensor(randn(2, 2), [randn(3, 2)]), "one factor"),
        (lambda: TuckerTensor(randn(2, 2), [randn(3, 2), randn(3, 2).float()]), "one dtype"),
        (lambda: TuckerTensor(torch.ones(1, dtype=torch.int64), [torch.ones(1, 1, dtype=torch.int64)]), "floating"),
        (lambda: CPTensor(randn(2), [randn(3, 4)]), "expected weights"),
        (lambda: CPTensor(randn(2), []), "expected weights"),
        (lambda: TTTensor([randn(1, 3, 2), randn(3, 3, 1)]), "ranks 1 at both ends"),
        (lambda: tucker((3, 4)) + tucker((3, 5)), "expected a TuckerTensor"),
        (lambda: tucker((3, 4)).inner(train((3, 4))), "expected a TuckerTensor"),
        (lambda: tucker((3, 4)) * randn(3), "expected a number"),
        (lambda: hosvd(randn(3, 3), tol=-1.0), "positive number"),
        (lambda: hosvd(randn(3, 3), rank=0), "positive integer"),
        (lambda: hosvd(randn(3, 3), rank=(1, 2, 3)), "positive integer"),
        (lambda: sthosvd(torch.full((3, 3), math.nan)), "NaN"),
        (lambda: hosvd(torch.zeros(0, 3)), "one or more entries"),
        (lambda: hooi(randn(3, 3), sweeps=-1), "sweeps"),
        (lambda: hooi(randn(3, 3), init=tucker((3, 4))), "init of shape"),
        (lambda: rhosvd(torch.tensor([math.inf]), [torch.ones(3, 1)]), "infinite"),
        (lambda: tt_svd(randn(3, 3, 3), rank=(1, 2, 3)), "or 2 of them"),
        (lambda: unfold(randn(3, 3), 2), "given mode 2"),
        (lambda: fold(randn(3, 3), 0, (3, 4)), "unfolding of a tensor"),
        (lambda: mode_product(randn(3, 3), randn(2, 4), 0), "expected"),
        (lambda: khatri_rao([randn(3, 2), randn(3, 3)]), "equally many columns"),
        (lambda: kronecker([]), "one or more"),
        (lambda: contract_rows(randn(2, 2), [randn(5, 2), randn(4, 2)]), "one .M, rank. per mode"),
        (lambda: tucker((3, 4)).at(torch.tensor([0.0, 1.0])), "int64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_examples_in_docstrings():
    assert doctest.testmod(factorized).failed == 0


def test_rhosvd_does_not_depend_on_blocks():
    c = canonical((9, 8, 7), terms=50)
    factors = [f * torch.linspace(1, 2, 50).double() ** k for k, f in enumerate(c.factors)]
    whole = rhosvd(c.weights, factors, 1e-3)
    for block in (1, 7, 50):
        parts = rhosvd(c.weights, factors, 1e-3, block=block)
        assert parts.ranks == whole.ranks
        close(parts.full(), whole.full(), 1e4)


def test_rhosvd_of_blocks_refuses_what_does_not_fit():
    with pytest.raises(InvalidArgument, match="no blocks"):
        rhosvd_blocks(lambda: [])
    with pytest.raises(InvalidArgument, match="expected equal ones"):
        rhosvd_blocks(lambda: [canonical((3, 4)), canonical((4, 3))])
    with pytest.raises(InvalidArgument, match="block=0"):
        rhosvd(torch.ones(1), [torch.ones(2, 1)], block=0)


def test_maps_are_applied_as_if_to_every_block():
    c = canonical((9, 8, 7), terms=40)
    maps = [randn(4 + k, n, seed=k) for k, n in enumerate((9, 8, 7))]
    parts = [CPTensor(c.weights[s], [f[:, s] for f in c.factors]) for s in (slice(0, 15), slice(15, 40))]
    found = FactorSpectra(parts, maps).compress(lambda: parts, 1e-6)
    exact = CPTensor(c.weights, [m @ f for m, f in zip(maps, c.factors, strict=True)]).full()
    assert found.shape == (4, 5, 6) and relative(found.full(), exact) <= 1e-6
