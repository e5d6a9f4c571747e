"""The facts that a policy may ask about: one table, which everything else reads.

A policy file's conditions and their JSON schema, what ``explain`` takes and prints, how values compare, and
what detection has to find are all made from `FACTS`. A new fact is one entry here, and code that finds it.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import gpu_names
from .fact_spec import FactKind, FactSource, FactSpec, FactValue
from .names import (
    ATTENTION_BACKENDS,
    DECODE,
    DEVICES,
    EXTEND,
    FA3_BINARIES,
    KV_KINDS,
    MEM_LAYOUTS,
    NO_SPECULATION,
    SPECULATIVE,
    WRITE_POLICIES,
    NameProblem,
    nearest,
)

# One backend under two names in every supported version: "nsa" stays as typed in a running server, and the
# report that a shipped rule cites (#38300) used it. tokenspeed_mla is not here: it was a backend of its own
# until 0.5.22.
_ATTENTION_ALIASES = {"nsa": "dsa", "compressed": "dsv4"}


def _attention_name(value: str) -> str:
    """A deprecated alias stands for its backend."""
    return _ATTENTION_ALIASES.get(value, value)


def _algorithm(value: str) -> str:
    """SGLang reads an algorithm's name in any case, and NEXTN as EAGLE."""
    if value.lower() == NO_SPECULATION:
        return NO_SPECULATION
    return "EAGLE" if value.upper() == "NEXTN" else value.upper()


_CHOSEN_BY_MODEL = "not given; SGLang chooses it from the model"
_SPECULATIVE_ONLY = "not given; runs with speculative decoding only"


def _attention(
    name: str,
    meaning: str,
    *forwards: str,
    unknown: str = _CHOSEN_BY_MODEL,
    metavar: str = "",
    launched: str = "",
    speculative_only: bool = False,
) -> FactSpec:
    return FactSpec(
        name,
        FactKind.NAME,
        meaning,
        called="attention backend",
        values=ATTENTION_BACKENDS,
        unknown=unknown,
        metavar=metavar,
        launched=launched,
        forwards=forwards,
        speculative_only=speculative_only,
        compared=True,
        canonical=_attention_name,
    )


def _version(name: str, meaning: str, example: str = "0.5.23", metavar: str = "") -> FactSpec:
    return FactSpec(
        name, FactKind.VERSION, meaning, FactSource.MACHINE, example=example, metavar=metavar, compared=True
    )


def _number(
    name: str,
    meaning: str,
    called: str,
    default: FactValue = None,
    because: str = "SGLang's default",
    unknown: str = "",
    metavar: str = "",
    launched: str = "",
    compared: bool = False,
) -> FactSpec:
    return FactSpec(
        name,
        FactKind.NUMBER,
        meaning,
        called=called,
        unknown=unknown,
        default=default,
        default_because=because,
        metavar=metavar,
        launched=launched,
        compared=compared,
    )


#: A condition on any attention backend that runs, and shorthand for facts: it sets prefill and decode,
#: verification and draft where they are not set themselves, as SGLang's option of that name does.
ANY_ATTENTION = _attention(
    "attention_backend",
    "Attention backend of any forward that runs; given, of each forward whose own is not given.",
    metavar="NAME",
    launched="--attention-backend {}",
    unknown="",
)

