"""C4: adapters of the built-in model, moved from Python source to English prose, beside Houlsby adapters and LoRA."""

from __future__ import annotations

import copy
import lzma
import statistics
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.snnk.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor, nn

# (method, size, learning rate) at one number of trained parameters, and at about five times as many. The rates are each
# one's best of 4e-3, 8e-3, 1.6e-2 and 3.2e-2 at the quick scale on another text, State of the Union addresses; the full scale
# chooses among `_RATES` on windows of its own.
_SMALL = (("snnk", 8, 1.6e-2), ("snnk-sin", 4, 3.2e-2), ("houlsby", 4, 1.6e-2), ("lora-all", 1, 1.6e-2))
_LARGE = (("snnk", 44, 1.6e-2), ("houlsby", 22, 1.6e-2), ("lora-all", 5, 8e-3), ("lora-attention", 15, 4e-3))
_QUICK = (("snnk", 8), ("snnk-sin", 4), ("houlsby", 4), ("lora-all", 1), ("houlsby", 22), ("lora-all", 5))
_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
_WINDOW = 64


def _english() -> tuple[str, str]:
    """English prose, more than half a million characters of it, and what it is."""
    from pydoc_data.topics import topics

    from tensormill.data import real_data_dir

    folder = real_data_dir()
    path = None if folder is None else folder / "english_public_domain" / "moby_dick.txt.xz"
    if path is not None and path.is_file():
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read(), "Moby-Dick"
    return "\n\n".join(topics[name] for name in sorted(topics)), "the standard library's help texts"


def _bottleneck(dim: int, width: int) -> nn.Module:
    """Houlsby et al. (arXiv 1902.00751): x + up(relu(down x)), the way up starting at 0."""
    import torch
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(torch.relu(self.down(x)))

    return Bottleneck()


def _lora(linear: nn.Linear, rank: int) -> nn.Module:
    """Hu et al. (arXiv 2106.09685): W x + 2 B A x, B starting at 0."""
    import math

    import torch
    from torch import nn

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = linear
            self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
            self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 2 * nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)

    return LowRank()


def _adapted(model: nn.Module, method: str, size: int, seed: int) -> list[nn.Parameter]:
    """Attach a method to every layer of a frozen model; the parameters to train."""
    import torch

    from tensormill.numerics.snnk import adapter_parameters, attach

    torch.manual_seed(seed)
    if method.startswith("snnk"):
        feature = "sin" if method == "snnk-sin" else "relu"
        pattern = r"model\.layers\.\d+\.(self_attn|mlp)"
        attach(model, pattern, size, feature=feature, init="weight", seed=1000 * seed)
        return list(adapter_parameters(model).values())
    model.requires_grad_(False)
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        if method == "houlsby":
            for module in (layer.self_attn, layer.mlp):
                module.add_module("adapter", _bottleneck(model.config.hidden_size, size))  # type: ignore[union-attr, arg-type]
                module.register_forward_hook(
                    lambda m, _, y: (m.adapter(y[0]), *y[1:]) if isinstance(y, tuple) else m.adapter(y)
                )
            continue
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, _lora(getattr(layer.self_attn, name), size))
        if method == "lora-all":
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(layer.mlp, name, _lora(getattr(layer.mlp, name), size))
    return [p for p in model.parameters() if p.requires_grad]


