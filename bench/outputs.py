"""Where a command writes: what it was asked for on standard output, all else on standard error, files where
they can be written.

A file that cannot be written is found before the work: hours of load must not end in a typo.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from ..policy.terminal import console
from ..policy.text import say


def refuse(why: str) -> NoReturn:
    """End with exit status 2 and one line on standard error."""
    say(why)
    raise typer.Exit(2)


def result_console(as_json: bool, *, columns: int | None = None) -> Console:
    """Where a result is printed for people: standard output, but that is the JSON's if that was asked for."""
    return console(stderr=as_json, columns=columns)


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written; nothing of it is left behind. Its folder must be there.

    Args:
        option: what names it, for the message.
        path: None for an option that was not given.
    """
    if path is None:
        return
    if path.is_dir():
        refuse(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        refuse(f"{option} {path}: there is no folder {path.parent}")
    existed = path.exists()
    if existed and not path.is_file():
        # A pipe or a terminal: opening it could wait for a reader.
        if not os.access(path, os.W_OK):
            refuse(f"{option} {path}: cannot be written")
        return
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.resolve().unlink()  # of a link that led nowhere, what it leads to now
    except OSError as error:
        refuse(f"{option} {path}: cannot be written: {error.strerror}")


def check_folder(option: str, path: Path | None) -> None:
    """Make a folder for results, with those above it, or refuse it.

    Args:
        option: what names it, for the message.
        path: None for an option that was not given.
    """
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        refuse(f"{option} {path}: is a file; name a folder")
    except NotADirectoryError:
        refuse(f"{option} {path}: a folder above it is a file")
    except OSError as error:
        refuse(f"{option} {path}: cannot be written: {error.strerror}")
