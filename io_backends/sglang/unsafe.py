"""``--hicache-io-unsafe-fences``: leave fences out on purpose, to reproduce the crash that they prevent.

For experiments only, and refused without ``--i-know-this-corrupts``. What stays in place:

- ``none``: D2H waits for the scheduler's stream only, as in SGLang before 0.5.23; no forward waits for D2H;
- ``producer``: D2H waits for the forward that writes its rows, and no forward waits for D2H;
- ``both``: all that the decision asks for; the control, run with the same option.

These are experiments A, B and C of https://github.com/sgl-project/sglang/pull/20611. Host-to-device loads
keep SGLang's own fences. Without the option nothing of this is on the path of a write.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...policy.decide import Decision
from ...policy.log import logger_of
from .errors import RefusedError

logger = logger_of(__name__)

OPTION = "--hicache-io-unsafe-fences"
CONFIRM = "--i-know-this-corrupts"
CHOICES = ("none", "producer", "both")

NULL = "null"
"""A third-party backend of benchmarks that copies nothing: refused without the same confirmation."""

_KEY = "unsafe_fences"
"""In the dict of the decision that travels to the schedulers, and in ``/server_info``."""

_MEANS = {
    "none": "D2H waits for no forward, and no forward waits for D2H",
    "producer": "no forward waits for D2H",
    "both": "all fences of the decision are in place, as the control",
}


@dataclass(frozen=True)
class Request:
    """What a person typed: which fences stay (None: nothing was asked for), and whether they know."""

    fences: str | None = None
    confirmed: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """From options by the names that ``argparse`` and ``sglang.Engine`` give them."""
        return cls(options.get("hicache_io_unsafe_fences"), bool(options.get("i_know_this_corrupts")))

    @classmethod
    def taken_from(cls, keywords: dict[str, Any]) -> Request:
        """As ``of``, and they are gone from ``keywords``: SGLang does not know them."""
        names = ("hicache_io_unsafe_fences", "i_know_this_corrupts")
        return cls.of({name: keywords.pop(name, None) for name in names})

    def check(self, backend: str | None, *, served: bool) -> None:
        """Raises RefusedError unless this is complete, and there are fences of ours to leave out.

        Args:
            backend: ``--hicache-io-backend``.
            served: whether this plug-in serves the write-back of the server.
        """
        if backend == NULL and not self.confirmed:
            raise RefusedError(
                f"--hicache-io-backend {NULL} copies nothing, so that what comes back from the host is "
                f"rubbish; say {CONFIRM} too if that is what you want, and never serve users with it"
            )
        if self.fences is None:
            if self.confirmed and backend != NULL:
                raise RefusedError(f"{CONFIRM} confirms {OPTION}, which is not given; leave it out")
            return
        if self.fences not in CHOICES:
            raise RefusedError(f"{OPTION} {self.fences!r}: choose from {', '.join(CHOICES)}")
        if not self.confirmed:
            raise RefusedError(
                f"{OPTION} {self.fences} is an experiment that corrupts KV cache or crashes "
                f"({_MEANS[self.fences]}); say {CONFIRM} too if that is what you want, and never serve users "
                "with it"
            )
        if not served:
            raise RefusedError(
                f"{OPTION} has no say over --hicache-io-backend {backend} here: it needs HiCache "
                "(--enable-hierarchical-cache) and a backend of this plug-in, such as fenced_kernel"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two options, beside SGLang's own."""
    parser.add_argument(
        OPTION,
        choices=CHOICES,
        default=None,
        help="EXPERIMENT, CORRUPTS: which fences of sglang-hicache-io stay in place. Refused without "
        f"{CONFIRM}.",
    )
    parser.add_argument(CONFIRM, action="store_true", help=f"Confirms {OPTION}.")


def check_decision(decision: Decision, asked_for: str) -> None:
    """Raises RefusedError if a policy chose what only a person may."""
    if asked_for != NULL and NULL in {route.backend for route in decision.routes}:
        raise RefusedError(f"rule {decision.rule!r} chooses backend {NULL}, which copies nothing")


def applied(decision: Decision, fences: str | None) -> Decision:
    """``decision`` with the forward fences that ``fences`` leaves in place; itself when it is None.

    The rule's name says so: ranks compare it, so that none runs the experiment alone.
    """
    if fences is None:
        return decision
    rule = f"{OPTION} {fences}, else {decision.rule}"
    because = f"UNSAFE EXPERIMENT, {_MEANS[fences]}. {decision.because}"
    if fences == "both":
        return replace(decision, rule=rule, because=because)
    routes = tuple(replace(route, fence_forward=()) for route in decision.routes)
    return replace(decision, rule=rule, because=because, fence_forward=(), routes=routes)


def to_carry(decision: Decision, fences: str | None) -> dict[str, Any]:
    """What travels to the schedulers."""
    return decision.to_dict() if fences is None else {**decision.to_dict(), _KEY: fences}


def carried(data: Mapping[str, Any]) -> str | None:
    """The fences that an experiment leaves in place, from what has travelled; None without one."""
    return data.get(_KEY)


def keeps_producer_fence(fences: str | None) -> bool:
    """Whether write-back still waits for forwards."""
    return fences != "none"


def leave_out_sglangs(controller: Any, fences: str | None) -> None:
    """Take SGLang 0.5.23's own producer fence away too: with it the experiment would show nothing."""
    if not keeps_producer_fence(fences) and hasattr(controller, "write_fence_stream"):
        controller.write_fence_stream = None


def warn(fences: str | None) -> None:
    """Say it in the log of every scheduler."""
    if fences is not None:
        logger.warning(
            "hicache-io: %s %s: UNSAFE EXPERIMENT, %s. Outputs may be wrong and the GPU may fault",
            OPTION,
            fences,
            _MEANS[fences],
        )


def summary(fences: str | None) -> dict[str, Any]:
    """For ``/server_info``: nothing without an experiment."""
    return {} if fences is None else {_KEY: fences}
