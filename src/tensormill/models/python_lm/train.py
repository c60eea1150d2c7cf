"""Train the built-in language model: `python -m tensormill.models.python_lm.train --out FOLDER`.

One command gathers Python source from the machine, cleans it, trains a tokenizer, trains the model by the
clock, evaluates it on the held-out standard-library modules, and writes the checkpoint. The corpus is made in
other processes while the training step is compiled. The folder is also written at every checkpoint, so that
an interrupted run leaves a model behind; started again with the same `--work`, it continues.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormill.data.python_source import HELDOUT_MODULES, stdlib_dir
from tensormill.errors import CheckpointError, DataError, InvalidArgument, TensormillError
from tensormill.models.python_lm.architecture import Llama, LlamaShape
from tensormill.models.python_lm.baselines import token_byte_lengths
from tensormill.models.python_lm.corpus import END_OF_TEXT, CorpusPlan, prepare
from tensormill.models.python_lm.export import export_model, finalize
from tensormill.training import TokenWindows, TrainingConfig, TrainingResult, muon_and_adamw, train

__all__ = ["bits_per_byte", "main"]


def _process_began() -> float:
    """When this process was started, on the monotonic clock: imports count towards the time it may take."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        booted = time.clock_gettime(time.CLOCK_BOOTTIME)
        age = booted - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - age if 0 <= age < 600 else now


_BEGIN = _process_began()


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGIN:6.1f} s] {text}", file=sys.stderr, flush=True)


def bits_per_byte(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    byte_lengths: Tensor,
    *,
    window: int,
    chunk: int | None = None,
) -> dict[str, float]:
    """Loss on a token sequence, cut into disjoint windows; the remainder is not scored.

    Args:
        logits: (batch, window) tokens -> (batch, window, vocabulary).
        tokens: (length,) int64, on the model's device.
        byte_lengths: (vocabulary,) bytes of each token, same device.
        window: tokens in a window; each predicts all but its first.
        chunk: windows at a time; by default about 16384 tokens.

    Returns:
        bits_per_byte, perplexity (exp of the mean loss a token), windows, scored_tokens, scored_bytes.

    Raises:
        DataError: there is not one whole window.
    """
    count = tokens.numel() // window
    if count == 0:
        raise DataError(f"given {tokens.numel()} tokens, expected at least one window of {window}")
    rows = tokens[: count * window].view(count, window)
    chunk = chunk or max(1, 16_384 // window)
    nats, size = 0.0, 0
    for part in torch.split(rows, chunk):
        out = logits(part)[:, :-1].float()
        targets = part[:, 1:]
        nats += float(F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="sum"))
        size += int(byte_lengths[targets].sum())
    scored = count * (window - 1)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / scored),
        "windows": count,
        "scored_tokens": scored,
        "scored_bytes": size,
    }


def _set_attention(backend: str) -> None:
    """Allow one attention backend on CUDA ("flash", "cudnn", "efficient", "math"), or "any"."""
    torch.backends.cuda.enable_flash_sdp(backend in ("flash", "any"))
    torch.backends.cuda.enable_cudnn_sdp(backend in ("cudnn", "any"))
    torch.backends.cuda.enable_mem_efficient_sdp(backend in ("efficient", "any"))
    torch.backends.cuda.enable_math_sdp(backend in ("math", "any"))


