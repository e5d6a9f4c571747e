"""``--hicache-io-backend`` and ``--hicache-io-policy`` on SGLang's command line, config file and Engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from ....policy.format.errors import PolicyError
from ...policy_files import load_policy
from ...registry import AUTO, UPSTREAM_NAMES, available_backends, unknown_backend
from .. import unsafe
from ..errors import RefusedError, exit_with
from ..handover.decision_handover import is_ours

ASKED_ATTRIBUTE = "_hicache_io_asked"
"""On ``ServerArgs``: an :class:`Asked`, or absent. Underscored names travel, unsealed."""


def refuse_unservable(name: str, problem: str | None) -> None:
    """Raises RefusedError if ``name`` is ours to serve and cannot be."""
    if not is_ours(name):
        return
    if problem is not None:
        raise RefusedError(problem)
    if name != AUTO and name not in available_backends():
        raise RefusedError(f"--hicache-io-backend: {unknown_backend(name)}")


def refuse_early(problem: str | None) -> None:
    """In a process that was started as SGLang's server: refuse a wrong name or file of ours now. Until SGLang
    parses it takes 5 s more, in which it imports its arguments.

    Raises:
        SystemExit: the server must not start; one line on standard error, status 2.
    """
    if parent_process() is not None or Path(sys.argv[0]).name not in _SERVERS:
        return
    refuse = _Refuse(problem)
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in refuse.of and (value := value if equals else following):
            refuse.of[option](value)


_SERVERS = ("sglang", "launch_server.py")


class _Refuse:
    """What argparse calls for the values of our options: it ends by itself, because argparse would print an
    ArgumentTypeError below 480 lines of usage.
    """

    def __init__(self, problem: str | None) -> None:
        self._problem = problem
        self.of: Mapping[str, Callable[[str], str]] = {
            "--hicache-io-backend": self.backend,
            "--hicache-io-policy": self.policy_file,
        }

    def backend(self, name: str) -> str:
        try:
            refuse_unservable(name, self._problem)
        except RefusedError as error:
            raise exit_with(error, 2) from None
        return name

    def policy_file(self, path: str) -> str:
        try:
            load_policy(path)
        except PolicyError as error:
            raise exit_with(RefusedError(f"--hicache-io-policy: {error}"), 2) from None
        return path


def extend_parser(problem: str | None) -> Callable[..., None]:
    """Hook after ``ServerArgs.add_cli_args``: our names beside SGLang's, and the policy option.

    Args:
        problem: why this SGLang cannot be served, if so: then any of our names is refused with it, at once.
    """
    refuse = _Refuse(problem)

    def hook(_result: object, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        action = next(a for a in parser._actions if "--hicache-io-backend" in a.option_strings)
        action.choices = [*(action.choices or UPSTREAM_NAMES), AUTO, *available_backends()]
        action.type = refuse.backend
        action.help = f"{action.help}. {AUTO} and what follows it: sglang-hicache-io"
        parser.add_argument(
            "--hicache-io-policy",
            type=refuse.policy_file,
            metavar="FILE",
            default=None,
            help="Policy file of sglang-hicache-io: which write-back backend, and which forwards wait "
            "for it. Default: $SGLANG_HICACHE_IO_POLICY, else the shipped policy.",
        )
        unsafe.add_arguments(parser)

    return hook


@dataclass(frozen=True)
class Asked:
    """What a person asked for beside SGLang's own fields.

    Attributes:
        policy: the policy file given as an option, or None.
        from_cli: the arguments came from a command line, so a refusal is a line and an exit status.
        experiment: which fences to leave out, if any.
    """

    policy: str | None = None
    from_cli: bool = False
    experiment: unsafe.Request = field(default_factory=unsafe.Request)


_asking: ContextVar[Asked | None] = ContextVar("hicache_io_asking", default=None)
"""While arguments are made: 0.5.18 resolves them in their constructor, before anything can be set on them."""


def asked(server_args: Any) -> Asked:
    """What was asked for with these arguments."""
    found = getattr(server_args, ASKED_ATTRIBUTE, None) or _asking.get()
    return found if isinstance(found, Asked) else Asked()


def _made(make: Callable[[], Any], what: Asked) -> Any:
    token = _asking.set(what)
    try:
        server_args = make()
    finally:
        _asking.reset(token)
    setattr(server_args, ASKED_ATTRIBUTE, what)
    return server_args


def around_from_cli_args(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hook around ``ServerArgs.from_cli_args``, which keeps declared fields only."""
    namespace = next(a for a in (*args, *kwargs.values()) if isinstance(a, argparse.Namespace))
    policy = getattr(namespace, "hicache_io_policy", None)
    what = Asked(policy, from_cli=True, experiment=unsafe.Request.of(vars(namespace)))
    return _made(lambda: original(*args, **kwargs), what)


def accept_engine_keywords(problem: str | None) -> None:
    """Let ``sglang.Engine(hicache_io_policy=...)`` and the like through: ``ServerArgs`` has no such field.

    ``Engine.__init__`` loads plug-ins and then calls ``self.server_args_class(**kwargs)``, so that is the
    place; the class itself stays what it is.
    """
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None:
        return
    engine = module.Engine
    original = engine.__dict__.get("server_args_class")
    if original is None or isinstance(original, staticmethod):
        return

    def make(*args: Any, **kwargs: Any) -> Any:
        policy = kwargs.pop("hicache_io_policy", None)
        experiment = unsafe.Request.taken_from(kwargs)
        refuse_unservable(kwargs.get("hicache_io_backend", UPSTREAM_NAMES[0]), problem)
        return _made(lambda: original(*args, **kwargs), Asked(policy, experiment=experiment))

    engine.server_args_class = staticmethod(make)
