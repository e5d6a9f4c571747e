"""What a whole SGLang command line resolves to, by SGLang's own code, in a process of its own.

Nothing is downloaded and nothing is loaded onto a device. SGLang asks the GPU while it resolves (backends,
page sizes); for an architecture that is given, the child gets a stand-in for what ``torch.cuda`` says of it.

``python -m sglang_hicache.io_backends.sglang.diagnose.dry_run`` is that child: it reads a request as JSON
from its standard input, and writes its answer to the file that the request names.
"""

from __future__ import annotations

import json
import os
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
from ..handover.machine_facts import detect
from ..pools.host_pools import HostPool
from .command_line import CommandLine, CommandLineError, read
from .programs import VARIABLES_OF_SGLANG

_MODULE = "sglang_hicache.io_backends.sglang.diagnose.dry_run"  # as a child it is __main__

TIMEOUT_S = 300
"""A resolution takes 6 to 10 s on two busy cores, most of it imports."""

_STAND_IN_BYTES = 80 * 2**30
"""Memory of the stand-in GPU. It sizes batches and pools, on which no fact rests."""

_MODELS = ("model_path", "tokenizer_path", "speculative_draft_model_path", "uno_lora_path", "lora_paths")
"""Arguments of SGLang that name a folder or a model of the hub (0.5.18 to 0.5.23)."""

_OF_A_MACHINE = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "HOME")
"""Variables by which a process finds what is installed: the server's say nothing of this machine."""

_NO_GPU = "No accelerator"
"""How SGLang's ``get_device`` says that it finds no GPU (0.5.18 to 0.5.23)."""


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
        pools: its host pools, which nobody is to write yet; see :mod:`..pools.prediction`.
        pools_unknown: why there are none, or None.
    """

    facts: Facts
    backend: str
    policy: str | None
    hicache: bool
    retraction: str | None = None
    offload: str | None = None
    pools: tuple[HostPool, ...] = ()
    pools_unknown: str | None = None


def server_facts_of(command_line: str, given: Mapping[str, FactValue] | None = None) -> Server:
    """Resolve ``command_line`` as the server would.

    Args:
        command_line: a text that `command_line.read` understands.
        given: facts that count instead of resolved and detected ones; of ``gpu_arch`` SGLang is told.

    Raises:
        CommandLineError: the text is not read, SGLang or this plug-in refuses it, a model's config.json is
            not here, or no GPU is here and no architecture was given.
        NameProblem: ``given`` holds a name that is no fact.
    """
    known: dict[str, Any] = {name: value for name, value in (given or {}).items() if value is not None}
    answer = _ask(read(command_line, os.environ), known.get("gpu_arch"))
    facts = {**Facts.from_dict(answer["facts"])}
    facts.update({name: fact for name, fact in Facts.given(**known).items() if fact.value is not None})
    return Server(
        Facts(facts),
        answer["backend"],
        answer["policy"],
        answer["hicache"],
        **answer["decode"],
        pools=tuple(HostPool.from_dict(each) for each in answer.get("pools", ())),
        pools_unknown=answer.get("pools_unknown"),
    )


def _ask(command: CommandLine, gpu_arch: FactValue) -> dict[str, Any]:
    """The child's answer. Raises CommandLineError."""
    from ..no_gpu import fake_libcuda

    with tempfile.TemporaryDirectory(prefix="hicache-io-") as scratch:
        answer = Path(scratch, "answer.json")
        request = {"argv": command.argv, "gpu_arch": gpu_arch, "answer": str(answer)}
        try:
            environment = {
                **_variables(command, fake_libcuda.environment(Path(scratch, "libcuda"))),
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


def _variables(command: CommandLine, of_child: Mapping[str, str]) -> dict[str, str]:
    """The child's: this machine's, without SGLang's own where the server has only what its text says."""
    found = {
        name: value
        for name, value in {**os.environ, **of_child}.items()
        if command.inherits or not name.startswith(VARIABLES_OF_SGLANG)
    }
    for name, value in command.variables.items():
        if name in _OF_A_MACHINE:
            continue
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found


def _child() -> None:
    """Resolve the request's arguments and write the answer: facts, or an error."""
    request = json.loads(sys.stdin.read())
    gpu_arch = request["gpu_arch"]
    if gpu_arch not in (None, "cpu"):
        stand_in_gpu(gpu_arch)
    server_args: Any = None
    try:
        answer, server_args = _resolved(request["argv"], gpu_arch)
    except SystemExit:
        raise  # argparse or the plug-in has said why
    except Exception as error:
        answer = {"error": _reason(request["argv"], error)}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    if answer.get("hicache"):
        # Apart, and after it: whatever happens to the pools, the facts are known.
        answer |= _pools(server_args)
        Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def resolve(argv: Sequence[str], gpu_arch: str | None) -> dict[str, Any]:
    """The child's answer, with the pools. For a process of its own; the GPU is stood in for by the caller."""
    answer, server_args = _resolved(argv, gpu_arch)
    return answer | _pools(server_args)


def _pools(server_args: Any) -> dict[str, Any]:
    """`Server.pools` and `Server.pools_unknown`."""
    from ..pools import prediction
    from ..pools.errors import ShortHostRowsError

    try:
        return {"pools": [pool.to_dict() for pool in prediction.predicted(server_args)]}
    except ShortHostRowsError as error:
        return {"pools_unknown": f"no server may start with them: {error}"}
    except prediction.UnknownPoolsError as error:
        return {"pools_unknown": f"SGLang's own code does not build them: {error}"}


def _resolved(argv: Sequence[str], gpu_arch: str | None) -> tuple[dict[str, Any], Any]:
    """The answer, and SGLang's resolved arguments."""
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
    answer = {
        "facts": facts.to_dict(),
        "backend": getattr(server_args, resolution.WANTED_ATTRIBUTE, None) or config.hicache_io_backend,
        "policy": options.asked(server_args).policy or os.environ.get(POLICY_VARIABLE),
        "hicache": resolution.hicache_in_use(config),
        "decode": _decode_writes(config, facts),
    }
    return answer, server_args


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
    missing = [each for each in _models(argv) if not _is_here(each[1])]
    named = [each for each in missing if each[1] in str(error)]
    if missing and (named or isinstance(error, OSError)):
        models = ", ".join(f"{model} ({option})" for option, model in named or missing)
        return f"config.json of the model {models} is not on this machine, and nothing is downloaded: {text}"
    return f"SGLang cannot resolve this: {text}"


def _models(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Every model that `argv` names, with its option, by SGLang's own parser."""
    import argparse

    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    merged = ConfigArgumentMerger(parser).merge_config_with_args(list(argv)) if "--config" in argv else argv
    given = vars(parser.parse_known_args(merged)[0])
    found = []
    for name in _MODELS:
        values = given.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            # --lora-paths takes PATH, NAME=PATH and JSON.
            path = value["lora_path"] if isinstance(value, dict) else value
            path = path.rpartition("=")[2] if name == "lora_paths" else path
            found.append((f"--{name.replace('_', '-')}", path))
    return found


def _is_here(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(model).exists() or isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # a folder that is not here
        return False


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
