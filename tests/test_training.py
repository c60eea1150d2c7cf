"""The training loop: resume, schedule, optimizers, recovery, and the source of token windows."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError
from tensormill.training import (
    Muon,
    TokenWindows,
    TrainingConfig,
    load_checkpoint,
    muon_and_adamw,
    save_checkpoint,
    schedule_factor,
    train,
)

VOCABULARY = 17


class Tiny(nn.Module):
    """Embedding, a matrix, dropout (so that random numbers matter), a head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.hidden = nn.Linear(12, 20)
        self.drop = nn.Dropout(dropout)
        self.lm_head = nn.Linear(20, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.drop(torch.tanh(self.hidden(self.embed(tokens)))))


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make(dropout=0.1):
    torch.manual_seed(3)
    model = Tiny(dropout)
    # each token follows from the one before it: something to learn
    tokens = torch.cumsum(torch.full((2000,), 5), 0) % VOCABULARY
    batches = TokenWindows(tokens, window=16, batch_tokens=64, seed=1, curriculum=[(0, 8), (0.5, 16)])
    return model, batches, muon_and_adamw(model, muon_lr=0.02, adamw_lr=0.02)


def losses(result):
    return [entry["loss"] for entry in result.curve if "loss" in entry]


def quiet(**settings):
    return TrainingConfig(progress="none", log_every=1, **settings)


def test_it_learns_and_says_so():
    model, batches, optimizers = make()
    seen = []
    result = train(
        model,
        loss_fn,
        batches,
        optimizers,
        quiet(max_steps=60),
        validate=lambda m: seen.append(m.training) or 1.5,
    )
    assert result.steps == 60
    assert result.stopped == "steps"
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert result.loss == losses(result)[-1]
    assert seen == [False]
    assert model.training
    assert result.curve[-1]["validation"] == 1.5
    assert [entry["step"] for entry in result.curve if "loss" in entry] == list(range(1, 61))


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_resume_continues_as_if_nothing_had_happened(tmp_path, cut):
    model, batches, optimizers = make()
    whole = train(model, loss_fn, batches, optimizers, quiet(max_steps=50))
    config = quiet(max_steps=50, checkpoint=tmp_path / "state.pt", curve=tmp_path / "curve.jsonl")

    interrupted, batches, optimizers = make()
    steps = iter(range(1000))
    first = train(interrupted, loss_fn, batches, optimizers, config, should_stop=lambda: next(steps) >= cut)
    assert first.stopped == "asked"
    assert first.steps == cut

    resumed, batches, optimizers = make()
    torch.manual_seed(999)  # the checkpoint's random state must win
    second = train(resumed, loss_fn, batches, optimizers, config)
    assert losses(second) == losses(whole)
    for one, other in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    written = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in written if "loss" in entry] == losses(whole)

    again = train(resumed, loss_fn, batches, optimizers, config)
    assert again.steps == 50
    assert again.loss == whole.loss


def test_resume_without_its_random_state_would_show(tmp_path):
    """The planted error: dropping the position in the data changes the losses."""
    model, batches, optimizers = make()
    whole = train(model, loss_fn, batches, optimizers, quiet(max_steps=20))
    config = quiet(max_steps=20, checkpoint=tmp_path / "state.pt")
    model, batches, optimizers = make()
    steps = iter(range(1000))
    train(model, loss_fn, batches, optimizers, config, should_stop=lambda: next(steps) >= 10)
    state = load_checkpoint(config.checkpoint)
    state["batches"]["position"] = 0
    save_checkpoint(config.checkpoint, state)
    model, batches, optimizers = make()
    assert losses(train(model, loss_fn, batches, optimizers, config)) != losses(whole)


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="existing file"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="delete it"):
        load_checkpoint(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="that a training wrote"):
        load_checkpoint(path)

    class Sneaky:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"step": 0, "model": Sneaky()}, path)
    with pytest.raises(CheckpointError, match="weights_only"):
        load_checkpoint(path)

    path.unlink()
    model, batches, optimizers = make()
    train(model, loss_fn, batches, optimizers, quiet(max_steps=1, checkpoint=path))
    other = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    with pytest.raises(CheckpointError, match="another training"):
        train(other, loss_fn, batches, muon_and_adamw(other), quiet(max_steps=1, checkpoint=path))


