"""What a whole SGLang command line resolves to, by SGLang's own code, in a process of its own.

Nothing is downloaded and nothing is loaded onto a device. SGLang asks the GPU while it resolves (backends,
page sizes); for an architecture that is given, the child gets a stand-in for what ``torch.cuda`` says of it.

``python -m sglang_hicache.io_backends.sglang.diagnose.dry_run`` is that child: it reads a request as JSON
from its standard input, and writes its answer to the file that the request names.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ....policy.fact_spec import FactValue
from ....policy.facts import Fact, Facts
from ....policy.format.load import POLICY_VARIABLE
from ....policy.names import NameProblem
from ..handover.machine_facts import detect

_MODULE = "sglang_hicache.io_backends.sglang.diagnose.dry_run"  # as a child it is __main__

TIMEOUT_S = 300
"""A resolution takes 6 to 10 s on two busy cores, most of it imports."""

_STAND_IN_BYTES = 80 * 2**30
"""Memory of the stand-in GPU. It sizes batches and pools, on which no fact rests."""

_NO_GPU = "No accelerator"
"""How SGLang's ``get_device`` says that it finds no GPU (0.5.18 to 0.5.23)."""


class CommandLineError(NameProblem):
    """A command line that cannot be resolved here; the message says why in one line."""


@dataclass(frozen=True)
class Server:
    """What a command line asks for.

    Attributes:
        facts: of the server, each with its source.
        backend: what ``--hicache-io-backend`` says, or SGLang's default.
        policy: the file that ``--hicache-io-policy`` or its variable names, or None.
        hicache: whether HiCache is in use at all.
        retraction, offload: what a PD decode server writes to the host for requests that it retracts, and of
            those that it decodes, and past which fence of SGLang, in a sentence; None where it does not.
    """

    facts: Facts
    backend: str
    policy: str | None
    hicache: bool
    retraction: str | None = None
    offload: str | None = None


def server_facts_of(command_line: str, given: Mapping[str, FactValue] | None = None) -> Server:
    """Resolve ``command_line`` as the server would.

    Args:
        command_line: SGLang's options, with or without ``sglang serve`` or ``python -m sglang.launch_server``
            and variables (``NAME=value``) before them.
        given: facts that count instead of resolved and detected ones; of ``gpu_arch`` SGLang is told.

    Raises:
        CommandLineError: SGLang or this plug-in refuses it, its model's config.json is not here, or no GPU is
            here and no architecture was given.
        NameProblem: ``given`` holds a name that is no fact.
    """
    known: dict[str, Any] = {name: value for name, value in (given or {}).items() if value is not None}
    variables, argv = split(command_line)
    answer = _ask(argv, variables, known.get("gpu_arch"))
    facts = {**Facts.from_dict(answer["facts"])}
    facts.update({name: fact for name, fact in Facts.given(**known).items() if fact.value is not None})
    return Server(Facts(facts), answer["backend"], answer["policy"], answer["hicache"], **answer["decode"])


def split(command_line: str) -> tuple[dict[str, str], list[str]]:
    """Variables before the command, and the options after it. Raises CommandLineError for open quotes."""
    try:
        words = shlex.split(command_line)
    except ValueError as error:
        raise CommandLineError(f"the command line cannot be read: {error}") from None
    variables = {}
    while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
        variables[found[1]] = found[2]
        words.pop(0)
    for command in (["-m", "sglang.launch_server"], ["sglang", "serve"]):
        for start in range(len(words) - 1):
            if [Path(words[start]).name, words[start + 1]] == command:
                return variables, words[start + 2 :]
    return variables, words


