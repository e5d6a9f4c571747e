"""All ranks of a server act on one decision, on machines that are alike; else none of them starts.

Schedulers of one node get the decision from their launcher, but another node's launcher resolves on its own,
with its own policy file, versions and GPUs. So every scheduler compares once, when it is built, over the CPU
process group that SGLang has for all tensor- and pipeline-parallel ranks (attention-DP ranks are among them):
no port of its own, and no cost later. Replicas (``--dp-size``) share no group and no cache; they start on one
node, from one launcher and its decision, which each of their ranks checks against what it sees.

A rank that must refuse still takes part, so that the others hear of it and stop too.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from ....policy.decide import Decision
from ....policy.facts import Facts
from .. import versions
from ..errors import PREFIX, RefusedError
from .server_facts import differences, running_facts

PATIENCE_S = 600
"""How long ranks wait for the last one. SGLang's start-up is full of collectives, so they leave it within
seconds of each other; this is only so that a rank that hangs is named. Unmeasured."""

_ALIKE = ("gpu_arch", "sglang", "sgl_kernel", "flashinfer", "fa3_binary", "batch_copy")
"""Machine facts that all ranks must share. Not the driver's version or the GPU's name: nodes may differ
there, and where a rule is about them the decisions differ and are found out."""

_EXPLAINING = frozenset({"because", "considered", "policy", "layer", "source"})
"""Keys of a decision that say why, not what: a policy file may have another name on another node."""

_OF_ONE_MACHINE = frozenset({"gpu_name", "driver", "cuda", "row_bytes"})
"""Facts of a decision that need not be equal; see `_ALIKE`. Uneven pipeline stages have rows of their own."""


@dataclass(frozen=True)
class Standing:
    """One rank's part of the comparison: plain data, small enough to be sent whole.

    Attributes:
        where: the rank and its host, for a person.
        plugin: version of this package.
        acts: what the rank's decision does, by dotted name.
        machine: the `_ALIKE` facts as the rank sees them; None for unknown.
        problem: why this rank refuses, or None.
    """

    where: str
    plugin: str
    acts: Mapping[str, object]
    machine: Mapping[str, object]
    problem: str | None


def alone(server_args: Any) -> bool:
    """Whether the scheduler of these arguments has no other rank to agree with."""
    config = versions.view(server_args)
    return bool(config.tp_size * config.pp_size == 1)


def agree(
    scheduler: Any, decision: Decision, refusal: Exception | None = None, *, patience_s: float = PATIENCE_S
) -> None:
    """Compare with the other ranks; every rank returns, or every rank raises the same message.

    Args:
        scheduler: built, so that its model runners, pools and process groups exist.
        decision: what this rank was told to do.
        refusal: why this rank must refuse whatever the others say.
        patience_s: seconds to wait for the others.

    Raises:
        RefusedError: a rank refuses, decisions or machines differ, or a rank does not answer.
    """
    mine = _standing(scheduler, decision, refusal)
    everybody = [mine] if alone(scheduler.server_args) else _gather(scheduler, mine, patience_s)
    problem = disagreement(everybody)
    if problem is not None:
        raise RefusedError(problem)


def disagreement(standings: Sequence[Standing]) -> str | None:
    """Why ranks that stand like this must not start, in one sentence; None if they may.

    A pure function, so that every rank comes to the same words.
    """
    refusing = [(each.where, each.problem) for each in standings if each.problem is not None]
    if refusing:
        where, problem = refusing[0]
        more = f" (and so do {len(refusing) - 1} more)" if len(refusing) > 1 else ""
        return problem if len(standings) == 1 else f"{where} refuses: {problem}{more}"
    first = standings[0]
    for other in standings[1:]:
        differing = [
            *_differing({"sglang-hicache-io": first.plugin}, {"sglang-hicache-io": other.plugin}),
            *_differing(first.machine, other.machine),
            *_differing(first.acts, other.acts),
        ]
        if differing:
            return (
                f"{other.where} would not do the same as {first.where}: {'; '.join(differing[:3])}. "
                "All ranks must act on one decision: give every node the same versions, policy and options"
            )
    return None


def _standing(scheduler: Any, decision: Decision, refusal: Exception | None) -> Standing:
    decided = Facts.from_dict(decision.facts)
    problem = None if refusal is None else str(refusal).removeprefix(f"{PREFIX}: ")
    machine: dict[str, object] = {}
    if refusal is None:
        try:
            running = running_facts(scheduler)
            machine = {name: running.value(name) for name in _ALIKE}
            problem = _contradiction(differences(decided, running))
        # Whatever it is, the other ranks wait for this one: it must tell them before it ends.
        except Exception as error:
            problem = f"the facts of this scheduler cannot be read: {error!r}"
    return Standing(
        where=f"rank {_rank(scheduler)} on {socket.gethostname()}",
        plugin=version("sglang-hicache-io"),
        acts={**_flat(decision.to_dict()), **_compared(decided)},
        machine=machine,
        problem=problem,
    )


def _contradiction(found: Sequence[str]) -> str | None:
    if not found:
        return None
    return (
        f"{'; '.join(found)}. Forwards would be fenced for another server than this: say what SGLang chose "
        "with its own options (such as --attention-backend), or start with --hicache-io-backend kernel"
    )


def _compared(facts: Facts) -> dict[str, object]:
    return {f"fact {name}": facts.value(name) for name in facts if name not in _OF_ONE_MACHINE}


def _flat(value: object, name: str = "") -> dict[str, object]:
    """What nested plain data says, by dotted name, without explanations and facts."""
    if isinstance(value, Mapping):
        found: dict[str, object] = {}
        for key, inner in value.items():
            if key not in _EXPLAINING and not (key == "facts" and not name):
                found.update(_flat(inner, f"{name}.{key}" if name else str(key)))
        return found
    if isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        return _flat({str(index): each for index, each in enumerate(value)}, name)
    return {name: value}


def _differing(here: Mapping[str, object], there: Mapping[str, object]) -> list[str]:
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [f"{name} is {_shown(there.get(name))}, not {_shown(here.get(name))}" for name in names]


def _shown(value: object) -> str:
    return "unknown" if value is None else str(value)


def _rank(scheduler: Any) -> int:
    return 0 if alone(scheduler.server_args) else int(scheduler.world_group.rank)


def _gather(scheduler: Any, mine: Standing, patience_s: float) -> list[Standing]:
    import torch.distributed as dist

    group = scheduler.world_group.cpu_group
    try:
        if dist.get_backend(group) == "gloo":  # the only backend whose barrier names who is missing
            dist.monitored_barrier(group, timeout=timedelta(seconds=patience_s), wait_all_ranks=True)
        everybody: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, mine, group=group)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RefusedError(
            f"{mine.where} does not start alone: not every rank answered ({reason}); look for the others' "
            f"first error{'' if mine.problem is None else f'. It would refuse by itself: {mine.problem}'}"
        ) from error
    return everybody
