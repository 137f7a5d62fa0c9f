"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError


@contextmanager
def whole_file(path: str | Path, mode: str = "wb", **kwargs: Any) -> Iterator[IO[Any]]:
    """Yield a new file that becomes `path`, replacing what is there, when the block ends without an error.

    Readers see the old content or the new, never a part. A symbolic link stays one: its target is replaced.

    Args:
        path: file to write; its folder must exist.
        mode: `wb`, or `w` for text (UTF-8).
        kwargs: passed to `open`.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    if "b" not in mode:
        kwargs.setdefault("encoding", "utf-8")
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty folder of the same name that becomes `path` when the block ends without an error.

    Args:
        path: folder to write; its parents are made.
        marker: name of a file that lists what the folder holds. Where `path` has it, and nothing that it does not
            list, the folder was written by an earlier call and is replaced. None: nothing is ever replaced.

    Raises:
        InputError: `path` exists and may not be replaced, or its parent cannot be written to.
    """
    path = Path(os.path.realpath(path))
    _check_free(path, marker)
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    old = work.with_suffix(".old")
    folder = work / path.name
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield folder
        if marker is not None:
            (folder / marker).write_text("".join(f"{name}\n" for name in sorted(_entries(folder))), encoding="utf-8")
        _check_free(path, marker)  # somebody may have put something there meanwhile
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_free(path: Path, marker: str | None) -> None:
    """Raise `InputError` unless there is nothing at `path`, or only what `whole_folder` wrote with this marker."""
    if not os.path.lexists(path):
        return
    advice = "choose another folder or delete it"
    if not path.is_dir():
        raise InputError(f"{path}: exists and is no folder; choose another name")
    if marker is None or not (path / marker).is_file():
        raise InputError(f"{path}: exists; {advice}")
    listed = {marker, *(path / marker).read_text(encoding="utf-8").splitlines()}
    if foreign := sorted(_entries(path) - listed):
        raise InputError(f"{path}: exists and also holds {foreign[0]}, which would be lost; {advice}")
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path}: exists and is the working directory; {advice}")


def _entries(folder: Path) -> set[str]:
    """Files (and links) below a folder and its empty folders, relative to it, with `/` between the parts."""
    found = set()
    for parent, folders, files in os.walk(folder):
        names = [*files, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]
        if not folders and not files and Path(parent) != folder:
            names.append("")
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in names}
    return found
