"""Short trainings: one loop with schedule, mixed precision, validation, checkpoint and resume, curve and progress.

The loop knows nothing about models: it takes a module, a loss function and a source of batches. A training
is a pure function of its state (weights, optimizers, step, position in the data, random generators), all of
which a checkpoint holds, so a resumed run continues with the losses the uninterrupted one would have had.

`Muon` orthogonalises momentum updates of matrices (Jordan et al., "Muon: an optimizer for hidden layers",
2024). It computes what `torch.optim.Muon` computes, but matrices of equal shape go through the
Newton-Schulz iteration as one batch: small models have many small matrices, whose separate launches would
take longer than the training step itself.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError

__all__ = [
    "BatchSource",
    "Muon",
    "TokenWindows",
    "TrainingConfig",
    "TrainingResult",
    "load_checkpoint",
    "muon_and_adamw",
    "save_checkpoint",
    "schedule_factor",
    "train",
]

_SCHEDULES = ("cosine", "linear", "constant")
_PRECISIONS = ("fp32", "bf16")


class BatchSource(Protocol):
    """Where batches come from; its state makes a resumed training see the batches it had not seen yet."""

    def next_batch(self, progress: float) -> Any:
        """The next batch, given the fraction of the training that is done, from 0 to 1."""

    def state_dict(self) -> dict[str, Any]:
        """Position as plain numbers and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state_dict` gave."""


class TokenWindows:
    """Shuffled windows of one long token sequence, on the training device.

    An epoch cuts the sequence into disjoint windows of `window` tokens and their successors, starting at a
    random offset, and visits them in a random order; both follow from the seed and the epoch number alone.
    `curriculum` may shorten the windows early in training: each is then split, and the number of tokens in a
    batch stays.

    Args:
        tokens: (length,) integer token ids; kept as int16 where the ids fit, else int32.
        window: tokens in a window.
        batch_tokens: tokens in a batch, a multiple of `window`.
        seed: of the offsets and orders.
        device: where the sequence lies and batches are made.
        curriculum: (progress, window) pairs; from that progress on windows are that long. Every one must
            divide `window`.

    Raises:
        InvalidArgument: sizes that do not divide, or a sequence shorter than a batch.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        window: int,
        batch_tokens: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        curriculum: Sequence[tuple[float, int]] = (),
    ) -> None:
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise InvalidArgument(
                f"given tokens of shape {tuple(tokens.shape)} and {tokens.dtype}, expected 1-D integers"
            )
        if window < 1 or batch_tokens < window or batch_tokens % window:
            raise InvalidArgument(
                f"given window={window} and batch_tokens={batch_tokens}, "
                "expected batch_tokens to be a multiple of window"
            )
        for _, length in curriculum:
            if length < 1 or window % length:
                raise InvalidArgument(
                    f"given a curriculum window of {length}, expected a divisor of window={window}"
                )
        # a random offset below `window` and one successor of the last window must fit
        self.windows_per_epoch = (tokens.numel() - window - 1) // window
        self.batch_windows = batch_tokens // window
        if self.windows_per_epoch < self.batch_windows:
            raise InvalidArgument(
                f"given {tokens.numel()} tokens, expected at least {batch_tokens + window + 1}; "
                "use a smaller batch or more text"
            )
        narrow = int(tokens.max()) < 2**15
        self.tokens = tokens.to(torch.int16 if narrow else torch.int32).to(device)
        self.window = window
        self.seed = seed
        self.curriculum = tuple(sorted(curriculum))
        self.epoch = 0
        self.position = 0
        self._steps = torch.arange(window + 1, device=device)
        self._starts = self._shuffle()

    def _shuffle(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        offset = int(torch.randint(self.window, (1,), generator=generator))
        order = torch.randperm(self.windows_per_epoch, generator=generator)
        return (order * self.window + offset).to(self.tokens.device)

    def next_batch(self, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them.

        Args:
            progress: fraction of the training that is done; selects the window of the curriculum.

        Returns:
            (batch, window) int64 inputs and targets.
        """
        if self.position + self.batch_windows > self.windows_per_epoch:
            self.epoch += 1
            self.position = 0
            self._starts = self._shuffle()
        starts = self._starts[self.position : self.position + self.batch_windows]
        self.position += self.batch_windows
        rows = self.tokens[starts[:, None] + self._steps].long()
        length = self.window
        for since, shorter in self.curriculum:
            if progress >= since:
                length = shorter
        # contiguous, so that every batch has the strides that a compiled step was made for
        return (
            rows[:, :-1].reshape(-1, length).contiguous(),
            rows[:, 1:].reshape(-1, length).contiguous(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position in it."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            CheckpointError: the state belongs to a source with another seed.
        """
        if state["seed"] != self.seed:
            raise CheckpointError(
                f"given a data position of seed {state['seed']}, expected seed {self.seed}; "
                "resume with the settings the training began with"
            )
        self.epoch = int(state["epoch"])
        self.position = int(state["position"])
        self._starts = self._shuffle()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest semi-orthogonal matrix; for hidden 2-D weights.

    Matrices of equal shape (up to transposition) are orthogonalised as one batch. Update and defaults follow
    `torch.optim.Muon` with its "original" learning-rate rule: lr * sqrt(max(1, rows / columns)).

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate.
        weight_decay: decoupled, relative to lr.
        momentum: decay of the running mean of gradients.
        nesterov: look one step ahead.
        iterations: Newton-Schulz iterations.

    Raises:
        InvalidArgument: a parameter is not a matrix, or a setting is out of range.
    """

    coefficients = (3.4445, -4.7750, 2.0315)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or iterations < 1:
            raise InvalidArgument(
                f"given lr={lr}, momentum={momentum}, weight_decay={weight_decay}, iterations={iterations}, "
                "expected lr >= 0, 0 <= momentum < 1, weight_decay >= 0, iterations >= 1"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "iterations": iterations,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise InvalidArgument(
                        f"given a parameter of shape {tuple(weight.shape)}, expected a matrix; "
                        "give vectors and embeddings to AdamW"
                    )

    def _orthogonalise(self, updates: Tensor, iterations: int) -> Tensor:
        """Newton-Schulz iteration on a batch.

        Args:
            updates: (matrices, rows, columns), rows <= columns.
            iterations: number of iterations.

        Returns:
            Same shape, bfloat16; singular values close to one.
        """
        a, b, c = self.coefficients
        x = updates.bfloat16()
        # Frobenius norm bounds the spectral norm, so that the iteration converges
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(iterations):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        return x

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            if group["nesterov"]:
                updates = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
            else:
                updates = list(buffers)
            buckets: dict[tuple[int, int], list[int]] = {}
            for index, weight in enumerate(weights):
                buckets.setdefault((min(weight.shape), max(weight.shape)), []).append(index)
            for indices in buckets.values():
                stacked = torch.stack(
                    [
                        updates[i] if updates[i].shape[0] <= updates[i].shape[1] else updates[i].mT
                        for i in indices
                    ]
                )
                for i, matrix in zip(
                    indices, self._orthogonalise(stacked, group["iterations"]).unbind(), strict=True
                ):
                    rows, columns = weights[i].shape
                    oriented = matrix if rows <= columns else matrix.mT
                    updates[i] = oriented.to(weights[i].dtype) * math.sqrt(max(1.0, rows / columns))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        return loss


def muon_and_adamw(
    model: nn.Module,
    *,
    muon_lr: float = 0.02,
    muon_weight_decay: float = 0.1,
    adamw_lr: float = 3e-3,
    adamw_weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    is_hidden: Callable[[str, Tensor], bool] | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon for a model's hidden matrices and AdamW for everything else.

    Args:
        model: its trainable parameters are divided.
        muon_lr: learning rate of the matrices.
        muon_weight_decay: decoupled weight decay of the matrices.
        adamw_lr: learning rate of embeddings, heads, norms and biases.
        adamw_weight_decay: decoupled weight decay of those.
        betas: AdamW's.
        is_hidden: (name, parameter) -> whether Muon takes it; by default 2-D parameters whose name does not
            contain "embed" or "lm_head".

    Returns:
        The optimizers that have something to do.
    """
    if is_hidden is None:

        def is_hidden(name: str, weight: Tensor) -> bool:
            return weight.ndim == 2 and "embed" not in name and "lm_head" not in name

    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (hidden if is_hidden(name, weight) else rest).append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(Muon(hidden, muon_lr, weight_decay=muon_weight_decay))
    if rest:
        optimizers.append(
            torch.optim.AdamW(
                rest, adamw_lr, betas=betas, eps=1e-10, weight_decay=adamw_weight_decay, fused=rest[0].is_cuda
            )
        )
    return optimizers


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`.

    Attributes:
        max_steps: length in steps; the schedule then follows steps.
        max_seconds: length in seconds of training; the schedule follows the clock where no step limit is set.
            With both, training ends at whichever comes first and the schedule follows whichever is further.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup: fraction of the training over which the learning rate rises from zero.
        final_lr: learning rate at the end as a fraction of the peak.
        gradient_clip: largest norm of all gradients together; None for no clipping.
        precision: "bf16" runs the loss function under autocast; weights stay in their own type.
        compile: compile the loss function with torch.compile.
        log_every: steps between readings of the loss (each waits for the device).
        validate_every: seconds between validations; None for only one at the end.
        checkpoint_every: seconds between checkpoints; None for only one at the end.
        checkpoint: file of the checkpoint; None for no checkpoints.
        curve: JSON-lines file that readings and validations are appended to; None for none.
        progress: "bar" (tqdm on stderr), "lines" (one line on stderr every `line_every` seconds), "none", or
            "auto": a bar on a terminal, lines elsewhere.
        line_every: seconds between lines.
        max_restarts: how often a training that became NaN or infinite goes back to the last good state with
            half the learning rate before it is given up.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.02
    final_lr: float = 0.0
    gradient_clip: float | None = 1.0
    precision: str = "fp32"
    compile: bool = False
    log_every: int = 20
    validate_every: float | None = None
    checkpoint_every: float | None = None
    checkpoint: Path | None = None
    curve: Path | None = None
    progress: str = "auto"
    line_every: float = 10.0
    max_restarts: int = 2

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise InvalidArgument("given neither max_steps nor max_seconds, expected at least one; set one")
        if self.max_steps is not None and self.max_steps < 1:
            raise InvalidArgument(f"given max_steps={self.max_steps}, expected at least 1")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise InvalidArgument(f"given max_seconds={self.max_seconds}, expected more than 0")
        if self.schedule not in _SCHEDULES:
            raise InvalidArgument(
                f"given schedule={self.schedule!r}, expected one of {', '.join(_SCHEDULES)}"
            )
        if self.precision not in _PRECISIONS:
            raise InvalidArgument(
                f"given precision={self.precision!r}, expected one of {', '.join(_PRECISIONS)}"
            )
        if self.progress not in ("auto", "bar", "lines", "none"):
            raise InvalidArgument(f"given progress={self.progress!r}, expected auto, bar, lines or none")
        if not 0 <= self.warmup < 1 or not 0 <= self.final_lr <= 1:
            raise InvalidArgument(
                f"given warmup={self.warmup} and final_lr={self.final_lr}, "
                "expected 0 <= warmup < 1 and 0 <= final_lr <= 1"
            )
        if self.log_every < 1:
            raise InvalidArgument(f"given log_every={self.log_every}, expected at least 1")


