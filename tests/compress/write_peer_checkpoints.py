"""Write checkpoints of a tiny random Llama with AutoAWQ and AutoGPTQ, and what they should compute.

python tests/compress/write_peer_checkpoints.py FOLDER [SEED]

Run by hand, where both are installed: see the README in `peer_checkpoints`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from write_llmcompressor_checkpoints import tiny_llama

CASES = {
    "awq-groups-of-32": {"peer": "autoawq", "group_size": 32},
    "awq-biases": {"peer": "autoawq", "group_size": 16, "attention_bias": True, "num_hidden_layers": 1},
    "gptq-4-bits-sym": {"peer": "auto-gptq", "bits": 4, "symmetric": True},
    "gptq-4-bits-asym": {"peer": "auto-gptq", "bits": 4, "symmetric": False},
    "gptq-3-bits-asym": {"peer": "auto-gptq", "bits": 3, "symmetric": False},
    "gptq-8-bits-sym": {"peer": "auto-gptq", "bits": 8, "symmetric": True, "num_hidden_layers": 1},
    "gptq-order": {"peer": "auto-gptq", "bits": 4, "symmetric": True, "order": True, "num_hidden_layers": 1},
}
# AutoGPTQ packs no fewer than 32 output features, so its keys and values need 32.
SIZES = {"vocab_size": 37, "hidden_size": 64, "intermediate_size": 96}


def float16_llama(seed: int, **sizes: int) -> nn.Module:
    """`tiny_llama` with float16 parameters; the rotary frequencies stay float32, as in a loaded model."""
    model = tiny_llama(seed, **SIZES, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
            parameter.data = parameter.half()
    # As in a model that the peers would have opened from a folder.
    model.config.dtype = torch.float16
    model.config.architectures = [type(model).__name__]
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.float()(tokens).logits.contiguous()


def write_autoawq(
    folder: Path, model: nn.Module, calibration: Tensor, tokens: Tensor, group_size: int
) -> Tensor:
    """AutoAWQ's search, packing and saving; logits with the weights that its own function dequantizes."""
    from awq.models._config import AwqConfig
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    awq = LlamaAWQForCausalLM(model, "llama", False, model.config, AwqConfig(), None)
    awq.quantize(
        None,
        {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=calibration.tolist(),
        max_calib_seq_len=calibration.shape[1],
        apply_clip=False,  # its search needs a multiple of 64 output features
    )
    awq.save_quantized(str(folder))

    for name, packed in list(model.named_modules()):
        if isinstance(packed, WQLinear_GEMM):
            weight = dequantize_gemm(
                packed.qweight, packed.qzeros, packed.scales.float(), packed.w_bit, packed.group_size
            )
            plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
            plain.weight.data = weight.T.contiguous()
            if packed.bias is not None:
                plain.bias.data = packed.bias.float()
            model.set_submodule(name, plain)
    return logits_of(model, tokens)


@cache
def import_autogptq() -> None:
    """AutoGPTQ 0.7.1 without its package's own imports, and with what it takes from an older transformers.

    None of these names is called here: they load models and talk to the hub.
    """
    from transformers import modeling_utils
    from transformers.utils import hub

    for module, missing in (
        (modeling_utils, "no_init_weights"),
        (hub, "create_commit"),
        (hub, "create_repo"),
        (hub, "CommitOperationAdd"),
    ):
        if not hasattr(module, missing):
            setattr(module, missing, None)
    found = importlib.util.find_spec("auto_gptq")
    assert found is not None and found.submodule_search_locations is not None
    package = ModuleType("auto_gptq")
    package.__path__ = list(found.submodule_search_locations)
    package.__version__ = importlib.metadata.version("auto-gptq")
    sys.modules["auto_gptq"] = package


def write_autogptq(
    folder: Path,
    model: nn.Module,
    calibration: Tensor,
    tokens: Tensor,
    *,
    bits: int,
    symmetric: bool,
    order: bool = False,
) -> Tensor:
    """AutoGPTQ's solver, packing and saving; logits by its own torch layers.

    Only the loop over the blocks is ours, since its own wants a CUDA device: all layers see the activations of
    the original model.
    """
    import_autogptq()
    from auto_gptq.modeling._base import BaseQuantizeConfig
    from auto_gptq.modeling._utils import pack_model
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
    from auto_gptq.quantization.gptq import GPTQ

    config = BaseQuantizeConfig(
        bits=bits,
        group_size=32,
        desc_act=order,
        sym=symmetric,
        true_sequential=False,
        # By itself it gives the file a name of its own, which the case with an order keeps.
        model_file_base_name=None if order else "model",
    )
    solvers = {
        name: GPTQ(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }

    def observe(solver: GPTQ) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda module, inputs, output: solver.add_batch(inputs[0].data, output.data)

    # The solvers change the layers themselves, so a copy is observed; in float32, as its logits are.
    observed = copy.deepcopy(model).float()
    for name, solver in solvers.items():
        observed.get_submodule(name).register_forward_hook(observe(solver))
    logits_of(observed, calibration)
    quantizers = {}
    for name, solver in solvers.items():
        solver.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
        with mock.patch.object(torch.cuda, "synchronize"):  # the solver waits for a device
            found = solver.fasterquant(percdamp=config.damp_percent, group_size=32, actorder=order)
        scale, zero, index = found
        assert zero.min() >= 1, "AutoGPTQ spoils the words of a zero point of 0: choose another seed"
        quantizers[name] = (solver.quantizer, scale, zero, index)
    pack_model(model, quantizers, bits, group_size=32, desc_act=order)
    LlamaGPTQForCausalLM(model, quantized=True, quantize_config=config).save_quantized(str(folder))
    return logits_of(model, tokens)


def write(folder: Path, *, peer: str, seed: int = 0, **case: int | bool) -> None:
    """One checkpoint, with `expected.safetensors` (tokens and float32 logits) beside its weights."""
    settings = {key: case.pop(key) for key in ("bits", "symmetric", "order", "group_size") if key in case}
    model = float16_llama(seed, **case)
    generator = torch.Generator().manual_seed(seed + 1)
    calibration = torch.randint(0, model.config.vocab_size, (8, 24), generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 11), generator=generator)
    write_one = write_autoawq if peer == "autoawq" else write_autogptq
    logits = write_one(folder, model, calibration, tokens, **settings)
    versions = {peer: importlib.metadata.version(peer), "transformers": transformers.__version__}
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors", metadata=versions)
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    for name, case in CASES.items():
        write(Path(sys.argv[1], name), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0, **case)
