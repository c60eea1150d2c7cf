"""The claims' own arithmetic at tiny sizes, and that their criteria can fail."""

from __future__ import annotations

import pytest
import torch

from tensormill.numerics import chebyshev
from tensormill.papers import chebyshev_tucker as claims
from tensormill.papers.catalogue import Run


@pytest.fixture
def few(monkeypatch):
    """Twelve charges in place of hundreds."""
    cloud = claims._cloud
    monkeypatch.setattr(claims, "_cloud", lambda n, seed, device="cpu": cloud(12, seed, device))


def test_canonical_vectors_are_resolved_by_enough_nodes_only(monkeypatch):
    assert claims.canonical_vectors(Run()).holds
    monkeypatch.setattr(claims, "_M", 9)
    assert not claims.canonical_vectors(Run()).holds


def test_accuracy_needs_enough_nodes(few, monkeypatch):
    monkeypatch.setattr(claims, "_M", 33)
    measurement = claims.five_hundred_charges(Run())
    errors = [row.value for row in measurement.rows if "largest error" in row.what]
    assert not measurement.holds and max(errors) > 1e-7


def test_error_falls_geometrically(few):
    measurement = claims.degree_convergence(Run())
    assert measurement.holds and len(measurement.curves) == 3
    for curve in measurement.curves:
        curve.to_json()


def test_baselines_are_the_same_function():
    charges, positions = claims._cloud(6, 0)
    kernel = claims._kernel(2.0, 1e-10)
    coefficients = claims._coefficients(charges, positions, kernel, 33)
    axis = torch.linspace(-1, 1, 7, dtype=torch.float64)
    exact = claims._on_grid(charges, positions, kernel, axis)
    torch.testing.assert_close(claims._values(coefficients, axis), exact, rtol=0, atol=1e-9)
    n = claims._resolved(coefficients, 1e-6)
    rest = coefficients.clone()
    rest[:n, :n, :n] = 0
    assert n < 33 and float(rest.norm()) <= 1e-6 * float(coefficients.norm())
    pytest.importorskip("teneva")
    x = claims._points(50, 0)
    values = torch.einsum("abc,ma,mb,mc->m", coefficients, *[chebyshev.basis(x[:, k], 33) for k in range(3)])
    found = claims._teneva(coefficients, x, values, [1e-3, 1e-8], [n, 33])
    assert found[0][1] < 1e-2 and found[1][1] < 1e-6 and found[0][0] < found[1][0]