#: Every fact, in the order in which they are shown. The forwards of an attention backend are as SGLang's
#: schedulers launch them (0.5.18 to 0.5.23): verification is part of a decode step, and a draft follows
#: prefill and decode alike. Defaults were read in SGLang 0.5.23 and are the same in 0.5.18; page_first holds
#: from 0.5.14 on (#21631).
FACTS: tuple[FactSpec, ...] = (
    _attention(
        "prefill_attention_backend",
        "Attention backend that runs prefill.",
        EXTEND,
        metavar="NAME",
        launched="--prefill-attention-backend {}",
    ),
    _attention(
        "decode_attention_backend",
        "Attention backend that runs decode.",
        DECODE,
        metavar="NAME",
        launched="--decode-attention-backend {}",
    ),
    _attention(
        "verify_attention_backend",
        "Attention backend that verifies drafted tokens (speculative decoding).",
        DECODE,
        unknown=_SPECULATIVE_ONLY,
        speculative_only=True,
    ),
    _attention(
        "draft_attention_backend",
        "Attention backend of the draft model (speculative decoding).",
        EXTEND,
        DECODE,
        launched="--speculative-draft-attention-backend {}",
        unknown=_SPECULATIVE_ONLY,
        speculative_only=True,
    ),
    FactSpec(
        "gpu_arch",
        FactKind.ARCHITECTURE,
        "Architecture of the GPU: sm90, H100, as nvidia-smi names it, or cpu for a server without one.",
        FactSource.MACHINE,
        called="gpu_arch",
        example="sm90",
        metavar="ARCH",
        compared=True,
        canonical=gpu_names.canonical,
    ),
    FactSpec(
        "gpu_name",
        FactKind.TEXT,
        "The GPU's name, as nvidia-smi prints it.",
        FactSource.MACHINE,
        called="a GPU's name: what nvidia-smi prints, such as NVIDIA H200",
        example="NVIDIA H200",
        follows="gpu_arch",
        compared=True,
    ),
    _version("driver", "Version of NVIDIA's driver.", example="580.159.04"),
    _version("cuda", "CUDA version that torch was built for.", example="13.0"),
    _version("sglang", "Version of SGLang.", metavar="VERSION"),
    _version(
        "sgl_kernel",
        "Version of sglang-kernel, SGLang's package of kernels (sgl-kernel before 0.4.0).",
        example="0.4.10",
        metavar="VERSION",
    ),
    _version("flashinfer", "Version of flashinfer-python.", example="0.7.2"),
    FactSpec(
        "fa3_binary",
        FactKind.NAME,
        "Whose build of FlashAttention-3 SGLang loads: that of its kernel package, or kernels-community's.",
        FactSource.MACHINE,
        called="FA3 build",
        hidden="with SGLANG_USE_SGL_FA3_KERNEL=0 only SGLang's log says whose it loaded",
        values=FA3_BINARIES,
        compared=True,
    ),
    FactSpec(
        "kv_kind",
        FactKind.NAME,
        "Kind of KV cache: mha keeps K and V of each head, mla one latent row a token.",
        called="KV kind",
        values=KV_KINDS,
        unknown="not given; SGLang takes it from the model",
        metavar="KIND",
        compared=True,
    ),
    FactSpec(
        "mem_layout",
        FactKind.NAME,
        "The host pool's layout: --hicache-mem-layout.",
        called="memory layout",
        values=MEM_LAYOUTS,
        default="page_first",
        default_because="SGLang's default since 0.5.14",
        metavar="LAYOUT",
        launched="--hicache-mem-layout {}",
        compared=True,
    ),
    _number(
        "page_size",
        "Tokens in a page (--page-size).",
        "a page size: a whole number of tokens, 1 or more",
        1,
        "SGLang's default (0.5.23); some attention backends raise it",
        metavar="TOKENS",
        launched="--page-size {}",
        compared=True,
    ),
    # Not compared: only speed rests on it.
    _number(
        "row_bytes",
        "Bytes of one token's K (with mla, of its one row) in one layer on one rank.",
        "a row's size: a whole number of bytes, 1 or more",
        unknown="not given; follows from the model",
    ),
    FactSpec(
        "write_policy",
        FactKind.NAME,
        "When SGLang writes rows to the host pool (--hicache-write-policy).",
        called="write policy",
        values=WRITE_POLICIES,
        default="write_through",
        launched="--hicache-write-policy {}",
    ),
    FactSpec(
        "overlap",
        FactKind.FLAG,
        "Whether the scheduler prepares a batch while the one before it runs (overlap schedule).",
        default=True,
        default_because="SGLang's default; some options and models turn it off",
        launched_as={False: "--disable-overlap-schedule"},
        compared=True,
    ),
    FactSpec(
        "speculative",
        FactKind.NAME,
        "Algorithm of speculative decoding; none: there is none.",
        called="speculative algorithm",
        values=SPECULATIVE,
        default=NO_SPECULATION,
        launched="--speculative-algorithm {}",
        launched_as={NO_SPECULATION: ""},
        compared=True,
        canonical=_algorithm,
    ),
    _number(
        "tp",
        "Tensor-parallel size (--tp-size).",
        "a tensor-parallel size: a whole number, 1 or more",
        1,
        launched="--tp-size {}",
    ),
    _number(
        "dp",
        "Data-parallel size: replicas of the server, times groups of data-parallel attention.",
        "a data-parallel size: a whole number, 1 or more",
        1,
        launched="--dp-size {}",
    ),
    _number(
        "pp",
        "Pipeline-parallel size (--pp-size).",
        "a pipeline-parallel size: a whole number, 1 or more",
        1,
        launched="--pp-size {}",
    ),
    FactSpec(
        "pinned_memory",
        FactKind.FLAG,
        "Whether host pools are pinned (page-locked) memory.",
        unknown="not given; SGLang decides it when it allocates",
        compared=True,
    ),
    FactSpec(
        "batch_copy",
        FactKind.FLAG,
        "Whether the driver takes copies in batches (cuMemcpyBatchAsync).",
        FactSource.MACHINE,
        compared=True,
    ),
    FactSpec(
        "device",
        FactKind.NAME,
        "What the server computes on; a GPU is cuda.",
        called="device",
        values=DEVICES,
        launched="--device {}",
        follows="gpu_arch",
        compared=True,
        # To difflib "cpu" is the nearest to "gpu", which is the opposite of what was meant.
        hints={"gpu": "cuda", "nvidia": "cuda"},
    ),
    FactSpec(
        "write_tokens",
        FactKind.NUMBER,
        "Tokens of one write: rows of the pool, all layers together counting as one.",
        FactSource.WRITE,
        phrase="of {} tokens",
    ),
    FactSpec(
        "write_entries",
        FactKind.NUMBER,
        "Copies to the host in one write: one a run of host slots, in layer_first for each layer of K and V.",
        FactSource.WRITE,
        phrase="of {} entries",
    ),
    FactSpec(
        "write_entry_bytes",
        FactKind.NUMBER,
        "Bytes of such a copy, on average over one write.",
        FactSource.WRITE,
        phrase="with entries of {} bytes",
    ),
    FactSpec(
        "write_contiguous",
        FactKind.FLAG,
        "Whether the host slots of one write are one run.",
        FactSource.WRITE,
    ),
)

