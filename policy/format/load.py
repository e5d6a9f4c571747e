"""A policy file to a checked `Policy`, or one clear error: ``FILE:LINE:COL: message (did you mean 'x'?)``.

ruamel.yaml's round-trip loader keeps the place of every key and value (`yaml_positions`); pydantic checks
the values (`schema`); `validation_errors` joins the two; `layers` puts a file over what it extends. Only the
first problem of a file is reported: the next is often its consequence.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from ..backend_spec import Backends
from ..classes import CannotCompareError
from ..text import code_point, unsafe_character
from ..unfenced import in_words, losses
from .errors import PolicyError
from .layers import (
    DEFAULT_RULE,
    MACHINE,
    SHIPPED,
    USER,
    Origin,
    Policy,
    RuleProblem,
    combine,
)
from .schema import PolicyFile
from .validation_errors import first_problem
from .validators import DEFAULT, PathStep
from .yaml_positions import Plain, parse, place

#: Names a policy file when ``--hicache-io-policy`` and ``hicache-io --policy`` do not.
POLICY_VARIABLE = "SGLANG_HICACHE_IO_POLICY"
#: Names the machine file, which `hicache-io calibrate` writes; set but empty: there is none.
MACHINE_VARIABLE = "SGLANG_HICACHE_IO_MACHINE_POLICY"

#: Twenty times the shipped policy, and a second to read.
MOST_BYTES = 256 * 1024

_ErrorAt = Callable[[str, tuple[PathStep, ...]], PolicyError]


def policy_in_force(backends: Backends, path: str | os.PathLike[str] | None = None) -> Policy:
    """The policy of the file at `path`; without one, of the file that the variable SGLANG_HICACHE_IO_POLICY
    names; without either, the shipped default with the machine file over it. Raises PolicyError.
    """
    if path is None:
        path = os.environ.get(POLICY_VARIABLE) or None  # set but empty counts as not set
    return _without_user(backends) if path is None else load_policy(backends, path)


@cache
def default_policy(backends: Backends) -> Policy:
    """The policy that this package ships."""
    text = files("sglang_hicache.policy").joinpath("default.yaml").read_text(encoding="utf-8")
    return _build(text, "default.yaml", SHIPPED, (), backends)


def machine_file() -> Path | None:
    """Where the machine file is: the variable SGLANG_HICACHE_IO_MACHINE_POLICY names it, or none if that is
    empty; without the variable, ``sglang-hicache-io/machine.yaml`` in the user's configuration directory, if
    it is there.
    """
    named = os.environ.get(MACHINE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    found = default_machine_file()
    return found if found.exists() else None


def default_machine_file() -> Path:
    """The machine file's place without the variable: by the XDG base directory specification,
    ``$XDG_CONFIG_HOME`` and else ``~/.config``.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home) / "sglang-hicache-io" / "machine.yaml"