@dataclass
class TrainingResult:
    """What a training did.

    Attributes:
        steps: steps taken, those before a resume included.
        seconds: seconds by the clock, likewise.
        loss: mean loss of the last readings, nats.
        curve: readings {"step", "seconds", "loss", "lr"} and validations {"step", "seconds", "validation"}.
        stopped: "steps", "seconds" or "asked": what ended it.
        restarts: how often it went back because of a NaN or an infinity.
    """

    steps: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    restarts: int = 0


def schedule_factor(progress: float, config: TrainingConfig) -> float:
    """Learning rate as a fraction of its peak, at a fraction of the training.

    Args:
        progress: from 0 to 1.
        config: its `schedule`, `warmup` and `final_lr`.

    >>> schedule_factor(1.0, TrainingConfig(max_steps=1, final_lr=0.1))
    0.1
    """
    if progress < config.warmup:
        return progress / config.warmup
    if config.schedule == "constant":
        return 1.0
    rest = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    shape = 0.5 * (1 + math.cos(math.pi * rest)) if config.schedule == "cosine" else 1 - rest
    return config.final_lr + (1 - config.final_lr) * shape


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state as a whole or not at all.

    Args:
        path: file; written beside itself and renamed.
        state: nested dictionaries and lists of tensors, numbers and strings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a state of `save_checkpoint`; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"given the checkpoint {path}, expected an existing file") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"given the checkpoint {path}, expected a file that torch.load can read with weights_only "
            f"({error.__class__.__name__}); delete it to begin anew"
        ) from error
    if not isinstance(state, dict) or "step" not in state or "model" not in state:
        raise CheckpointError(f"given the checkpoint {path}, expected one that a training wrote")
    return state


