"""The catalogue: 47 papers, each a small file of facts, found by listing the package."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tensormill.errors import InvalidArgument
from tensormill.papers import catalogue
from tensormill.papers.catalogue import (
    ROOMS,
    Figure,
    Measurement,
    Paper,
    Row,
    Run,
    all_papers,
    find_paper,
    slugs,
)
from tensormill.papers.records import source_hashes

FOLDER = Path(catalogue.__file__).parent
EXPECTED = [
    "a_priori_compression",
    "awq",
    "bipolar_int",
    "bit_weight_tpe",
    "block_floating_point",
    "chebyshev_tucker",
    "comet",
    "concur",
    "core2",
    "core_attention_disaggregation",
    "cuda_forge",
    "edkm",
    "equivariant_polynomials",
    "facet",
    "fast_sparse_convnets",
    "flash_llm",
    "flexq",
    "fourcastnet3",
    "funbat",
    "gated_linear_attention",
    "gaunt_tensor_product",
    "hopper_microbenchmarks",
    "hyper_zzw",
    "inception_next",
    "infinite_width_features",
    "kronecker_attention",
    "lie_group_decompositions",
    "lut_tensor_core",
    "matryoshka_kv",
    "megatron",
    "mg_tfno",
    "mlir_cost_model",
    "multi_kernel_bench",
    "next_vit",
    "nn_jit_web",
    "ntk",
    "price_of_freedom",
    "progressive_volume_distillation",
    "qmc",
    "scaling_up_kernels",
    "simcore",
    "smash",
    "snnk",
    "tensor_bleu",
    "tpi_llm",
    "tpla",
    "unireplknet",
]


def toy(**changes) -> Paper:
    facts = {
        "slug": "toy",
        "title": "A toy",
        "authors": "Doe",
        "arxiv": "2401.00001",
        "room": "ops",
        "figures": (Figure("speed", "It is fast", 2.0, "x", "one core"),),
    }
    return Paper(**{**facts, **changes})


def measured(run: Run) -> Measurement:
    return Measurement([Row("x", 1.0, "x")], holds=True)


def test_the_47_papers():
    assert len(EXPECTED) == 47
    assert slugs() == EXPECTED
    papers = all_papers()
    assert [paper.slug for paper in papers] == EXPECTED
    assert len({paper.arxiv for paper in papers}) == 47
    assert len({paper.title for paper in papers}) == 47


@pytest.mark.parametrize("slug", EXPECTED)
def test_facts_are_complete(slug):
    paper = find_paper(slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.year == 2000 + int(paper.arxiv[:2])
    assert 2018 <= paper.year <= 2025
    assert paper.room in ROOMS
    assert 1 <= len(paper.figures) <= 8
    for figure in paper.figures:
        assert figure.unit and figure.setup and figure.statement
        assert figure.paper_value is None or isinstance(figure.paper_value, (int, float, str))
        # A value that the paper doesn't state was not verified either.
        assert figure.paper_value is not None or not figure.verified
    for claim in paper.claims.values():
        assert claim.paper == slug
        assert claim.function.__doc__, f"{slug} {claim.id} doesn't say what it measures"
        assert source_hashes(claim), f"{slug} {claim.id} measures nothing"


FILES = [
    path
    for slug in EXPECTED
    for path in (
        sorted((FOLDER / slug).glob("*.py")) if (FOLDER / slug).is_dir() else [FOLDER / f"{slug}.py"]
    )
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_nothing_measured_is_typed(path):
    """No paper's file names a status, a constant verdict, or a measured value that is a literal."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        for keyword in node.keywords:
            assert keyword.arg != "status"
            assert keyword.arg != "holds" or not isinstance(keyword.value, ast.Constant)
            assert called != "Row" or keyword.arg != "value" or not isinstance(keyword.value, ast.Constant)
        if called == "Row" and len(node.args) > 1:
            assert not isinstance(node.args[1], ast.Constant)


def test_a_paper_has_no_place_for_a_status():
    assert not {"status", "holds", "stale", "device"} & {field.name for field in fields(Paper)}


