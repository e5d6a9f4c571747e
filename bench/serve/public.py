"""SGLang's own ``python -m sglang.benchmark.serving`` against the servers of a cell: others know it.

It takes a tokenizer, and with more than one turn a chat template and servers that have a tokenizer too. Where
something is missing, :func:`missing` says what.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...policy.names import check_name
from .load import Loaded, RequestResult


@dataclass(frozen=True)
class Public:
    """One call of it.

    Attributes:
        name: of the workload here.
        turns: of each conversation.
        says: what it asks.
    """

    name: str
    turns: int
    says: str

    def args(self, pool_tokens: int, seed: int) -> list[str]:
        """Its options: system prompts that together are 1.5 times the device pool, 4 prompts for each."""
        system = min(4096, pool_tokens // 16)
        groups = max(4, int(1.5 * pool_tokens / system))
        return [
            *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(groups)),
            *("--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", str(system)),
            *("--gsp-question-len", str(max(8, system // 16)), "--gsp-output-len", str(max(4, system // 32))),
            *("--gsp-num-turns", str(self.turns), "--num-prompts", str(4 * groups)),
            *("--max-concurrency", str(max(2, min(16, pool_tokens // system))), "--seed", str(seed)),
        ]


_MADE = (
    Public("gsp", 1, "SGLang's generated-shared-prefix"),
    Public("gsp-turns", 4, "SGLang's generated-shared-prefix, 4 turns"),
)
NAMES = tuple(each.name for each in _MADE)


def public(name: str) -> Public:
    """The one of that name.

    Raises:
        NameProblem: there is none.
    """
    check_name("workload", name, NAMES)
    return next(each for each in _MADE if each.name == name)


def missing(model: str, turns: int) -> str | None:
    """What it lacks for this model and so many turns, in a few words; None when all is there."""
    for module in ("pandas", "datasets", "transformers"):
        if find_spec(module) is None:
            return f"{module} is not installed"
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # OSError, ValueError, ImportError and more, by what is missing
        return f"the model has no tokenizer ({type(error).__name__})"
    if turns > 1 and not getattr(tokenizer, "chat_template", None):
        return "the model's tokenizer has no chat template"
    return None


def run(url: str, model: str, what: Public, pool_tokens: int, seed: int, limit_s: float) -> Loaded:
    """Run it against the server at ``url``.

    Raises:
        OSError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="hicache-public-") as scratch:
        out, log = Path(scratch, "out.jsonl"), Path(scratch, "log")
        began = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command(url, model, what, pool_tokens, seed, out),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # It keeps what it generates there, and must generate it for each seed and tokenizer alike.
                env={**os.environ, "HOME": scratch},
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return Loaded((), time.monotonic() - began, 0.0, cut=True)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status or not out.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise OSError(f"sglang.benchmark.serving ended with status {status}: {' | '.join(tail)}")
        return loaded(what.name, json.loads(out.read_text(encoding="utf-8").splitlines()[-1]))


def loaded(name: str, result: Mapping[str, Any]) -> Loaded:
    """Its result as the others': what the server had seen before is not known of its requests."""
    asked = []
    columns = ("input_lens", "output_lens", "ttfts", "itls", "errors", "cached_tokens_details")
    for number, (prompt, output, ttft, gaps, error, cached) in enumerate(
        zip(*(result[column] for column in columns), strict=True)
    ):
        found = cached or {}
        one = RequestResult(
            name,
            number,
            0,
            int(prompt),
            0,
            output_tokens=int(output),
            device_tokens=int(found.get("device", 0)),
            host_tokens=int(found.get("host", 0)),
            first_token_s=float(ttft),
            seconds=float(ttft) + sum(gaps),
            gaps_s=tuple(gaps),
            error=error or None,
        )
        asked.append(one)
    return Loaded(tuple(asked), float(result["duration"]), 0.0)


def command(url: str, model: str, what: Public, pool_tokens: int, seed: int, out: Path) -> list[str]:
    """The command that runs it against the server at ``url`` and appends its result to ``out``."""
    backend = "sglang-oai-chat" if what.turns > 1 else "sglang"
    return [
        *(sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend, "--base-url", url),
        *("--model", model, "--tokenizer", model, "--cache-report", "--disable-tqdm"),
        *("--output-file", str(out), "--output-details"),
        *what.args(pool_tokens, seed),
    ]
