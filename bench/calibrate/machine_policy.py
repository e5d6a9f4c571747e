"""The machine's layer of the policy, from what was measured on it: rules, their reasons, and the file.

Its rules are for servers in which the shipped policy makes no forward wait: by name of attention backend,
without speculative decoding. Where forwards wait, stalls count, not transfer times: the shipped rules stand.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...io_backends.policy_files import default_policy, policy_in_force
from ...io_backends.registry import BACKENDS
from ...policy.decide import decide
from ...policy.facts import Facts
from ...policy.format.layers import Policy
from ...policy.format.load import MACHINE_VARIABLE, POLICY_VARIABLE, default_machine_file
from ...policy.names import ATTENTION_BACKENDS, NO_SPECULATION
from ...policy.text import wrapped
from ..measure.results import CPU_WATERMARK
from ..policy_yaml import COLUMNS, as_yaml
from .calibration import Choice, Segment

HEADER = "Written by hicache-io calibrate. Do not edit: run it again.\n"
CPU_HEADER = f"NOT FOR USE: {CPU_WATERMARK}.\n"


class NotInstallableError(ValueError):
    """These rules must not become the machine's; the message says why."""


def machine_path() -> Path:
    """Where the machine's file is read from, whether or not it is there."""
    return Path(os.environ.get(MACHINE_VARIABLE) or default_machine_file())


def without_fences(policy: Policy, gpu_arch: str, kv_kind: str) -> tuple[str, ...]:
    """Attention backends with which no forward waits under ``policy``, in any layout and for any write."""
    found = []
    for name in ATTENTION_BACKENDS:
        decisions = (
            decide(
                policy,
                Facts.given(
                    attention_backend=name,
                    gpu_arch=gpu_arch,
                    device="cpu" if gpu_arch == "cpu" else "cuda",
                    kv_kind=kv_kind,
                    mem_layout=layout,
                    page_size=page_size,
                    speculative=NO_SPECULATION,
                ),
            )
            for layout in ("layer_first", "page_first")
            for page_size in (1, 16, 64)
        )
        if not any(decision.fences() for decision in decisions):
            found.append(name)
    return tuple(found)


def rules(
    found: Mapping[str, Sequence[Segment]],
    options: Mapping[str, Choice],
    environment: Mapping[str, Any],
    kv_kind: str,
) -> list[dict[str, Any]]:
    """Rules of a policy file.

    Args:
        found: segments by layout.
        options: of ``hybrid``, by name.
        environment: of the run (:func:`~..measure.environment.describe_environment`).
        kv_kind: of the model that was measured.
    """
    cpu = environment["ran_on"] == "CPU"
    arch = "cpu" if cpu else str(environment["gpu_arch"])
    attention = list(without_fences(default_policy(), arch, kv_kind))
    # The architecture too: which attention backends need a fence depends on it.
    where = {"device": ["cpu"]} if cpu else {"gpu_name": [environment["gpu"]]}
    where = {"gpu_arch": [arch], **where}
    made = []
    for layout, parts in found.items():
        # The longest entries first: each rule takes what those before it left, the last one everything.
        for part in sorted(parts, key=lambda each: -each.at_least):
            last = part == min(parts, key=lambda each: each.at_least)
            when = {
                **where,
                "kv_kind": [kv_kind],
                "mem_layout": [layout],
                "prefill_attention_backend": attention,
                "decode_attention_backend": attention,
                "speculative": [NO_SPECULATION],
                **({} if last else {"write_entry_bytes": f">={part.at_least}"}),
            }
            use: dict[str, Any] = {"backend": part.backend, "fence_forward": []}
            if chosen := _of(part.backend, options):
                use["options"] = {name: choice.value for name, choice in chosen.items()}
            made.append(
                {
                    "name": f"calibrated-{layout}-{part.backend}".replace("_", "-"),
                    "when": when,
                    "use": use,
                    "because": _because(part, last, options, environment),
                }
            )
    return made


def _because(part: Segment, last: bool, options: Mapping[str, Choice], environment: Mapping[str, Any]) -> str:
    text = [f"Measured end to end: {part.backend} is the fastest, or as fast with less SM work,"]
    if last:
        text.append("for all writes that no calibrated rule before this one takes.")
    else:
        spread = (
            f"{part.low:,} to {part.high:,} in single rounds" if part.low != part.high else "in every round"
        )
        text.append(f"from {part.at_least:,} bytes a copy to the host on ({spread}).")
    text += [
        f"{name} {choice.value}: the least that is as fast as any ({choice.low} to {choice.high})."
        for name, choice in _of(part.backend, options).items()
    ]
    text.append(f"{provenance(environment)}. Not measured: other models, contiguous device slots alone.")
    return " ".join(text)


def _of(backend: str, options: Mapping[str, Choice]) -> dict[str, Choice]:
    """Those of the measured options that the backend has."""
    known = {each.name for each in BACKENDS[backend].options or ()}
    return {name: choice for name, choice in options.items() if name in known}


def provenance(environment: Mapping[str, Any]) -> str:
    """Device, driver, date and command in one sentence."""
    if environment["ran_on"] == "CPU":
        device = f"{environment['cpu']} without a GPU ({CPU_WATERMARK})"
    else:
        device = f"{environment['gpu']}, driver {environment['driver']}, CUDA {environment['cuda']}"
    return f"{device}, torch {environment['torch']}, {environment['date']}, by `{environment['command']}`"


def to_yaml(made: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The file."""
    header = HEADER + (CPU_HEADER if environment["ran_on"] == "CPU" else "")
    comments = [comment for line in header.splitlines() for comment in wrapped(line, COLUMNS, "# ")]
    body = as_yaml({"version": 1, "extends": "default", "rules": list(made)})
    return "\n".join([*comments, body])


def check(text: str) -> Policy:
    """The policy in force if ``text`` were the machine's file.

    Raises:
        PolicyError: it is not valid, or takes protection away.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "machine.yaml"
        _write(path, text)
        with _environment({MACHINE_VARIABLE: str(path), POLICY_VARIABLE: ""}):
            return policy_in_force()


def install(text: str, path: Path, environment: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all; of a link, what it leads to.

    Raises:
        NotInstallableError: it was measured on a CPU and ``path`` is the machine's.
        OSError: it cannot be written.
    """
    if environment["ran_on"] != "GPU" and path.resolve() == machine_path().resolve():
        raise NotInstallableError(f"{path} is the machine's policy file: {CPU_WATERMARK}")
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _write(part, text)
    part.replace(path)


def _write(path: Path, text: str) -> None:
    """Write `text` for its owner alone to change, whatever the umask: the policy refuses other files."""
    path.touch(0o644)
    path.chmod(0o644)
    path.write_text(text, encoding="utf-8")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
