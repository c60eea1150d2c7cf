"""Writes directories and files whole or not at all.

The directory is written beside its destination and renamed, so that a full disk, an error, Ctrl-C or SIGTERM
leaves nothing half-written, and what lay at the destination stays until the new directory is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tensormill.errors import OutputError


def check_output(
    output: str | os.PathLike[str],
    *,
    source: Path | None = None,
    overwrite: bool = False,
    needed_bytes: int = 0,
) -> None:
    """Refuses a destination that can't or mustn't be written, before any work is done.

    Raises:
        OutputError: it exists and isn't empty, isn't a checkpoint that `overwrite` may replace, is or holds
            the source, has no writable parent, or its disk has too little space.
    """
    target = Path(os.path.realpath(output))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin or target in origin.parents or origin in target.parents:
            raise OutputError(f"the output {output} overlaps the source {source}; choose another directory")
    if target.exists():
        if not target.is_dir():
            raise OutputError(
                f"the output {output} is a file, expected a directory to create; choose another name"
            )
        if any(target.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"the output {output} exists and isn't empty; choose another name or overwrite"
                )
            if not (target / "config.json").is_file():
                raise OutputError(
                    f"the output {output} isn't a checkpoint, so it is not overwritten; remove it first"
                )
    parent = _existing_parent(target)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the output {output} can't be created: {parent} isn't a writable directory")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"the output {output} needs {_size(needed_bytes)} but its disk has {_size(free)} left; "
            "free some space or write elsewhere"
        )


@contextlib.contextmanager
def whole_directory(output: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new directory that becomes `output` when the block ends, and vanishes if it fails.

    The directory lies beside its destination, so that the last step is a rename. An existing destination is
    exchanged with it in one step where the system can. An exception, Ctrl-C and SIGTERM remove it.

    Raises:
        OutputError: anything that the operating system refuses, a full disk included.
    """
    target = Path(os.path.realpath(output))
    partial = target.parent / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    with _sigterm_as_exception():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            _finish_tree(partial)
            _publish(partial, target, overwrite)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _is_write_error(error):
                raise OutputError(
                    f"{output} could not be written: {reason(error)}; nothing was left behind"
                ) from error
            raise


def check_files(directory: str | os.PathLike[str], names: Iterable[str], *, overwrite: bool = False) -> None:
    """Refuses, before any work is done, a directory into which `write_files` can't or mustn't write these files.

    Raises:
        OutputError: it is a file, has no writable parent, or holds one of the files and `overwrite` is not given.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output {directory} is a file, expected a directory; choose another name")
    place = target if target.exists() else _existing_parent(target)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"the output {directory} can't be written: {place} isn't a writable directory")
    for name in names:
        if (target / name).exists() and not overwrite:
            raise OutputError(f"the output {directory} has a {name}; choose another name or overwrite")


def write_files(directory: str | os.PathLike[str], contents: Mapping[str, str]) -> list[Path]:
    """Write text files into a directory, each whole or not at all; files of the same names are replaced.

    Args:
        directory: Where to; it is made if it doesn't exist.
        contents: Texts by file name.

    Returns:
        The paths, in the order given.

    Raises:
        OutputError: A file could not be written; no partial file is left.
    """
    place = Path(directory)
    waiting: list[tuple[str, Path]] = []
    made, done = not place.exists(), False
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=place)
            waiting.append((temporary, place / name))
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in waiting:
            os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone
            os.replace(temporary, path)
        done = True
    except OSError as error:
        raise OutputError(f"report can't be written to {place}: {error.strerror or error}") from error
    finally:
        for temporary, _ in waiting:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if made and not done:
            with contextlib.suppress(OSError):
                place.rmdir()
    return [path for _, path in waiting]


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Lets clean-up run before SIGTERM ends the process; only where nobody else handles the signal."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        # Fails on a directory that has been filled since it was checked, so that nothing is lost.
        os.replace(partial, target)
    elif _exchange(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
    else:
        old = partial.with_name(partial.name.replace(".partial-", ".old-"))
        os.replace(target, old)
        try:
            os.replace(partial, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directories in one step (Linux `renameat2`); False where the system or file system can't."""
    at_working_directory, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(
        renameat2(at_working_directory, names[0], at_working_directory, names[1], rename_exchange) == 0
    )


def _finish_tree(directory: Path) -> None:
    """Flushes every file to disk, readable as the umask says (safetensors writes for the owner only)."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o666)
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    # Directories can't be opened on every system; what can't be synced there is left to it.
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.parents if parent.exists())


def _is_write_error(error: BaseException) -> bool:
    from safetensors import SafetensorError

    # The tokenizers library raises plain exceptions that only carry the system's text.
    return isinstance(error, (OSError, SafetensorError)) or "os error" in str(error)


def reason(error: BaseException) -> str:
    """Why the system refused to write, in words."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in text:
        return "the disk is full"
    return getattr(error, "strerror", None) or text or type(error).__name__


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