#: What ``when`` of a rule may ask, by key.
CONDITIONS: Mapping[str, FactSpec] = {spec.name: spec for spec in (ANY_ATTENTION, *FACTS)}
#: Facts of a server by name, in order.
SERVER_FACTS: Mapping[str, FactSpec] = {spec.name: spec for spec in FACTS if not spec.of_write}
FACT_NAMES: tuple[str, ...] = tuple(SERVER_FACTS)
#: The attention backends, each with the forwards that it runs in, in this project's two names.
FORWARDS_OF: Mapping[str, tuple[str, ...]] = {
    spec.name: spec.forwards for spec in SERVER_FACTS.values() if spec.forwards
}
ATTENTION_FACTS: tuple[str, ...] = tuple(FORWARDS_OF)
#: What is found on a machine by itself; all ranks of a server must have it in common.
MACHINE_FACTS: tuple[str, ...] = tuple(
    spec.name for spec in SERVER_FACTS.values() if spec.source is FactSource.MACHINE
)


def check_fact(name: str, text: str) -> str | int | bool:
    """The value of a server's fact `name` (or of the shorthand ``attention_backend``) that a user typed as
    `text`. Raises NameProblem for a name that is no such fact, and for a value that is not valid.
    """
    spec = CONDITIONS.get(name)
    if spec is None or spec.of_write:
        raise NameProblem(f"unknown fact '{name}'", nearest(name, (ANY_ATTENTION.name, *FACT_NAMES)))
    return spec.read(text)
