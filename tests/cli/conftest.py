"""A tiny model on disk, a text for it, and the command line in this process."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))

from packed_models import save_source, tiny_model


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def tensormill(monkeypatch, capsys, tmp_path):
    """`tensormill("ops", "--json")` runs the command in tmp_path and gives exit code, stdout and stderr."""
    from tensormill.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["tensormill", *map(str, arguments)])
        capsys.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama of hidden size 64 with its tokenizer."""
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """A text in the tiny model's words."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"word{draw.randrange(126)}" for _ in range(4000)))
    return file