class _Progress:
    """A bar on a terminal or a line now and then, on stderr."""

    def __init__(self, mode: str, config: TrainingConfig) -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self.mode = mode
        self.every = config.line_every
        self.last = time.monotonic()
        self.bar: Any = None
        if mode == "bar":
            from tqdm import tqdm

            self.bar = tqdm(total=1000, bar_format="{l_bar}{bar}| {postfix}", file=sys.stderr)

    def show(self, progress: float, seconds: float, step: int, loss: float, rate: float, unit: str) -> None:
        text = f"step {step}, loss {loss:.4f}, {rate:,.0f} {unit}/s"
        if self.bar is not None:
            self.bar.n = min(1000, int(1000 * progress))
            self.bar.set_postfix_str(text)
        elif self.mode == "lines" and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            left = seconds * (1 - progress) / progress if progress > 0 else math.nan
            print(
                f"training: {seconds:.0f} s, {text}, {100 * progress:.1f} %, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _clone(state: Any) -> Any:
    """Copy of a nested state; its tensors no longer share memory with the originals."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _clone(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_clone(value) for value in state]
    return state


def _batch_size(batch: Any) -> int:
    """Elements of the first tensor of a batch: what the rate is counted in."""
    if isinstance(batch, Tensor):
        return batch.numel()
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return _batch_size(batch[0]) if isinstance(batch, (list, tuple)) and batch else 1


def train(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: BatchSource,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    config: TrainingConfig,
    *,
    validate: Callable[[nn.Module], float] | None = None,
    on_checkpoint: Callable[[TrainingResult], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume: bool = True,
    unit: str = "tokens",
) -> TrainingResult:
    """Train a model in place.

    Args:
        model: on its device; left in training mode.
        loss_fn: (model, batch) -> scalar loss to minimise.
        batches: source of batches, on the model's device.
        optimizers: one or several; the schedule multiplies the learning rates they have at the start.
        config: settings.
        validate: model -> validation loss; called without gradients, in evaluation mode.
        on_checkpoint: called after each checkpoint, the final one included; where no file is named, at the
            times at which one would have been written.
        should_stop: asked after each step; True ends the training as if its time were up.
        resume: continue from `config.checkpoint` where that file exists.
        unit: what the elements of a batch's first tensor are called in the progress.

    Returns:
        Steps, seconds, curve and why it ended. The checkpoint holds the final state.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged or of another training.
        ModelError: the loss is NaN or infinite, and going back did not help.
    """
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]

    def groups() -> list[dict[str, Any]]:  # loading an optimizer's state replaces its groups
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    for group in groups():
        group.setdefault("initial_lr", group["lr"])
    parameters = [weight for group in groups() for weight in group["params"]]
    device = parameters[0].device
    cuda = device.type == "cuda"
    result = TrainingResult()
    lr_scale = 1.0

    def state() -> dict[str, Any]:
        return {
            "step": result.steps,
            "seconds": result.seconds,
            "lr_scale": lr_scale,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "batches": batches.state_dict(),
            "random_cpu": torch.get_rng_state(),
            "random_device": torch.cuda.get_rng_state(device) if cuda else None,
            "curve": result.curve,
        }

    def restore(saved: Mapping[str, Any]) -> None:
        try:
            model.load_state_dict(saved["model"])
            for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(_clone(content))
            batches.load_state_dict(saved["batches"])
        except (KeyError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(
                f"given a checkpoint of another training ({first}), expected one of this model and optimizers; "
                "delete it to begin anew"
            ) from error
        torch.set_rng_state(saved["random_cpu"].cpu())
        if cuda and saved["random_device"] is not None:
            torch.cuda.set_rng_state(saved["random_device"].cpu(), device)
        result.steps = int(saved["step"])
        result.seconds = float(saved["seconds"])

    if resume and config.checkpoint is not None and config.checkpoint.exists():
        saved = load_checkpoint(config.checkpoint, device)
        restore(saved)
        lr_scale = float(saved["lr_scale"])
        result.curve = list(saved["curve"])
        result.loss = next((entry["loss"] for entry in reversed(result.curve) if "loss" in entry), math.nan)

    def forward(batch: Any) -> Tensor:
        return loss_fn(model, batch)

    compute = torch.compile(forward, dynamic=False) if config.compile else forward
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    progress_shown = _Progress(config.progress, config)

    def record(entry: dict[str, float]) -> None:
        result.curve.append(entry)
        if config.curve is not None:
            config.curve.parent.mkdir(parents=True, exist_ok=True)
            with config.curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def run_validation() -> None:
        if validate is None:
            return
        model.eval()
        with torch.no_grad():
            value = float(validate(model))
        model.train()
        record({"step": result.steps, "seconds": round(result.seconds, 3), "validation": value})

    def checkpoint() -> None:
        if config.checkpoint is not None:
            save_checkpoint(config.checkpoint, state())
        if on_checkpoint is not None:
            on_checkpoint(result)

    def progress_at(seconds: float) -> float:
        by_steps = result.steps / config.max_steps if config.max_steps else 0.0
        by_clock = seconds / config.max_seconds if config.max_seconds else 0.0
        return min(1.0, max(by_steps, by_clock))

    model.train()
    good = _clone(state())
    clock = time.monotonic()
    carried = result.seconds  # seconds of training before `clock`
    last_validation = last_checkpoint = result.seconds
    pending: list[Tensor] = []
    seen = 0
    read_at = result.seconds
    try:
        while True:
            result.seconds = carried + time.monotonic() - clock
            if config.max_steps is not None and result.steps >= config.max_steps:
                result.stopped = "steps"
            elif config.max_seconds is not None and result.seconds >= config.max_seconds:
                result.stopped = "seconds"
            elif should_stop is not None and should_stop():
                result.stopped = "asked"
            if result.stopped and not pending:
                break
            progress = progress_at(result.seconds)
            factor = schedule_factor(progress, config) * lr_scale
            if not result.stopped:
                for group in groups():
                    group["lr"] = group["initial_lr"] * factor
                batch = batches.next_batch(progress)
                seen += _batch_size(batch)
                with autocast:
                    loss = compute(batch)
                torch.autograd.backward(loss)
                if config.gradient_clip is not None:
                    nn.utils.clip_grad_norm_(parameters, config.gradient_clip, foreach=True)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                pending.append(loss.detach())
                result.steps += 1
            if len(pending) < config.log_every and not result.stopped:
                continue

            value = float(torch.stack(pending).float().mean())
            pending.clear()
            result.seconds = carried + time.monotonic() - clock
            if not math.isfinite(value):
                if result.restarts >= config.max_restarts:
                    raise ModelError(
                        f"the loss became {value} near step {result.steps}, {result.restarts + 1} times; "
                        "lower the learning rate"
                    )
                elapsed = result.seconds
                restore(good)
                result.seconds = elapsed  # lost time stays lost
                result.restarts += 1
                lr_scale *= 0.5
                seen = 0
                read_at = result.seconds
                continue
            result.loss = value
            rate = seen / max(result.seconds - read_at, 1e-9)
            seen, read_at = 0, result.seconds
            record(
                {
                    "step": result.steps,
                    "seconds": round(result.seconds, 3),
                    "loss": value,
                    "lr": factor,
                    f"{unit}_per_second": round(rate, 1),
                }
            )
            progress_shown.show(progress, result.seconds, result.steps, value, rate, unit)
            if result.stopped:
                break
            validation_due = (
                config.validate_every is not None
                and result.seconds - last_validation >= config.validate_every
            )
            checkpoint_due = (
                config.checkpoint_every is not None
                and result.seconds - last_checkpoint >= config.checkpoint_every
            )
            if validation_due or checkpoint_due:
                if validation_due:
                    run_validation()
                    last_validation = result.seconds
                if checkpoint_due:
                    good = _clone(state())
                    checkpoint()
                    last_checkpoint = result.seconds
                result.seconds = read_at = carried + time.monotonic() - clock
        run_validation()
        checkpoint()
    finally:
        progress_shown.close()
    return result
