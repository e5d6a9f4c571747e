"""Everything that is said about one decision: why, what else was looked at, who waits, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ...io_backends.sglang.diagnose import serving
from ...io_backends.sglang.pools.host_pools import HostPool, assigned
from ...policy import sentences
from ...policy.cost import cost
from ...policy.decide import Decision, decide
from ...policy.facts import Facts
from ...policy.format.layers import Policy
from ...policy.unfenced import lost_here
from .pool_rows import of_its_share


@dataclass(frozen=True)
class Explanation:
    """A decision with the policy and the facts that it was made from, and what a server would make of it.

    ``refused`` says why a server would not start, ``fallback`` who copies a pool that a chosen backend
    cannot; ``lost`` names the forwards that a file of the user lets run which wait without it. ``pools`` are
    the server's host pools, with who writes each; ``pools_unknown`` says why there are none.
    """

    policy: Policy
    facts: Facts
    decision: Decision
    refused: str | None
    fallback: str | None
    lost: tuple[str, ...]
    pools: tuple[HostPool, ...] = ()
    pools_unknown: str | None = None

    @classmethod
    def of(
        cls,
        policy: Policy,
        facts: Facts,
        *,
        backend: str,
        pools: tuple[Sequence[HostPool], str | None] = ((), None),
    ) -> Self:
        """Decide as ``--hicache-io-backend backend`` would. Raises NameProblem for an unknown name.

        Args:
            pools: the server's, and why there are none.
        """
        decision = decide(policy, facts, backend=backend)
        return cls(
            policy,
            facts,
            decision,
            serving.refusal(decision, facts, backend=backend),
            serving.fallback(decision, facts, backend=backend),
            lost_here(policy, facts, backend=backend),
            assigned(pools[0], decision),
            pools[1],
        )

    def cost(self) -> list[dict[str, Any]]:
        """What each route costs, of the bytes that it moves."""
        return of_its_share(cost(self.decision, self.facts), self.pools)

    def careful(self) -> str | None:
        """What rests on unknown facts, or None."""
        return sentences.unknown_note(self.decision)

    def to_dict(self) -> dict[str, Any]:
        """`Decision.to_dict` and the rest, plain JSON types."""
        return {
            **self.decision.to_dict(),
            "fences": sentences.fence_sentence(self.decision, self.policy.backends),
            "forwards": sentences.forward_sentences(self.decision, self.facts, self.policy.backends),
            "cost": self.cost(),
            "pools": [pool.to_dict() for pool in self.pools],
            "pools_unknown": self.pools_unknown,
            "gpu_memory": sentences.memory_sentence(self.decision, self.policy.backends),
            "undecided": list(self.decision.might_match()),
            "refused": self.refused,
            "fallback": self.fallback,
            "lost": list(self.lost),
            "doubts": self.facts.doubts(),
            "other_pools": serving.other_pools(self.decision, self.facts),
        }