def test_clock_drives_the_schedule():
    model, batches, optimizers = make()
    result = train(model, loss_fn, batches, optimizers, quiet(max_seconds=0.4, final_lr=0.1))
    assert result.stopped == "seconds"
    assert 0.35 < result.seconds < 30
    rates = [entry["lr"] for entry in result.curve if "loss" in entry]
    assert max(rates) > rates[-1]


def test_checkpoints_and_validations_come_by_the_clock(tmp_path):
    model, batches, optimizers = make()
    calls = []
    train(
        model,
        loss_fn,
        batches,
        optimizers,
        quiet(max_steps=5, checkpoint_every=0.0, validate_every=0.0, checkpoint=tmp_path / "s.pt"),
        validate=lambda _: 0.0,
        on_checkpoint=lambda result: calls.append(result.steps),
    )
    assert calls == [1, 2, 3, 4, 5, 5]  # the last one is the final state


def test_nan_goes_back_and_halves_the_rate():
    model, batches, optimizers = make(dropout=0.0)
    count = iter(range(1000))

    def sometimes_nan(module, batch):
        value = loss_fn(module, batch)
        return value * math.nan if next(count) == 5 else value

    result = train(
        model, sometimes_nan, batches, optimizers, quiet(max_steps=20, schedule="constant", warmup=0)
    )
    assert result.restarts == 1
    assert result.steps == 20
    assert all(weight.isfinite().all() for weight in model.parameters())
    rates = [entry["lr"] for entry in result.curve if "loss" in entry]
    assert rates[0] == 1.0
    assert rates[-1] == 0.5


def test_nan_for_ever_is_an_error():
    model, batches, optimizers = make()
    with pytest.raises(ModelError, match="lower the learning rate"):
        train(model, lambda m, b: loss_fn(m, b) * math.nan, batches, optimizers, quiet(max_steps=9))


