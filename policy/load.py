"""A policy file to a checked `Policy`, or one clear error: ``FILE:LINE:COL: message (did you mean 'x'?)``.

ruamel.yaml's round-trip loader keeps the place of every key and value (`yaml_text`); pydantic checks the
values (`schema`); `wording` joins the two; `layers` puts a file over what it extends. Only the first problem
of a file is reported: the next is often its consequence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from sglang_hicache.policy.errors import PolicyError
from sglang_hicache.policy.fields import DEFAULT, Step
from sglang_hicache.policy.layers import (
    DEFAULT_RULE,
    MACHINE,
    SHIPPED,
    USER,
    Origin,
    Policy,
    RuleProblem,
    combine,
)
from sglang_hicache.policy.protection import unprotected
from sglang_hicache.policy.schema import PolicyFile
from sglang_hicache.policy.wording import first_problem
from sglang_hicache.policy.yaml_text import Plain, parse, place

#: Names a policy file when ``--hicache-io-policy`` and ``hicache-io --policy`` do not.
POLICY_VARIABLE = "SGLANG_HICACHE_IO_POLICY"
#: Names the machine file, which `hicache-io calibrate` writes; set but empty: there is none.
MACHINE_VARIABLE = "SGLANG_HICACHE_IO_MACHINE_POLICY"

_ErrorAt = Callable[[str, tuple[Step, ...]], PolicyError]


def policy_in_force(path: str | os.PathLike[str] | None = None) -> Policy:
    """The policy of the file at `path`; without one, of the file that the variable SGLANG_HICACHE_IO_POLICY
    names; without either, the shipped default with the machine file over it. Raises PolicyError.
    """
    if path is None:
        path = os.environ.get(POLICY_VARIABLE) or None  # set but empty counts as not set
    return _without_user() if path is None else load_policy(path)


@cache
def default_policy() -> Policy:
    """The policy that this package ships."""
    text = files("sglang_hicache.policy").joinpath("default.yaml").read_text(encoding="utf-8")
    return _build(text, "default.yaml", SHIPPED, ())


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


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at `path`. Raises PolicyError, also for a file that cannot be read."""
    name = os.fspath(path)
    return _build(_read(name), name, USER, (Path(name).resolve(),))


def load_policy_text(text: str, filename: str) -> Policy:
    """The policy written in `text`; `filename` is what errors call it, and where ``extends`` starts from.
    Raises PolicyError.
    """
    return _build(text, filename, USER, (Path(filename).resolve(),))


def _without_user() -> Policy:
    """The shipped default, with the machine file over it if there is one. Raises PolicyError."""
    path = machine_file()
    if path is None:
        return default_policy()
    name = str(path)
    policy = _build(_read(name), name, MACHINE, (path.resolve(),))
    for rule, why in unprotected(policy):
        origin = policy.origins[rule]
        if origin.layer == MACHINE:
            # A person may do without the shipped protection; what a program measured for speed may not.
            advice = (
                "a machine file must not (a rule of a shipped one's name takes that one's place, behind "
                "the rules for safety)"
            )
            raise PolicyError(name, f"{why}; {advice}", line=origin.line, column=origin.column)
    return policy


def _read(name: str) -> str:
    if not name:  # an unset shell variable; as a path it would be the current directory
        raise PolicyError("policy file", "the name is empty")
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PolicyError(name, "there is no such file") from None
    except IsADirectoryError:
        raise PolicyError(name, "is a directory, not a policy file") from None
    except UnicodeDecodeError as error:
        raise PolicyError(name, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PolicyError(name, f"cannot be read: {error.strerror}") from None


def _build(text: str, filename: str, layer: str, through: tuple[Path, ...]) -> Policy:
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
        file = PolicyFile.model_validate(plain)
    except ValidationError as error:
        raise first_problem(error, tree, filename) from None

    def error_at(message: str, path: tuple[Step, ...]) -> PolicyError:
        line, column = place(tree, path)
        return PolicyError(filename, message, line=line, column=column)

    if layer == MACHINE and file.extends != DEFAULT:
        raise error_at(
            "a machine file must say 'extends: default': it adds to the shipped rules", ("extends",)
        )
    base = _base(file, filename, layer, through, error_at)
    origins = {
        rule.name: Origin(layer, filename, *place(tree, ("rules", index, "name")))
        for index, rule in enumerate(file.rules)
    }
    if file.default is not None:
        origins[DEFAULT_RULE] = Origin(layer, filename, *place(tree, ("default",), key=True))
    try:
        return combine(file, SHIPPED if layer == SHIPPED else filename, origins, base)
    except RuleProblem as error:
        raise error_at(str(error), error.path) from None


def _base(
    file: PolicyFile, filename: str, layer: str, through: tuple[Path, ...], error_at: _ErrorAt
) -> Policy | None:
    """What `file` extends, or None."""
    if file.extends is None:
        return None
    if file.extends == DEFAULT:
        return default_policy() if layer == MACHINE else _without_user()
    path = Path(filename).parent / file.extends
    if path.resolve() in through:
        names = " -> ".join(each.name for each in (*through[through.index(path.resolve()) :], path))
        raise error_at(f"extends goes round in a circle: {names}", ("extends",))
    try:
        text = _read(str(path))
    except PolicyError as error:
        raise error_at(f"extends '{file.extends}': {error.message}", ("extends",)) from None
    return _build(text, str(path), layer, (*through, path.resolve()))