def _rank_attention(shape: LlamaShape, batch: int) -> list[tuple[float, str, bool]]:
    """Time forward and backward of each attention backend that runs, with and without repeated keys.

    Returns:
        (seconds, backend, whether keys and values are repeated), fastest first.
    """
    if not torch.cuda.is_available():
        return [(0.0, "any", False)]
    found = []
    device = torch.device("cuda")
    repeat = shape.heads // shape.kv_heads

    def heads(count: int) -> Tensor:
        flat = torch.randn(batch, shape.context, count, shape.head_dim, device=device, dtype=torch.bfloat16)
        return flat.transpose(1, 2).requires_grad_()

    query, key, value = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)
    for backend in ("flash", "cudnn"):
        for expand in (False, True) if repeat > 1 else (False,):
            _set_attention(backend)
            try:
                seconds = math.inf
                for _ in range(6):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    k = key.repeat_interleave(repeat, 1) if expand else key
                    v = value.repeat_interleave(repeat, 1) if expand else value
                    out = F.scaled_dot_product_attention(
                        query, k, v, is_causal=True, enable_gqa=repeat > 1 and not expand
                    )
                    torch.autograd.backward(out, out.detach())
                    torch.cuda.synchronize()
                    seconds = min(seconds, time.perf_counter() - begin)
                found.append((seconds, backend, expand))
            except RuntimeError as error:
                _say(f"attention {backend}, repeated keys {expand}: {str(error).splitlines()[0][:100]}")
    _set_attention("any")
    return sorted(found)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _gradient_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error (norm of the difference over the norm) among named gradients."""
    return max(float((gradients[name] - right).norm() / right.norm()) for name, right in expected.items())


def _compile(model: Llama, windows: Sequence[int], batch_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile the training step for its window sizes, with the fastest attention that proves right.

    Each candidate's loss and gradients are compared with those of the uncompiled model and plain attention;
    where none passes, the uncompiled model trains.
    """
    shape = model.shape
    device = next(model.parameters()).device

    def eager(inputs: Tensor, targets: Tensor) -> Tensor:
        return _loss(model, inputs, targets)

    generator = torch.Generator(device).manual_seed(1)
    flat = torch.randint(shape.vocabulary, (batch_tokens + 1,), device=device, generator=generator)

    def measure(
        compute: Callable[[Tensor, Tensor], Tensor], window: int, parts: int
    ) -> tuple[float, dict[str, Tensor]]:
        # copies, so that they have the alignment that training batches have
        inputs, targets = flat[:-1].view(-1, window).clone(), flat[1:].view(-1, window).clone()
        total = torch.zeros((), device=device)
        for a, b in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=model.stream is not None):
                loss = compute(a, b) / parts
            torch.autograd.backward(loss)
            total += loss.detach()
        # the last block's attention sees everything below it, and its gradients pass through every kernel
        gradients = {
            name: weight.grad.clone()
            for name, weight in model.attentions()[-1].named_parameters()
            if weight.grad is not None
        }
        model.zero_grad(set_to_none=True)
        return float(total), gradients

    # at its initial scale attention hardly moves the loss; larger weights make an error in it visible
    attention = [w for module in model.attentions() for w in module.parameters()]
    torch._foreach_mul_([w.data for w in attention], 3.0)
    try:
        return _compile_candidates(model, windows, batch_tokens, eager, measure)
    finally:
        torch._foreach_mul_([w.data for w in attention], 1 / 3.0)