def test_bf16_autocast_trains():
    model, batches, optimizers = make()
    result = train(model, loss_fn, batches, optimizers, quiet(max_steps=40, precision="bf16"))
    assert losses(result)[-1] < losses(result)[0]
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_progress_lines(capsys):
    model, batches, optimizers = make()
    train(
        model,
        loss_fn,
        batches,
        optimizers,
        TrainingConfig(max_steps=2, log_every=1, line_every=0, progress="lines"),
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("training: ")
    assert "tokens/s" in captured.err


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind):
    config = TrainingConfig(max_steps=1, schedule=kind, warmup=0.1, final_lr=0.25)
    assert schedule_factor(0.0, config) == 0
    assert schedule_factor(0.05, config) == pytest.approx(0.5)
    assert schedule_factor(0.1, config) == pytest.approx(1)
    assert schedule_factor(1.0, config) == pytest.approx(1 if kind == "constant" else 0.25)
    assert schedule_factor(0.55, config) == pytest.approx(1 if kind == "constant" else 0.625)
    values = [schedule_factor(x / 100, config) for x in range(10, 101)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_seconds": -1.0}, "max_seconds"),
        ({"max_steps": 1, "schedule": "step"}, "schedule"),
        ({"max_steps": 1, "precision": "fp8"}, "precision"),
        ({"max_steps": 1, "progress": "loud"}, "progress"),
        ({"max_steps": 1, "warmup": 1.0}, "warmup"),
        ({"max_steps": 1, "log_every": 0}, "log_every"),
    ],
)
def test_contradictory_settings(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainingConfig(**settings)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_computes_what_torch_computes(nesterov):
    shapes = [(24, 24), (24, 24), (13, 40), (40, 13), (40, 13), (1, 7)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    ours = [nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(4):
        torch.manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        # both iterate in bfloat16, batched and single products round differently: relative to the change
        assert (one - other).norm() < 2e-2 * (other - first).norm()
    wrong = Muon([nn.Parameter(start[3].clone())], **settings)  # planted: the rule for tall matrices left out
    wrong.param_groups[0]["params"][0].grad = ours[3].grad
    wrong.param_groups[0]["lr"] /= math.sqrt(40 / 13)
    wrong.step()
    right = Muon([nn.Parameter(start[3].clone())], **settings)
    right.param_groups[0]["params"][0].grad = ours[3].grad
    right.step()
    one, other = wrong.param_groups[0]["params"][0], right.param_groups[0]["params"][0]
    assert (one - other).norm() > 2e-2 * (other - start[3]).norm()


def test_muon_refuses_vectors_and_bad_settings():
    with pytest.raises(InvalidArgument, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(InvalidArgument, match="momentum"):
        Muon([nn.Parameter(torch.zeros(3, 3))], momentum=1.0)


def test_parameters_are_divided():
    model = Tiny()
    muon, adamw = muon_and_adamw(model)
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(20, 12)]
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters())) - 1


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(70, 400),
    window=st.sampled_from([2, 4, 8, 12]),
    rows=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_an_epoch_is_disjoint_windows_in_another_order(length, window, rows, seed):
    tokens = torch.arange(length)
    source = TokenWindows(tokens, window=window, batch_tokens=rows * window, seed=seed)
    seen = []
    for _ in range(source.windows_per_epoch // rows):
        inputs, targets = source.next_batch()
        assert inputs.shape == (rows, window)
        assert torch.equal(targets, inputs + 1)
        assert inputs.is_contiguous()
        seen.append(inputs.flatten())
    assert source.epoch == 0
    visited = torch.cat(seen)
    assert len(visited.unique()) == len(visited)
    source.next_batch()
    assert source.epoch == 1


def test_windows_resume_and_shrink():
    tokens = torch.arange(500)
    source = TokenWindows(tokens, window=8, batch_tokens=32, seed=4, curriculum=[(0.0, 4), (0.5, 8)])
    assert source.next_batch(0.1)[0].shape == (8, 4)
    assert source.next_batch(0.7)[0].shape == (4, 8)
    for _ in range(20):
        source.next_batch(1.0)
    other = TokenWindows(tokens, window=8, batch_tokens=32, seed=4)
    other.load_state_dict(source.state_dict())
    assert torch.equal(source.next_batch(1.0)[0], other.next_batch()[0])
    with pytest.raises(CheckpointError, match="seed"):
        TokenWindows(tokens, window=8, batch_tokens=32, seed=5).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.long), {"window": 2, "batch_tokens": 2}, "1-D"),
        (torch.zeros(100), {"window": 2, "batch_tokens": 2}, "integers"),
        (torch.zeros(100, dtype=torch.long), {"window": 3, "batch_tokens": 8}, "multiple"),
        (torch.zeros(20, dtype=torch.long), {"window": 4, "batch_tokens": 32}, "smaller batch"),
        (
            torch.zeros(100, dtype=torch.long),
            {"window": 4, "batch_tokens": 8, "curriculum": [(0, 3)]},
            "divisor",
        ),
    ],
)
def test_windows_refuse(tokens, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        TokenWindows(tokens, **settings)


@pytest.mark.parametrize("largest", [100, 40_000])
def test_windows_keep_every_id(largest):
    tokens = torch.tensor([0, largest, 1, largest, 5, 6, 7, largest, 9, 10])
    source = TokenWindows(tokens, window=2, batch_tokens=2)
    ids = torch.cat([torch.cat(source.next_batch()).flatten() for _ in range(source.windows_per_epoch)])
    assert set(ids.tolist()) <= set(tokens.tolist())
    assert largest in ids


@pytest.mark.slow
def test_compiled_training_agrees():
    results = []
    for compiled in (False, True):
        model, batches, optimizers = make(dropout=0.0)
        results.append(train(model, loss_fn, batches, optimizers, quiet(max_steps=5, compile=compiled)))
    assert losses(results[0]) == pytest.approx(losses(results[1]), rel=1e-4)
