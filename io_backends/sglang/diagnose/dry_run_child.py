"""The process of a dry run: SGLang resolves the arguments of a command line there (see `dry_run`).

``python -m sglang_hicache.io_backends.sglang.diagnose.dry_run_child`` reads a request as JSON from its
standard input, and writes its answer to the file that the request names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ....policy.facts import Fact, Facts
from ....policy.format.load import POLICY_VARIABLE
from ....policy.names import nearest, with_hint
from ..handover.machine_facts import detect
from ..no_gpu.stand_in_gpu import stand_in_gpu
from . import gpu_memory
from .command_line import CommandLineError
from .dry_run import OF_POLICIES, ONLY_CONFIG
from .pool_sizes import sizing

_MODELS = ("model_path", "tokenizer_path", "speculative_draft_model_path", "uno_lora_path", "lora_paths")
"""Arguments of SGLang that name a folder or a model of the hub (0.5.18 to 0.5.23)."""

_NO_GPU = "No accelerator"
"""How SGLang's ``get_device`` says that it finds no GPU (0.5.18 to 0.5.23)."""


def _child() -> None:
    """Resolve the request's arguments and write the answer: facts, or an error."""
    request = json.loads(sys.stdin.read())
    gpu_arch = request["gpu_arch"]
    setattr(argparse.ArgumentParser, "error", _refused_by_the_parser)  # noqa: B010 (it is a method)
    if gpu_arch not in (None, "cpu"):
        stand_in_gpu(gpu_arch)
    argv, not_read = request["argv"], None
    if request["program"]:
        argv, not_read = _options_of_sglang(argv, request["program"])
    if gpu_arch in (None, "cpu"):
        answer, server_args = _answer(argv, gpu_arch)
    else:
        sizes = gpu_memory.sizes(gpu_arch, request["gpu_gib"])
        cudas = (request["cuda"],) if request.get("cuda") else gpu_memory.CUDAS
        answer, server_args = _of_every_machine(argv, gpu_arch, sizes, cudas)
    answer["not_read"] = not_read
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    if answer.get("hicache"):
        # Apart, and after it: whatever happens to the pools, the facts are known.
        answer |= _pools(server_args)
        Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _options_of_sglang(argv: Sequence[str], program: str) -> tuple[list[str], str]:
    """The words of another program's command that SGLang's parser takes, and a sentence about the others."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    others = parser.parse_known_args(list(argv))[1]
    left, kept = list(others), list[str]()
    for word in argv:  # parse_known_args keeps the order
        if left and word == left[0]:
            left.pop(0)
        else:
            kept.append(word)
    said = f"its own options are not read ({' '.join(others)})" if others else "it was given no others"
    return (
        kept,
        f"{program} takes SGLang's options among its own; {said}, and what it sets itself is not known",
    )


def _of_every_machine(
    argv: Sequence[str], gpu_arch: str, sizes: Sequence[int], cudas: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """`_answer` for a GPU that is not here, whatever its memory and torch's CUDA are; each in a process that
    has SGLang imported.
    """
    stand_in_gpu(gpu_arch, sizes[0], cudas[0])
    importlib.import_module("sglang.srt.server_args")
    _ask_nothing_of_this_machine()
    by_size = {size: _forked(argv, gpu_arch, size, cudas[0]) for size in sizes[1:]}
    by_cuda = {cuda: _forked(argv, gpu_arch, sizes[0], cuda) for cuda in cudas[1:]}
    here, server_args = _answer(argv, gpu_arch)
    found = gpu_memory.merged({sizes[0]: here, **{size: each for size, each in by_size.items() if each}})
    others = {cuda: each for cuda, each in by_cuda.items() if each}
    if "error" in here or "error" not in found:
        differing = gpu_memory.merged({cudas[0]: here, **others}, gpu_memory.CUDA)
        if "error" in differing:
            return differing, server_args
        unknown = {name: fact for name, fact in differing["facts"].items() if fact != here["facts"][name]}
        found = {**found, "facts": {**found["facts"], **unknown}}
    return found, server_args


def _forked(argv: Sequence[str], gpu_arch: str, size: int, cuda: str) -> dict[str, Any]:
    """The answer of another machine; empty where its process ended without one."""
    with tempfile.NamedTemporaryFile() as file:
        if (child := os.fork()) == 0:
            try:
                stand_in_gpu(gpu_arch, size, cuda)
                Path(file.name).write_text(json.dumps(_answer(argv, gpu_arch)[0]), encoding="utf-8")
            finally:
                os._exit(0)  # whatever happened: this is a copy of a program that goes on elsewhere
        os.waitpid(child, 0)
        found: dict[str, Any] = json.loads(Path(file.name).read_text(encoding="utf-8") or "{}")
    return found


def _ask_nothing_of_this_machine() -> None:
    """Memory is as torch.cuda tells, not nvidia-smi, which shows GPUs that the process does not see; names of
    InfiniBand devices are taken as they are: SGLang looks for them in this machine's /sys.
    """
    import torch
    from sglang.srt import server_args
    from sglang.srt.utils import common

    def told() -> int:
        return int(torch.cuda.mem_get_info()[1]) // 2**20

    setattr(common, "get_nvgpu_memory_capacity", told)  # noqa: B010 (not ours)
    if find_spec("sglang.srt.utils.cuda_vmm_utils") is not None:
        fabric = importlib.import_module("sglang.srt.utils.cuda_vmm_utils")
        setattr(fabric, "is_gpu_fabric_ready", lambda *_: False)  # noqa: B010 (not ours)

    if find_spec("sglang.srt.arg_groups.validation_hook") is not None:
        validation = importlib.import_module("sglang.srt.arg_groups.validation_hook")
        setattr(validation, "validate_ib_devices", lambda device_str: device_str)  # noqa: B010 (not ours)
    else:  # 0.5.18
        server_args.ServerArgs._validate_ib_devices = lambda self, device_str: device_str


def _answer(argv: Sequence[str], gpu_arch: str | None) -> tuple[dict[str, Any], Any]:
    """Facts and SGLang's resolved arguments, or an error and None."""
    try:
        return _resolved(argv, gpu_arch)
    except SystemExit:
        raise  # the plug-in has said why
    except CommandLineError as error:
        return {"error": error.message}, None
    except Exception as error:
        return {"error": _reason(argv, error)}, None


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
        "variables": {name: os.environ[name] for name in OF_POLICIES if name in os.environ},
        "hicache": resolution.hicache_in_use(config),
        "decode": _decode_writes(config, facts),
        "sizing": asdict(sizing(config)),
        "memory_saver": bool(config.enable_memory_saver),
    }
    return answer, server_args


def _refused_by_the_parser(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of usage, which is 480 lines of SGLang's: the message, and what was probably meant.

    Raises:
        CommandLineError: always.
    """
    if found := re.match(r"unrecognized arguments: (--[\w-]+)", message):
        known = [name for action in parser._actions for name in action.option_strings]
        message = with_hint(message, nearest(found[1], known))
    elif found := re.match(r"(argument \S+: invalid choice: '(.*?)') \(choose from (.*)\)$", message):
        hint = nearest(found[2], re.findall(r"[\w.-]+", found[3]))
        message = with_hint(found[1], hint) if hint else message
    raise CommandLineError(f"SGLang refuses this: {message}")


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
        return f"the model {models} is not on this machine; {ONLY_CONFIG}"
    return f"SGLang cannot resolve this: {text}"


def _models(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Every model that `argv` names, with its option, by SGLang's own parser."""
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


if __name__ == "__main__":
    _child()