def test_listing_the_papers_stays_light():
    """No paper's file imports torch, triton or transformers when it is imported."""
    code = (
        "import sys, tensormill\nbefore = set(sys.modules)\n"
        "from tensormill.papers.catalogue import all_papers\nall_papers()\n"
        "print(sorted({'torch', 'triton', 'transformers', 'numpy'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_slug_names_the_closest():
    with pytest.raises(InvalidArgument, match="did you mean awq"):
        find_paper("AWK")
    with pytest.raises(InvalidArgument, match="tensor_bleu"):
        find_paper("tensor-bleu")
    with pytest.raises(InvalidArgument, match="tensormill papers"):
        find_paper("zzzzzzzz")
    with pytest.raises(InvalidArgument):
        find_paper("records")


def test_discovery_needs_no_list(tmp_path):
    for name in ("beta", "alpha", "_shared", "records"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "results").mkdir()
    assert catalogue._modules(tmp_path) == ["alpha", "beta"]


@pytest.mark.parametrize(
    "changes",
    [
        {"slug": "not-a-module"},
        {"title": " "},
        {"authors": ""},
        {"arxiv": "2413.00001"},
        {"arxiv": "cs/0101001"},
        {"room": "kitchen"},
        {"figures": (Figure("a", "x", 1, "x", "y"), Figure("a", "x", 1, "x", "y"))},
    ],
)
def test_a_wrong_paper_is_refused(changes):
    with pytest.raises(InvalidArgument):
        toy(**changes)


@pytest.mark.parametrize("empty", ["statement", "unit", "setup"])
def test_a_figure_needs_statement_unit_and_setup(empty):
    facts = {"id": "a", "statement": "s", "paper_value": 1.0, "unit": "x", "setup": "here"}
    with pytest.raises(InvalidArgument, match=empty):
        Figure(**{**facts, empty: " "})


def test_a_claim_takes_its_facts_from_a_figure():
    paper = toy()
    assert paper.claim("C1", figure="speed", criterion="at least 2")(measured) is measured
    claim = paper.claims["C1"]
    assert (claim.statement, claim.paper_value, claim.unit) == ("It is fast", 2.0, "x")
    assert claim.scales == ("quick", "full")
    paper.claim("C2", figure="speed", statement="Faster still", paper_value=3, criterion="c")(measured)
    assert (paper.claims["C2"].statement, paper.claims["C2"].paper_value) == ("Faster still", 3)


def test_needs_by_scale():
    paper = toy()
    paper.claim("A", figure="speed", criterion="c", needs=("cpu",))(measured)
    paper.claim("B", figure="speed", criterion="c", needs={"full": ("cuda", "data:wikitext2")})(measured)
    assert paper.claims["A"].needed("quick") == paper.claims["A"].needed("full") == ("cpu",)
    assert paper.claims["B"].needed("quick") == ()
    assert paper.claims["B"].needed("full") == ("cuda", "data:wikitext2")


@pytest.mark.parametrize(
    "wrong",
    [
        {"figure": "none such"},
        {"figure": None},
        {"criterion": " "},
        {"scales": ("huge",)},
        {"scales": ()},
        {"scales": ("quick",), "needs": {"full": ("cuda",)}},
        {"needs": ("a lot of time",)},
        {"needs": "cuda"},
        {"measures": "tensormill.measure"},
        {"peers": "torch"},
        {"id": "../escape"},
    ],
)
def test_a_wrong_claim_is_refused(wrong):
    arguments = {"id": "C1", "figure": "speed", "criterion": "c", **wrong}
    with pytest.raises(InvalidArgument, match="toy"):
        toy().claim(arguments.pop("id"), **arguments)(measured)


def test_a_claim_id_is_used_once():
    paper = toy()
    paper.claim("C1", figure="speed", criterion="c")(measured)
    with pytest.raises(InvalidArgument, match="twice"):
        paper.claim("C1", figure="speed", criterion="c")(measured)


def test_progress_goes_to_whoever_listens():
    heard = []
    Run(report=lambda message, fraction: heard.append((message, fraction))).progress("half", 0.5)
    Run().progress("nobody listens")
    assert heard == [("half", 0.5)]