class _Task:
    """The model's upper layers, and what the frozen lower ones make of training, validation and held-out windows.

    Args:
        run: for its device.
        text: split into windows; the last ones are held out.
        layers: how many of the upper layers are adapted; the others are evaluated once.
        batch: windows in a batch.
        steps: of training.
        held_out: windows to measure on.
        validation: windows to choose learning rates on.
    """

    def __init__(
        self, run: Run, text: str, layers: int, batch: int, steps: int, held_out: int, validation: int
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tensormill.models import python_lm

        folder = python_lm.path()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = model.to(run.device).eval()
        wanted = batch * steps + validation + held_out
        # 4 characters a token and more: what is not needed is not tokenized
        text = text[: 6 * (_WINDOW + 1) * wanted]
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device=run.device)
        pieces = ids[: len(ids) // (_WINDOW + 1) * (_WINDOW + 1)].reshape(-1, _WINDOW + 1)[-wanted:]
        self.ids = {
            "train": pieces[: -(validation + held_out)],
            "valid": pieces[-(validation + held_out) : -held_out],
            "test": pieces[-held_out:],
        }
        self.batch, self.steps = batch, steps
        lower, model.config.use_cache = model.config.num_hidden_layers - layers, False
        self.states: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, part in self.ids.items():
                if not len(part):
                    continue
                self.states[name] = torch.cat(
                    [
                        model.model(x[:, :-1], output_hidden_states=True).hidden_states[lower] if lower
                        else model.model.embed_tokens(x[:, :-1])
                        for x in part.split(32)
                    ]
                )  # fmt: skip
        model.model.layers = model.model.layers[lower:]
        model.config.num_hidden_layers = layers
        self.model = model

    def _loss(self, model: Any, states: Tensor, ids: Tensor) -> Tensor:
        import torch

        logits = model(inputs_embeds=states).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def loss(self, model: Any, part: str) -> float:
        """Nats per token of the windows of a part."""
        import torch

        states, ids = self.states[part], self.ids[part]
        with torch.no_grad():
            parts = zip(states.split(32), ids.split(32), strict=True)
            return sum(float(self._loss(model, s, i)) * len(i) for s, i in parts) / len(ids)

    def adapt(self, method: str, size: int, rate: float, seed: int, part: str = "test") -> tuple[float, int]:
        """Loss of a part after training, and how many parameters were trained."""
        import torch

        model = copy.deepcopy(self.model)
        parameters = _adapted(model, method, size, seed)
        model.to(self.ids["train"].device)
        optimizer = torch.optim.Adam(parameters, rate)
        generator = torch.Generator().manual_seed(seed)
        count = len(self.ids["train"])
        epochs = 1 + self.steps * self.batch // count
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        order = order.to(self.ids["train"].device)
        for step in range(self.steps):
            for group in optimizer.param_groups:  # warm-up over a tenth of the steps, then down to 0
                group["lr"] = rate * min((step + 1) / (self.steps / 10), (self.steps - step) / self.steps)
            index = order[step * self.batch : (step + 1) * self.batch]
            optimizer.zero_grad()
            self._loss(model, self.states["train"][index], self.ids["train"][index]).backward()
            optimizer.step()
        return self.loss(model, part), sum(p.numel() for p in parameters)


@PAPER.claim(
    "C4",
    figure="parameters",
    criterion="SNNK adapters, with at least 4.5 times fewer trained parameters than Houlsby adapters and LoRA, reach 95 % of "
    "the better one's gain in held-out loss over the unadapted model",
    measures=("tensormill.numerics.snnk", "tensormill.models.python_lm"),
    peers=("transformers",),
)
def adapters(run: Run) -> Measurement:
    """The built-in model of Python source adapted to English prose: upper two layers (quick) or all eight (full)."""
    full = run.scale == "full"
    text, named = _english()
    seeds = range(run.seed, run.seed + (3 if full else 2))
    run.progress("lower layers", 0.0)
    sizes = (8, 8, 150, 256, 128) if full else (2, 8, 20, 64, 0)
    task = _Task(run, text, *sizes)
    chosen = [c for c in _SMALL + _LARGE if full or c[:2] in _QUICK]
    before = task.loss(task.model, "test")
    losses: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], int] = {}
    for step, (method, size, rate) in enumerate(chosen):
        run.progress(f"{method}, size {size}", 0.1 + 0.9 * step / len(chosen))
        if full:
            rate = min(_RATES, key=lambda r: task.adapt(method, size, r, run.seed + 100, "valid")[0])
        runs = [task.adapt(method, size, rate, seed) for seed in seeds]
        losses[method, size] = [loss for loss, _ in runs]
        counts[method, size] = runs[0][1]
    mean = {key: statistics.fmean(values) for key, values in losses.items()}
    rows = [Row("not adapted: held-out loss", before, "nats/token")]
    for key, values in losses.items():
        method, size = key
        setting = {"method": method, "size": size, "parameters": counts[key]}
        what = f"{method}, {counts[key]} parameters: held-out loss"
        rows.append(Row(what, mean[key], "nats/token", (min(values), max(values)), setting=setting))

    def best(keys: list[tuple[str, int]]) -> tuple[str, int]:
        return min(keys, key=lambda key: mean[key])

    small = [c[:2] for c in _SMALL if c[:2] in mean]
    ours = best([key for key in small if key[0].startswith("snnk")])
    equal = best([key for key in small if not key[0].startswith("snnk")])
    # only peers that have as many more parameters as the criterion says
    theirs = best([k for k in mean if not k[0].startswith("snnk") and counts[k] >= 4.5 * counts[ours]])
    share = (before - mean[ours]) / (before - mean[theirs])
    fewer = counts[theirs] / counts[ours]
    rows.append(
        Row(
            f"gain of {ours[0]} over that of {theirs[0]} with {fewer:.1f} times its parameters",
            100 * share,
            "%",
        )
    )
    houlsby = [k for k in mean if k[0] == "houlsby" and counts[k] >= 4.5 * counts[ours]]
    against = (before - mean[ours]) / (before - mean[best(houlsby)])
    rows.append(Row("gain over that of the large Houlsby adapter", 100 * against, "%"))
    reason = (
        f"{ours[0]} with {counts[ours]} parameters gains {before - mean[ours]:.3f} nats per token, {theirs[0]} with "
        f"{counts[theirs]} {before - mean[theirs]:.3f} ({100 * share:.0f} %); {equal[0]} with {counts[equal]} gains "
        f"{before - mean[equal]:.3f}. Adapted to {named}; it stands for GLUE and the paper's pretrained models"
    )
    return Measurement(rows, share >= 0.95, reason, len(seeds))
