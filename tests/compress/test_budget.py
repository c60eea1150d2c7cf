import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormill.compress.budget import Budget, parse_budget
from tensormill.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4.25bpw", Budget(bits_per_weight=4.25)),
        (" 3 BPW ", Budget(bits_per_weight=3)),
        ("9MB", Budget(bytes=9e6)),
        ("4.2 GB", Budget(bytes=4.2e9)),
        ("512KiB", Budget(bytes=512 * 1024)),
        ("1.5gib", Budget(bytes=1.5 * 2**30)),
        ("ppl+2%", Budget(perplexity=0.02)),
        ("PPL + .5 %", Budget(perplexity=0.005)),
        ("ppl+0.00001%", Budget(perplexity=0.00001 / 100)),
        ("30tok/s", Budget(tokens_per_second=30)),
        ("3.5bpw,30tok/s", Budget(bits_per_weight=3.5, tokens_per_second=30)),
        ("25 tokens/s, ppl+1%", Budget(perplexity=0.01, tokens_per_second=25)),
    ],
)
def test_what_users_write(text, budget):
    assert parse_budget(text) == budget
    assert parse_budget(str(budget)) == budget


@given(
    kind=st.sampled_from(["bits_per_weight", "bytes", "perplexity"]),
    value=st.integers(1, 10**6),
    speed=st.none() | st.integers(1, 10**4),
)
def test_every_budget_is_read_as_written(kind, value, speed):
    budget = Budget(**{kind: value / 1000 if kind != "bytes" else value * 1000}, tokens_per_second=speed)
    again = parse_budget(str(budget))
    for name in ("bits_per_weight", "bytes", "perplexity", "tokens_per_second"):
        wanted = getattr(budget, name)
        assert getattr(again, name) == (None if wanted is None else pytest.approx(wanted, rel=1e-9))
    assert budget.slug and not set(budget.slug) & set("/,+% ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4.25", "given '4.25' as a budget, expected 4.25bpw"),
        ("", "given ''"),
        ("small", "given 'small'"),
        ("2%", "given '2%'.*ppl\\+2%"),
        ("-3bpw", "given '-3bpw'"),
        ("9 MBit", "given '9 MBit'"),
        ("1e9bpw", "given '1e9bpw'"),
        ("0bpw", "given bits_per_weight=0.0.*above 0"),
        ("ppl+0%", "given perplexity=0.0"),
        ("4bpw,", "given ''"),
        ("4bpw,5bpw", "two limits of one kind"),
        ("4bpw,9MB", "bits_per_weight and bytes, expected one of them"),
        ("9MB,ppl+2%", "bytes and perplexity, expected one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(text, message):
    with pytest.raises(InvalidArgument, match=message):
        parse_budget(text)


def test_no_limit_is_no_budget():
    with pytest.raises(InvalidArgument, match="given no budget"):
        Budget()
    with pytest.raises(InvalidArgument, match="bytes=nan"):
        Budget(bytes=float("nan"))
