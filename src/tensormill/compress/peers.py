"""Other projects' quantizers on our models and our calibration windows, so that a comparison differs in the method
only.

Each takes a model in memory, leaves it as it is, and returns a copy whose linear layers hold what the peer's
quantized weights read as: plain floating-point matrices that any evaluation runs. No peer is a dependency; what is
installed is in `installed()`.

- llm-compressor (vllm-project): AWQ and GPTQ through `oneshot`, on a data loader of the very windows.
- HQQ (Badri and Shaji): half-quadratic quantization, which needs no calibration; but for 4 bits its zero points are
  float numbers, so that its weights take a little more room than ours at the same bits and group size.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.calibration import Calibration
from tensormill.compress.footprint import PeakMemory, peak_memory, reset_peak_memory
from tensormill.compress.structure import discover, linear_in
from tensormill.errors import InvalidArgument, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Windows that a peer runs at once: all have one length, so this changes its speed and nothing else.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class PeerRun:
    """What a peer made of a model, and what that took.

    Attributes:
        model: a copy of the model with the peer's weights, dequantized.
        seconds: of the peer's own work, without copying and dequantizing.
        memory: the high-water mark meanwhile, the model included.
    """

    model: PreTrainedModel
    seconds: float
    memory: PeakMemory


@dataclass(frozen=True)
class Peer:
    """One way to run a peer.

    Attributes:
        module: what must be importable.
        distribution: name of the installed package.
        settings: what differs from the peer's documented defaults; empty for the defaults.
        run: `run(model, calibration, bits=, group_size=, symmetric=, **settings)`.
        method: "awq", "gptq" or "hqq".
    """

    module: str
    distribution: str
    method: str
    run: Callable[..., PeerRun] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported; nothing is imported to find out."""
        return importlib.util.find_spec(self.module) is not None

    def __call__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        *,
        bits: int,
        group_size: int,
        symmetric: bool = False,
    ) -> PeerRun:
        """Quantize a copy of a model.

        Args:
            model: a causal language model; its output head and embeddings stay as they are.
            calibration: the windows, in this order.
            bits: of a weight.
            group_size: input features that share a scale.
            symmetric: no zero points.

        Raises:
            ModelError: the peer isn't installed.
            InvalidArgument: the peer has no such quantizer.
        """
        if not self.is_installed:
            raise ModelError(
                f"given the peer {self.distribution}, which isn't installed; pip install {self.distribution}"
            )
        return self.run(
            model, calibration, bits=bits, group_size=group_size, symmetric=symmetric, **self.settings
        )


def installed(methods: Sequence[str] = ("awq", "gptq", "hqq"), *, options: bool = True) -> dict[str, Peer]:
    """The peers that can be imported here, by name.

    Args:
        methods: which methods are wanted.
        options: include settings that a peer offers besides its defaults.
    """
    return {
        name: peer
        for name, peer in PEERS.items()
        if peer.is_installed and peer.method in methods and (options or not peer.settings)
    }