def _compile_candidates(
    model: Llama,
    windows: Sequence[int],
    batch_tokens: int,
    eager: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Callable[[Tensor, Tensor], Tensor], int, int], tuple[float, dict[str, Tensor]]],
) -> Callable[[Tensor, Tensor], Tensor]:
    shape = model.shape
    _set_attention("math")
    expected = {window: measure(eager, window, max(1, batch_tokens // (4 * window))) for window in windows}
    candidates = _rank_attention(shape, max(1, batch_tokens // shape.context))
    for seconds, backend, expand in candidates:
        _say(f"attention {backend}, repeated keys {expand}: {1e3 * seconds:.2f} ms forward and backward")
    tried = set()
    for _, backend, expand in candidates:
        if backend in tried:
            continue  # a backend that failed once is not tried in its slower form
        tried.add(backend)
        begin = time.monotonic()
        try:
            _set_attention(backend)
            model.expand_kv(expand)
            torch.compiler.reset()
            compute = torch.compile(eager, dynamic=False)
            for window in windows:
                loss, gradients = measure(compute, window, 1)
                right_loss, right_gradients = expected[window]
                error = _gradient_error(gradients, right_gradients)
                _say(
                    f"window {window}: loss {loss:.5f}, uncompiled {right_loss:.5f}; "
                    f"largest relative gradient error {error:.4f}"
                )
                if not (abs(loss / right_loss - 1) < 0.01 and error < 0.15):
                    raise ArithmeticError("the compiled step does not agree with the uncompiled one")
            built = time.monotonic() - begin
            clock = time.perf_counter()
            for _ in range(3):
                for window in windows:
                    measure(compute, window, 1)
            rate = 3 * len(windows) * batch_tokens / (time.perf_counter() - clock)
            _say(f"compiled with {backend} attention in {built:.1f} s, {rate / 1e6:.2f} M tokens/s")
            return compute
        except Exception as error:  # any failure of the compiler: the next candidate may do
            model.zero_grad(set_to_none=True)
            _say(f"compiling with {backend} attention failed: {error.__class__.__name__}: {str(error)[:300]}")
    _set_attention("any")
    model.expand_kv(False)
    _say("training uncompiled")
    return eager


def _load_exported(model: Llama, folder: Path) -> list[dict[str, Any]]:
    """Copy the weights of an exported model.

    Args:
        model: of the same shape, changed in place.
        folder: what the script exported earlier.

    Returns:
        The records of the sessions that trained it, oldest first.

    Raises:
        CheckpointError: the folder holds no model of this shape.
    """
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model-*.safetensors")):
            weights.update(load_file(file))
        model.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"given --init {folder}, expected an exported model of the same shape "
            f"({str(error).splitlines()[0]})"
        ) from error
    earlier = record.pop("earlier_sessions", [])
    return [*earlier, record]


def _start_corpus(plan: CorpusPlan) -> multiprocessing.process.BaseProcess | None:
    """Begin making the corpus in another process; None where the working folder has it already."""
    if (plan.work / "ready").exists():
        return None
    (plan.work / "failed").unlink(missing_ok=True)
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    process: multiprocessing.process.BaseProcess = context.Process(target=prepare, args=(plan,))
    process.start()
    return process


def _wait(path: Path, process: multiprocessing.process.BaseProcess | None, until: float) -> bool:
    """Whether a file of the corpus process appeared before a time."""
    while not path.exists():
        if process is None or not process.is_alive():
            return path.exists()
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[bool]]:
    """A list that becomes non-empty when the process is asked to end."""
    asked: list[bool] = []
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tensormill.models.python_lm.train", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--work", type=Path, help="folder for corpus and training state (default: a temporary one)")
    add("--source", type=Path, action="append", help="folder of Python files (default: this Python's own)")
    add("--extra-source", type=Path, action="append", help="further folder of Python files")
    add("--extra-weight", type=int, default=1, help="how often the files of those occur")
    add("--init", type=Path, help="continue from this exported model, with its tokenizer and a new schedule")
    add("--minutes", type=float, default=8.0, help="most minutes of training")
    add("--total-seconds", type=float, help="end everything, export included, by then")
    add("--reserve-seconds", type=float, default=20.0, help="of the total, for evaluation and export")
    add("--max-steps", type=int, help="most training steps")
    add("--vocabulary", type=int, default=4096)
    add("--hidden", type=int, default=384)
    add("--mlp", type=int, default=1280)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--context", type=int, default=2048)
    add("--short-window", type=int, default=1024, help="window in the first part of the training")
    add("--short-until", type=float, default=0.6, help="end of that part, as a fraction of the training")
    add("--batch-tokens", type=int, default=131_072)
    add("--muon-lr", type=float, default=0.016)
    add("--adamw-lr", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.08)
    add("--stdlib-weight", type=int, default=3, help="how often the standard library's own files occur")
    add("--sample-mb", type=float, default=48.0, help="text that the tokenizer is trained on")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes for the corpus")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the step (default: on cuda)")
    add("--precision", choices=("bf16", "fp32"), help="of training (default: bf16 on cuda)")
    add("--seed", type=int, default=0)
    add("--validate-every", type=float, default=30.0, help="seconds")
    add("--checkpoint-every", type=float, default=75.0, help="seconds")
    return parser.parse_args(argv)


def _roots(given: Sequence[Path] | None) -> tuple[Path, ...]:
    if given:
        return tuple(given)
    folders = [stdlib_dir(), *(Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib"))]
    return tuple(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: command line; the process's own by default.

    Returns:
        Exit status: 0, or 1 where the training failed (a model is exported even then if there is one), or 2
        for arguments that can't work.
    """
    arguments = _arguments(argv)
    try:
        return _run(arguments)
    except TensormillError as error:
        _say(f"error: {error}")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    work = arguments.work or Path(tempfile.mkdtemp(prefix="python-lm-"))
    work.mkdir(parents=True, exist_ok=True)
    shape = LlamaShape(
        vocabulary=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        layers=arguments.layers,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        context=arguments.context,
    )
    if not 0 < arguments.vocabulary <= 2**16:
        raise InvalidArgument(f"given --vocabulary {arguments.vocabulary}, expected 1 to 65536")
    plan = CorpusPlan(
        roots=_roots(arguments.source),
        work=work,
        vocabulary=shape.vocabulary,
        workers=max(1, arguments.workers),
        sample_bytes=int(arguments.sample_mb * 1e6),
        stdlib_weight=arguments.stdlib_weight,
        extra_roots=tuple(arguments.extra_source or ()),
        extra_weight=arguments.extra_weight,
        tokenizer=arguments.init / "tokenizer.json" if arguments.init else None,
    )
    end = _BEGIN + arguments.total_seconds if arguments.total_seconds else math.inf
    # forked before this process touches the GPU or starts threads
    corpus_process = _start_corpus(plan)
    try:
        with _stop_on_signals() as asked:
            return _train_and_export(arguments, shape, plan, corpus_process, end, asked)
    finally:
        if corpus_process is not None and corpus_process.is_alive():
            corpus_process.terminate()
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _train_and_export(
    arguments: argparse.Namespace,
    shape: LlamaShape,
    plan: CorpusPlan,
    corpus_process: multiprocessing.process.BaseProcess | None,
    end: float,
    asked: list[bool],
) -> int:
    work = plan.work
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    precision = arguments.precision or ("bf16" if cuda else "fp32")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(shape, stream=torch.bfloat16 if precision == "bf16" else None).to(device)
    parameters = sum(weight.numel() for weight in model.parameters())
    _say(f"{parameters:,} parameters on {_device_name(device)}, torch {torch.__version__}")

    curriculum = []
    if arguments.short_until > 0 and arguments.short_window < shape.context:
        curriculum = [(0.0, arguments.short_window), (arguments.short_until, shape.context)]
    windows = sorted({window for _, window in curriculum} | {shape.context})
    if arguments.compile or (arguments.compile is None and cuda):
        compute = _compile(model, windows, arguments.batch_tokens)
    else:

        def compute(inputs: Tensor, targets: Tensor) -> Tensor:
            return _loss(model, inputs, targets)

    # after compiling, whose comparison wants weights at their initial scale
    sessions = _load_exported(model, arguments.init) if arguments.init else []

    if not _wait(work / "ready", corpus_process, end - arguments.reserve_seconds):
        failed = work / "failed"
        reason = failed.read_text(encoding="utf-8").splitlines()[0] if failed.exists() else "it took too long"
        raise DataError(f"given sources {', '.join(map(str, plan.roots))}, no corpus could be made: {reason}")
    corpus = json.loads((work / "corpus.json").read_text(encoding="utf-8"))
    _say(f"corpus: {corpus['training_bytes'] / 1e6:.1f} MB, {corpus['unique_tokens'] / 1e6:.1f} M tokens")

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    lengths = torch.from_numpy(token_byte_lengths(tokenizer, shape.vocabulary)).to(device)

    def load(name: str) -> Tensor:
        return torch.from_numpy(np.load(work / f"{name}.npy").astype(np.int32))

    batches = TokenWindows(
        load("tokens"),
        window=shape.context,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        device=device,
        curriculum=curriculum,
    )
    validation = load("validation").long().to(device)[: 256 * shape.context]
    validation_window = min(shape.context, validation.numel())

    def validate(module: nn.Module) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            score = bits_per_byte(module, validation, lengths, window=validation_window)
        return score["bits_per_byte"]

    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("out", "work", "source", "extra_source", "init")
    }
    settings["curriculum"] = curriculum
    settings["curriculum_text"] = (
        f"{arguments.short_window} (the first {100 * arguments.short_until:.0f} %), then {shape.context}"
        if curriculum
        else str(shape.context)
    )

    def record_of(result: TrainingResult, status: str) -> dict[str, Any]:
        tokens = result.steps * arguments.batch_tokens
        curve = [{**entry, "tokens": int(entry["step"] * arguments.batch_tokens)} for entry in result.curve]
        stride = max(1, sum("loss" in entry for entry in curve) // 400)
        readings = [entry for entry in curve if "loss" in entry]
        kept = {id(entry) for entry in [*readings[::stride], *readings[-1:]]}
        return {
            "status": status,
            "earlier_sessions": sessions,
            "parameters": parameters,
            "shape": asdict(shape),
            "settings": settings,
            "device": _device_name(device),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "training": {
                "steps": result.steps,
                "seconds": result.seconds,
                "tokens": tokens,
                "epochs": tokens / corpus["tokens_per_epoch"],
                "tokens_per_second": tokens / max(result.seconds, 1e-9),
                "loss": result.loss,
                "stopped": result.stopped,
                "restarts": result.restarts,
            },
            "curve": [entry for entry in curve if "loss" not in entry or id(entry) in kept],
            "corpus": corpus,
        }

    def export(record: dict[str, Any]) -> dict[str, int]:
        return export_model(
            model.state_dict(), shape, work / "tokenizer.json", arguments.out, record, end_of_text=END_OF_TEXT
        )

    latest = TrainingResult()

    def on_checkpoint(result: TrainingResult) -> None:
        nonlocal latest
        latest = result
        export(record_of(result, "running"))

    seconds = min(60 * arguments.minutes, end - arguments.reserve_seconds - time.monotonic())
    if seconds <= 0:
        raise InvalidArgument("given --total-seconds, expected time left to train after the corpus; raise it")
    optimizers = muon_and_adamw(
        model,
        muon_lr=arguments.muon_lr,
        muon_weight_decay=arguments.weight_decay,
        adamw_lr=arguments.adamw_lr,
    )
    config = TrainingConfig(
        max_steps=arguments.max_steps,
        max_seconds=seconds,
        schedule="cosine",
        warmup=0.02,
        final_lr=0.005,
        precision=precision,
        validate_every=arguments.validate_every,
        checkpoint_every=arguments.checkpoint_every,
        checkpoint=work / "training.pt",
        curve=work / "curve.jsonl",
    )
    _say(f"training for {seconds:.0f} s")
    status, failure = "finished", None
    try:
        latest = train(
            model,
            lambda _, batch: compute(*batch),
            batches,
            optimizers,
            config,
            validate=validate,
            on_checkpoint=on_checkpoint,
            should_stop=lambda: bool(asked),
        )
    except Exception as error:  # what was learned so far is exported before the failure is reported
        failure = error
        status = f"failed: {error.__class__.__name__}: {error}"
        _say(status)
    if latest.stopped == "asked":
        status = "interrupted"
    rate = latest.steps * arguments.batch_tokens / max(latest.seconds, 1e-9)
    _say(
        f"trained {latest.steps} steps in {latest.seconds:.0f} s, {rate:,.0f} tokens/s, loss {latest.loss:.4f}"
    )

    if failure is not None and not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        _say("the weights are not finite; the last export stays")
        return 1
    record = record_of(latest, status)
    export(record)
    _set_attention("any")
    # judged as stored: weights rounded to bfloat16, computed in float32
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    model.stream = None
    model.expand_kv(False)
    model.eval()
    heldout = load("heldout").long().to(device)
    with torch.no_grad():
        score = bits_per_byte(model, heldout, lengths, window=min(shape.context, heldout.numel()))
    record["heldout"] = {
        **score,
        "window": min(shape.context, heldout.numel()),
        "modules": list(HELDOUT_MODULES),
        "bytes": corpus["heldout"]["heldout_bytes"],
        "sha256": corpus["heldout"]["heldout_sha256"],
        "python": corpus["heldout"]["python"],
        "bytes_per_token": corpus["heldout"]["bytes_per_token"],
    }
    export(record)
    _say(
        f"held-out modules: {score['bits_per_byte']:.4f} bits per byte, perplexity {score['perplexity']:.3f}"
    )
    if _wait(work / "baselines.json", corpus_process, min(end - 3, time.monotonic() + 120)):
        record["baselines"] = json.loads((work / "baselines.json").read_text(encoding="utf-8"))
        for name in ("ngram", "xz"):
            _say(f"{name}: {record['baselines'][name]['bits_per_byte']:.4f} bits per byte")
    files = export(record)
    _say("wrote " + ", ".join(f"{name} ({size:,})" for name, size in files.items()))
    return 1 if failure is not None else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--finalize":
        finalize(Path(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
