"""The working directory of an unfinished run: finished parts as safetensors files, and a journal that names them.

Every file is written under another name, flushed and renamed before a line of the journal names it, so that a
process killed at any moment leaves a directory from which the next one goes on. A torn or damaged line ends the
journal: what it and later lines say was not done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from tensormill.compress.methods import LayerReport
from tensormill.compress.output import reason, sync
from tensormill.errors import OutputError

_NAME = "journal.jsonl"


@dataclass(frozen=True)
class FinishedPart:
    """A part that is done: its file in the working directory, and reports on the layers in it."""

    file: Path
    layers: list[LayerReport]


class Journal:
    """A working directory, opened for writing by one process at a time; its threads may finish parts together.

    Args:
        directory: made if it doesn't exist.
        fingerprint: all that determines the result, as JSON's types. A directory of another fingerprint is emptied.

    Attributes:
        directory: as given.
        parts: what is finished, by name.
        inputs: number of the block that the latest kept hidden states reach, and their file; None if none are kept.
        outdated: in what the fingerprint found differed; empty if nothing was found, or found equal.

    Raises:
        OutputError: it can't be written, isn't a working directory, or another process works in it.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, Any]) -> None:
        self.directory = directory
        self.parts: dict[str, FinishedPart] = {}
        self.inputs: tuple[int, Path] | None = None
        self.outdated: list[str] = []
        self._lock = threading.Lock()
        made = not directory.exists()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not made and not (directory / _NAME).is_file() and any(directory.iterdir()):
                raise OutputError(
                    f"{directory} isn't the working directory of an unfinished run, which is kept there; remove it"
                )
            self._stream: IO[bytes] = (directory / _NAME).open("a+b")
        except OSError as error:
            raise OutputError(f"{directory} can't be written: {error.strerror}") from error
        self._claim()
        wanted = json.loads(json.dumps(fingerprint))
        found = self._read(wanted)
        if found != wanted:
            if found is not None:
                self.outdated = sorted(key for key in wanted if found.get(key) != wanted[key])
            self._start_anew(wanted)

    def finish(self, name: str, tensors: Mapping[str, Tensor], layers: Sequence[LayerReport]) -> Path:
        """Write a part's tensors (on the CPU, under their final names), and note that it is done.

        Raises:
            OutputError: the file can't be written; the part then counts as not done.
        """
        return self._finish(name, tensors, layers, None)

    def finish_block(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        layers: Sequence[LayerReport],
        reached: int,
        hidden: Sequence[Tensor],
    ) -> Path:
        """As `finish`, and keep the hidden states that reach block number `reached`, in the same step."""
        return self._finish(name, tensors, layers, (reached, hidden))

    def _finish(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        layers: Sequence[LayerReport],
        inputs: tuple[int, Sequence[Tensor]] | None,
    ) -> Path:
        entry: dict[str, Any] = {"part": name, "layers": [asdict(layer) for layer in layers]}
        file = self.directory / f"{name}.safetensors"
        try:
            entry["bytes"] = _write_tensors(file, tensors)
            kept = None
            if inputs is not None:
                kept = self.directory / f"inputs-{inputs[0]:05d}.safetensors"
                chunks = {f"{number:05d}": chunk for number, chunk in enumerate(inputs[1])}
                entry["inputs"] = inputs[0]
                entry["inputs_bytes"] = _write_tensors(kept, chunks)
            with self._lock:
                self._append(entry)
                self.parts.pop(name, None)
                self.parts[name] = FinishedPart(file, list(layers))
        except Exception as error:
            raise OutputError(f"{file} could not be written: {reason(error)}") from error
        if inputs is not None and kept is not None:
            if self.inputs is not None:
                self.inputs[1].unlink(missing_ok=True)
            self.inputs = (inputs[0], kept)
        return file

    def forget(self, names: Sequence[str]) -> None:
        """Let parts count as not done; they are written again."""
        for name in names:
            self.parts.pop(name, None)

    def close(self) -> None:
        """Let go of the directory, which stays."""
        self._stream.close()

    def remove(self) -> None:
        """Let go of the directory and remove it."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _claim(self) -> None:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._stream.close()
                raise OutputError(
                    f"another process works in {self.directory}; wait for it, or choose another output"
                ) from error

    def _read(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take in the journal as far as it is sound and its files are there; gives its fingerprint."""
        self._stream.seek(0)
        sound = 0
        fingerprint: dict[str, Any] | None = None
        for line in self._stream:
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if fingerprint is None:
                    fingerprint = entry["fingerprint"]
                    if fingerprint != wanted:
                        return fingerprint
                else:
                    self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                break
            sound += len(line)
        self._stream.truncate(sound)
        return fingerprint

    def _take(self, entry: Mapping[str, Any]) -> None:
        file = self.directory / f"{entry['part']}.safetensors"
        layers = [LayerReport(**layer) for layer in entry["layers"]]
        if file.stat().st_size != entry["bytes"]:
            raise ValueError("damaged part")
        self.parts.pop(entry["part"], None)
        self.parts[entry["part"]] = FinishedPart(file, layers)
        if "inputs" in entry:
            kept = self.directory / f"inputs-{entry['inputs']:05d}.safetensors"
            # Earlier ones are gone, and not missed.
            if kept.is_file() and kept.stat().st_size == entry["inputs_bytes"]:
                self.inputs = (entry["inputs"], kept)

    def _start_anew(self, fingerprint: Mapping[str, Any]) -> None:
        self.parts, self.inputs = {}, None
        try:
            for file in self.directory.iterdir():
                if file.name != _NAME:
                    file.unlink()
            self._stream.truncate(0)
            self._append({"fingerprint": fingerprint})
        except OSError as error:
            raise OutputError(f"{self.directory} can't be written: {error.strerror}") from error

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


class JournalElsewhere:
    """Stands for the journal in processes that leave writing to another one.

    Args:
        parts: what the journal said is finished.
    """

    inputs = None

    def __init__(self, parts: Mapping[str, FinishedPart]) -> None:
        self.parts = dict(parts)

    def forget(self, names: Sequence[str]) -> None:
        """As `Journal.forget`."""
        for name in names:
            self.parts.pop(name, None)

    def close(self) -> None:
        """Does nothing."""

    def remove(self) -> None:
        """Does nothing."""


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file whole or not at all; gives its size."""
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)
    return file.stat().st_size