def quantize_with_llmcompressor(
    model: PreTrainedModel,
    calibration: Calibration,
    *,
    method: str,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    observer: str | None = None,
    output: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    **settings: Any,
) -> PeerRun:
    """llm-compressor's AWQ or GPTQ on a copy of a model.

    AWQ is its transform followed by its plain quantization, which is how it documents it.

    Args:
        model: a causal language model of transformers.
        calibration: the windows.
        method: "awq" or "gptq".
        bits: of a weight.
        group_size: input features that share a scale.
        symmetric: no zero points.
        observer: how a group's range is found; None takes the default, its minimum and maximum.
        output: also save the checkpoint there, as the peer packs it.
        in_place: work on the model itself and return it as the peer leaves it, for measuring memory.
        **settings: of `AWQModifier` (duo_scaling, n_grid) or `GPTQModifier` (actorder, dampening_frac).
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    with _quiet_llmcompressor():
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

    if method not in ("awq", "gptq"):
        raise InvalidArgument(f"given method={method!r}, expected 'awq' or 'gptq'")
    chosen = {} if observer is None else {"observer": observer}
    weights = QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=group_size, symmetric=symmetric, **chosen
    )
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    where = {"config_groups": groups, "ignore": ["lm_head"]}
    recipe: list[Any]
    if method == "awq":
        recipe = [AWQModifier(**settings), QuantizationModifier(**where)]
    else:
        recipe = [GPTQModifier(**where, **settings)]
    device = next(model.parameters()).device
    working = model if in_place else copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder, _quiet_llmcompressor(), _pinning_where_possible():
        # It reads the configuration again from the model's folder before it starts.
        working.config.save_pretrained(folder)
        working.config._name_or_path = folder
        reset_peak_memory(device)
        began = time.perf_counter()
        oneshot(
            model=working,
            processor=_no_processor(),
            dataset=_loader(calibration.tokens, device),
            recipe=recipe,
            max_seq_length=calibration.tokens.shape[1],
            num_calibration_samples=len(calibration.tokens),
            output_dir=None,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, memory = time.perf_counter() - began, peak_memory(device)
        state = {} if in_place else _dequantized(working)
        if output is not None:
            working.save_pretrained(output, save_compressed=True)
    if in_place:
        return PeerRun(working, seconds, memory)
    made = copy.deepcopy(model)
    _take(made, state)
    return PeerRun(made, seconds, memory)


def quantize_with_hqq(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    axis: int = 1,
) -> PeerRun:
    """HQQ on a copy of a model.

    Args:
        model: a causal language model.
        calibration: not looked at.
        bits: of a weight.
        group_size: weights that share a scale.
        symmetric: must be False.
        axis: 1 groups along the inputs as ours does (its default), 0 along the outputs.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if symmetric:
        raise InvalidArgument("given symmetric=True for HQQ, expected False: it always has zero points")
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
    made = copy.deepcopy(model)
    device = next(model.parameters()).device
    reset_peak_memory(device)
    seconds = 0.0
    for block in discover(made).blocks:
        for name in block.linears:
            linear = linear_in(made, f"{block.name}.{name}")
            began = time.perf_counter()
            # A copy, since it takes the weight away from the layer that it is given.
            layer = HQQLinear(
                copy.deepcopy(linear), settings, compute_dtype=linear.weight.dtype, device=str(device)
            )
            seconds += time.perf_counter() - began
            linear.weight.data.copy_(layer.dequantize())
    return PeerRun(made, seconds, peak_memory(device))


def _llmcompressor(method: str, **settings: Any) -> Peer:
    def run(*args: Any, **named: Any) -> PeerRun:
        return quantize_with_llmcompressor(*args, method=method, **named)

    return Peer("llmcompressor", "llmcompressor", method, run, settings)


PEERS = {
    "llm-compressor awq": _llmcompressor("awq"),
    "llm-compressor awq, duo both": _llmcompressor("awq", duo_scaling="both"),
    "llm-compressor awq, duo both, mse": _llmcompressor("awq", duo_scaling="both", observer="mse"),
    "llm-compressor gptq": _llmcompressor("gptq"),
    "llm-compressor gptq, mse": _llmcompressor("gptq", observer="mse"),
    "hqq": Peer("hqq", "hqq", "hqq", quantize_with_hqq),
    "hqq, axis 0": Peer("hqq", "hqq", "hqq", quantize_with_hqq, {"axis": 0}),
}
"""Every way to run a peer, by the name it has in tables: first its defaults, then its better options."""


def _loader(tokens: Tensor, device: torch.device) -> Any:
    from torch.utils.data import DataLoader

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.cpu()]
    batch = max(1, _BATCH_TOKENS.get(device.type, 4096) // tokens.shape[1])
    return DataLoader(rows, batch_size=batch, shuffle=False)  # type: ignore[arg-type]


def _no_processor() -> Any:
    """A tokenizer that is never used: one must be given with a data set, even of tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))


def _dequantized(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that llm-compressor quantized, its linear layers as their codes read."""
    from compressed_tensors.quantization import forward_quantize

    state = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        for key, parameter in module.named_parameters(recurse=False):
            value = parameter.detach()
            if scheme is not None and key == "weight":
                value = forward_quantize(module, value, "weight", scheme.weights)
            state[f"{name}.{key}"] = value
    return state


@contextmanager
def _pinning_where_possible() -> Iterator[None]:
    """Leave out llm-compressor's pinning of memory, which only saves time, on machines without an accelerator.

    There its AWQ (0.14.0.1) would end in torch's "Cannot access accelerator device when none is available".
    """
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    pin = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *args, **named: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


@torch.no_grad()
def _take(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy into a model's parameters those of a quantized copy."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name].to(parameter.device, parameter.dtype))


@contextmanager
def _quiet_llmcompressor() -> Iterator[None]:
    """Without its log lines and progress bars, and with its change of the environment undone."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    sink = io.StringIO()
    try:
        with redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