def load_policy(backends: Backends, path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at `path`. Raises PolicyError, also for a file that cannot be read."""
    name = os.fspath(path)
    return _build(_read(name), name, USER, (Path(name).resolve(),), backends)


def load_policy_text(backends: Backends, text: str, filename: str) -> Policy:
    """The policy written in `text`; `filename` is what errors call it, and where ``extends`` starts from.
    Raises PolicyError.
    """
    return _build(text, filename, USER, (Path(filename).resolve(),), backends)


def _without_user(backends: Backends) -> Policy:
    """The shipped default, with the machine file over it if there is one. Raises PolicyError."""
    path = machine_file()
    if path is None:
        return default_policy(backends)
    name = str(path)
    policy = _build(_read(name, trusted=True), name, MACHINE, (path.resolve(),), backends)
    # A person may do without a fence; what a program measured for speed may not.
    try:
        loss = next(losses(default_policy(backends), policy), None)
    except CannotCompareError as error:
        raise PolicyError(
            name, f"whether this machine file takes a fence away cannot be decided: {error}; write it simpler"
        ) from None
    if loss is not None:
        origin = policy.origins[loss.rule]
        advice = (
            "a machine file must not: list these forwards in fence_forward (uses, where when names the "
            "attention backends), also for copy_engine, or narrow when to servers and writes without that "
            "fence; what you decide yourself belongs in a policy file of yours"
        )
        message = f"{in_words([loss], default_policy(backends))}; {advice}"
        raise PolicyError(name, message, line=origin.line, column=origin.column)
    return policy


def _read(name: str, *, trusted: bool = False) -> str:
    """The text of file `name`. With `trusted`, only of a file that nobody else can write."""
    if not name:  # an unset shell variable; as a path it would be the current directory
        raise PolicyError("policy file", "the name is empty")
    if (found := unsafe_character(name)) is not None:
        raise PolicyError(name, f"the file's name has the character {code_point(found)}")
    try:
        # A pipe in the place of a trusted file has nobody at its other end: it is refused, not waited for.
        flags = os.O_NONBLOCK if trusted else 0
        with open(name, "rb", opener=lambda path, mode: os.open(path, mode | flags)) as stream:
            if trusted:
                _check_owner(name, os.fstat(stream.fileno()))
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise PolicyError(name, f"is larger than {MOST_BYTES // 1024} KiB, which no policy is")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise PolicyError(name, "there is no such file") from None
    except IsADirectoryError:
        raise PolicyError(name, "is a directory, not a policy file") from None
    except UnicodeDecodeError as error:
        raise PolicyError(name, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PolicyError(name, f"cannot be read: {error.strerror}") from None


def _check_owner(name: str, status: os.stat_result) -> None:
    """Refuse a file that others could have written, as ssh does: it decides what a server runs."""
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(name, "is not a regular file, as a machine file must be")
    me, quoted = os.geteuid(), shlex.quote(name)
    if status.st_uid not in (0, me):
        raise PolicyError(
            name,
            f"is owned by user {status.st_uid}, who is neither root nor the user that reads it ({me}), and "
            f"could change it: chown {me} {quoted}",
        )
    others = [
        who for who, bit in (("its group", stat.S_IWGRP), ("everybody", stat.S_IWOTH)) if status.st_mode & bit
    ]
    if others:
        raise PolicyError(
            name, f"can be written by {' and '.join(others)}, not by its owner alone: chmod go-w {quoted}"
        )


def _build(text: str, filename: str, layer: str, through: tuple[Path, ...], backends: Backends) -> Policy:
    """The policy written in `text`, over what it extends. `through` are the files that led here, this one
    last.
    """
    tree = parse(text, filename)
    if tree is None:
        raise PolicyError(filename, "is empty; a policy has version, rules and default", line=1, column=1)
    if not isinstance(tree, dict):
        raise PolicyError(filename, "is not a mapping with version, rules and default", line=1, column=1)
    plain = Plain(tree, filename).convert(tree, ())
    try:
        file = PolicyFile.model_validate(plain, context=backends)
    except ValidationError as error:
        raise first_problem(error, tree, filename) from None

    def error_at(message: str, path: tuple[PathStep, ...]) -> PolicyError:
        line, column = place(tree, path)
        return PolicyError(filename, message, line=line, column=column)

    if layer == MACHINE and file.extends != DEFAULT:
        raise error_at(
            "a machine file must say 'extends: default': it adds to the shipped rules", ("extends",)
        )
    base = _base(file, filename, layer, through, error_at, backends)
    origins = {
        rule.name: Origin(layer, filename, *place(tree, ("rules", index, "name")))
        for index, rule in enumerate(file.rules)
    }
    if file.default is not None:
        origins[DEFAULT_RULE] = Origin(layer, filename, *place(tree, ("default",), key=True))
    try:
        policy = combine(file, SHIPPED if layer == SHIPPED else filename, origins, base, backends)
    except RuleProblem as error:
        raise error_at(str(error), error.path) from None
    if layer == SHIPPED:
        return policy
    # Other files of the user are of this layer, too.
    below = base if file.extends == DEFAULT else base.below if base else default_policy(backends)
    return replace(policy, below=below)


def _base(
    file: PolicyFile,
    filename: str,
    layer: str,
    through: tuple[Path, ...],
    error_at: _ErrorAt,
    backends: Backends,
) -> Policy | None:
    """What `file` extends, or None."""
    if file.extends is None:
        return None
    if file.extends == DEFAULT:
        return default_policy(backends) if layer == MACHINE else _without_user(backends)
    path = Path(filename).parent / file.extends
    if path.resolve() in through:
        names = " -> ".join(each.name for each in (*through[through.index(path.resolve()) :], path))
        raise error_at(f"extends goes round in a circle: {names}", ("extends",))
    try:
        text = _read(str(path))
    except PolicyError as error:
        raise error_at(f"extends '{file.extends}': {error.message}", ("extends",)) from None
    return _build(text, str(path), layer, (*through, path.resolve()), backends)
