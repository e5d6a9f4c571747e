"""What a server's arguments mean for this plug-in, asked of single functions."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.io_backends import registry
from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.registry import BACKENDS
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.launcher import resolution
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts


def config(**given: Any) -> SimpleNamespace:
    """Arguments of a server on the CPU, without HiCache unless ``given`` says so."""
    return SimpleNamespace(
        **{
            "device": "cpu",
            "enable_hierarchical_cache": False,
            "disaggregation_decode_enable_offload_kvcache": False,
            "disaggregation_mode": "null",
            "disaggregation_decode_retraction_backup": None,
            **given,
        }
    )


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, False),
        ({"enable_hierarchical_cache": True}, True),
        ({"disaggregation_decode_enable_offload_kvcache": True}, True),
        # SGLang's default for retraction is the host pool, and None until it has resolved that.
        ({"disaggregation_mode": "decode"}, True),
        ({"disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "host_pool"}, True),
        ({"disaggregation_mode": "decode", "disaggregation_decode_retraction_backup": "cpu_tensor"}, False),
        ({"disaggregation_mode": "prefill"}, False),
    ],
)
def test_which_servers_write_back(given: dict[str, Any], used: bool) -> None:
    assert resolution.hicache_in_use(config(**given)) is used


@pytest.mark.parametrize("option", ["use_ray", "enable_pdmux"])
def test_what_the_fences_do_not_know_is_refused(option: str) -> None:
    resolution._refuse_what_is_not_covered(config(**{option: False}), "hybrid")
    with pytest.raises(RefusedError, match=f"--{option.replace('_', '-')} .*--hicache-io-backend kernel"):
        resolution._refuse_what_is_not_covered(config(**{option: True}), "hybrid")


def test_a_backend_by_name_must_serve_the_kind_of_kv_cache_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    only_mha = replace(BACKENDS["copy_engine"], kv_kinds=frozenset({"mha"}))
    monkeypatch.setitem(registry._specs, "copy_engine", only_mha)

    def refuse(name: str, kind: str) -> None:
        facts = Facts.given(mem_layout="page_first", kv_kind=kind)
        decision = decide(default_policy(), facts, backend="copy_engine")
        resolution._refuse_unserved(name, decision, facts)

    refuse("copy_engine", "mha")
    refuse("auto", "mla")
    with pytest.raises(
        RefusedError, match=r"copy_engine cannot serve KV cache of kind mla \(it can: mha\); choose"
    ):
        refuse("copy_engine", "mla")


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        ([], "hybrid"),
        ([("another", {"page_size": 64})], "hybrid"),
        ([("ours", {"hicache_io_backend": "kernel"})], "kernel"),
        ([("ours", {"hicache_io_backend": "kernel"}), ("other", {"hicache_io_backend": "direct"})], "direct"),
    ],
)
def test_the_last_that_was_declared_holds(declared: list[tuple[str, dict[str, Any]]], name: str) -> None:
    arguments = SimpleNamespace(hicache_io_backend="hybrid", _resolved_overrides=declared)
    assert scheduler_hooks._effective_io_backend(arguments) == name