def _ask(argv: Sequence[str], variables: Mapping[str, str], gpu_arch: FactValue) -> dict[str, Any]:
    """The child's answer. Raises CommandLineError."""
    from ..no_gpu import fake_libcuda

    with tempfile.TemporaryDirectory(prefix="hicache-io-") as scratch:
        answer = Path(scratch, "answer.json")
        request = {"argv": list(argv), "gpu_arch": gpu_arch, "answer": str(answer)}
        try:
            environment = {
                **os.environ,
                **fake_libcuda.environment(Path(scratch, "libcuda")),
                **variables,
                # The model's configuration is read where it is; nothing is fetched to answer a question.
                **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
                **({"CUDA_VISIBLE_DEVICES": ""} if gpu_arch is not None else {}),
            }
            done = subprocess.run(
                [sys.executable, "-m", _MODULE],
                input=json.dumps(request),
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except fake_libcuda.NoCompilerError as error:
            raise CommandLineError(str(error)) from None
        except subprocess.TimeoutExpired:
            raise CommandLineError(f"SGLang did not resolve it within {TIMEOUT_S} s") from None
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if "facts" in found:
        return found
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
    raise CommandLineError(found.get("error") or said[-1])


def _child() -> None:
    """Resolve the request's arguments and write the answer: facts, or an error."""
    request = json.loads(sys.stdin.read())
    gpu_arch = request["gpu_arch"]
    if gpu_arch not in (None, "cpu"):
        stand_in_gpu(gpu_arch)
    try:
        answer = _resolved(request["argv"], gpu_arch)
    except SystemExit:
        raise  # argparse or the plug-in has said why
    except Exception as error:
        answer = {"error": _reason(request["argv"], error)}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _resolved(argv: Sequence[str], gpu_arch: str | None) -> dict[str, Any]:
    from sglang.srt.plugins import load_plugins

    from .. import versions
    from ..handover import server_facts
    from ..launcher import options, resolution

    resolution.explaining = True
    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(list(argv))
    versions.arguments().resolve_now(server_args)
    config = versions.view(server_args)
    device = str(config.device).partition(":")[0]
    facts = server_facts.resolved_facts(server_args, detect({"device": device, "gpu_arch": gpu_arch}))
    if gpu_arch is not None:
        told = f"{server_facts.RESOLVED}, told of gpu_arch {gpu_arch}"
        facts = Facts(
            {n: Fact(f.value, told) if f.source == server_facts.RESOLVED else f for n, f in facts.items()}
        )
    return {
        "facts": facts.to_dict(),
        "backend": getattr(server_args, resolution.WANTED_ATTRIBUTE, None) or config.hicache_io_backend,
        "policy": options.asked(server_args).policy or os.environ.get(POLICY_VARIABLE),
        "hicache": resolution.hicache_in_use(config),
        "decode": _decode_writes(config, facts),
    }


def _decode_writes(config: Any, facts: Facts) -> dict[str, str | None]:
    """`Server.retraction` and `Server.offload`.

    Retraction: ``backup_kv_cache`` of the unified radix cache calls the transfer engine itself, while the
    write fence is in the controller's ``start_writing``. Which backup it is, SGLang decides with the pool;
    this is ``resolve_decode_retraction_backup`` as far as the arguments and the kind of KV cache tell.
    Offload: its manager has a controller of its own, and the scheduler gives its fence to the radix cache's.
    """
    found: dict[str, str | None] = {"retraction": None, "offload": None}
    if config.disaggregation_mode != "decode":
        return found
    offload = bool(config.disaggregation_decode_enable_offload_kvcache)
    if offload:
        found["offload"] = (
            "--disaggregation-decode-enable-offload-kvcache writes through a controller of its own, to which "
            "SGLang's scheduler gives no write fence"
        )
    backup = config.disaggregation_decode_retraction_backup
    by_tensor = (
        offload
        or config.disaggregation_decode_enable_radix_cache
        or getattr(config, "dcp_size", 1) > 1
        or (config.enable_priority_scheduling and not config.disable_priority_preemption)
        or facts.value("kv_kind") != "mha"
    )
    if backup != "host_pool" and (backup is not None or by_tensor):
        return found
    who = "--disaggregation-decode-retraction-backup host_pool"
    if backup is None:
        who = "a decode server with an MHA KV cache, where nothing else is asked for,"
    fence = "past SGLang's write fence, which only start_writing has"
    if not config.enable_hierarchical_cache:
        fence += ", and which its scheduler sets only with --enable-hierarchical-cache"
    found["retraction"] = f"{who} backs up retracted requests in a host pool, {fence}"
    return found


def _reason(argv: Sequence[str], error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if _NO_GPU in text:
        return "SGLang asks the GPU while it resolves, and there is none here: add --gpu-arch, such as sm90"
    options = (pair for pair in itertools.pairwise(argv) if pair[0] in ("--model-path", "--model"))
    _, model = next(options, ("", ""))
    if model and isinstance(error, OSError) and not Path(model).is_dir():
        return f"config.json of the model {model} is not on this machine, and nothing is downloaded: {text}"
    return f"SGLang cannot resolve this: {text}"


def stand_in_gpu(gpu_arch: str) -> None:
    """Let torch.cuda say that eight GPUs of ``gpu_arch`` are here, so that SGLang resolves for them."""
    import torch

    digits = gpu_arch.removeprefix("sm").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    properties = SimpleNamespace(
        name=gpu_arch,
        major=major,
        minor=minor,
        total_memory=_STAND_IN_BYTES,
        multi_processor_count=132,
        is_integrated=False,
    )
    stand_in = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: gpu_arch,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (_STAND_IN_BYTES, _STAND_IN_BYTES),
    }
    for name, function in stand_in.items():
        setattr(torch.cuda, name, function)


if __name__ == "__main__":
    _child()
