"""Everything that is said about one decision: why, what else was looked at, who waits, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ...io_backends.sglang.diagnose import serving
from ...policy import sentences
from ...policy.cost import cost
from ...policy.decide import Decision, decide
from ...policy.facts import Facts
from ...policy.format.layers import Policy
from ...policy.unfenced import lost_here


@dataclass(frozen=True)
class Explanation:
    """A decision with the policy and the facts that it was made from, and what a server would make of it.

    ``refused`` says why a server would not start, ``fallback`` who copies a pool that a chosen backend
    cannot; ``lost`` names the forwards that a file of the user lets run which wait without it.
    """

    policy: Policy
    facts: Facts
    decision: Decision
    refused: str | None
    fallback: str | None
    lost: tuple[str, ...]

    @classmethod
    def of(cls, policy: Policy, facts: Facts, *, backend: str) -> Self:
        """Decide as ``--hicache-io-backend backend`` would. Raises NameProblem for an unknown name."""
        decision = decide(policy, facts, backend=backend)
        return cls(
            policy,
            facts,
            decision,
            serving.refusal(decision, facts, backend=backend),
            serving.fallback(decision, facts, backend=backend),
            lost_here(policy, facts, backend=backend),
        )

    def careful(self) -> str | None:
        """What rests on unknown facts, or None."""
        return sentences.unknown_note(self.decision, self.policy, self.facts)

    def to_dict(self) -> dict[str, Any]:
        """`Decision.to_dict` and the rest, plain JSON types."""
        return {
            **self.decision.to_dict(),
            "fences": sentences.fence_sentence(self.decision, self.policy.backends),
            "forwards": sentences.forward_sentences(self.decision, self.facts, self.policy.backends),
            "cost": cost(self.decision, self.facts),
            "gpu_memory": sentences.memory_sentence(self.decision, self.policy.backends),
            "undecided": list(sentences.might_match(self.decision, self.policy, self.facts)),
            "refused": self.refused,
            "fallback": self.fallback,
            "lost": list(self.lost),
            "other_pools": serving.other_pools(self.decision),
        }
