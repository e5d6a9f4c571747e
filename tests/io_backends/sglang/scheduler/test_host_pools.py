"""The list of host pools: bytes, writers and shares, from pools that are there and from a command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_pools import KINDS, build
from repository import ROOT
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.explain.pool_rows import of_its_share, pool_rows
from sglang_hicache.bench.lab import coverage
from sglang_hicache.io_backends import registry
from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.registry import BACKENDS
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.pools import geometry
from sglang_hicache.io_backends.sglang.pools.errors import ShortHostRowsError
from sglang_hicache.io_backends.sglang.pools.host_pools import (
    PROMPT_TOKENS,
    HostPool,
    assigned,
    bytes_of,
    host_pools,
    share_of,
)
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts

MODELS = ROOT / "tests" / "support" / "models"


def decision(backend: str) -> Any:
    return decide(default_policy(), Facts.given(mem_layout="page_first", page_size=64), backend=backend)


def pool(name: str = "kv", **changed: Any) -> HostPool:
    fields: dict[str, Any] = {
        "kind": "MHATokenToKVPoolHost",
        "layout": "page_first",
        "kv_kind": "mha",
        "record": "token",
        "bytes": 1024,
        "tokens": 1,
        "window": None,
        "undescribed": None,
    }
    return HostPool(name, **{**fields, **changed})


class TestWriters:
    def test_a_pool_that_is_not_described_is_sglangs_whatever_the_backend(self) -> None:
        (row,) = assigned([pool(undescribed="holds packed pages")], decision("hybrid"))
        assert (row.writer, row.why, row.ours) == (("SGLang",), "holds packed pages", False)

    def test_a_layout_that_the_backend_cannot_serve_is_sglangs(self) -> None:
        (row,) = assigned([pool(layout="page_head")], decision("copy_engine"))
        assert row.writer == ("SGLang",)
        assert str(row.why).startswith("copy_engine cannot serve --hicache-mem-layout page_head (it can: ")

    def test_a_pool_of_steps_is_sglangs_where_the_backend_takes_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            registry._specs, "copy_engine", replace(BACKENDS["copy_engine"], index_steps=False)
        )
        rows = assigned([pool(), pool("c4", index_step=256)], decision("copy_engine"))
        assert [row.writer for row in rows] == [("copy_engine",), ("SGLang",)]
        assert rows[1].why == "copy_engine cannot serve pools of which 256 indices stand for one row"

    def test_a_kind_that_the_backend_cannot_serve_is_sglangs_pool_by_pool(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only_mha = replace(BACKENDS["copy_engine"], kv_kinds=frozenset({"mha"}))
        monkeypatch.setitem(registry._specs, "copy_engine", only_mha)
        rows = assigned([pool(), pool("indexer", kv_kind="index")], decision("copy_engine"))
        assert [row.writer for row in rows] == [("copy_engine",), ("SGLang",)]
        assert rows[1].why == "copy_engine cannot serve KV cache of kind index (it can: mha)"

    def test_a_backends_own_sentence_stands_as_it_is(self) -> None:
        (row,) = assigned([pool()], decision("hybrid"), lambda pool, name: f"{name} finds it too large")
        assert row.why == "hybrid finds it too large"

    def test_else_the_backend_of_the_decision_writes_it(self) -> None:
        (row,) = assigned([pool()], decision("copy_engine"))
        assert (row.writer, row.why) == (("copy_engine",), None)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([None, 1, 64])), min_size=1, max_size=5)
)
def test_a_state_is_written_once_a_prompt_and_a_page_as_often_as_it_is_begun(sizes: Any) -> None:
    rows = [pool(str(nth), bytes=size, tokens=tokens) for nth, (size, tokens) in enumerate(sizes)]
    for row, (size, tokens) in zip(rows, sizes, strict=True):
        assert row.written(130) == size * {None: 1, 1: 130, 64: 3}[tokens]
        assert HostPool.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_of_a_window_no_more_is_written_than_it_holds() -> None:
    assert pool("swa", window=128).written() == 128 * 1024
    assert pool("swa", window=128).written(100) == 100 * 1024


class TestCost:
    ENTRY: ClassVar[dict[str, Any]] = {
        "backend": "hybrid",
        "kind": "measured",
        "text": "50.5 GB/s",
        "source": "a run",
    }

    def test_no_speed_is_named_for_a_server_whose_bytes_sglang_copies(self) -> None:
        rows = assigned([pool(undescribed="not ours", share=1.0)], decision("hybrid"))
        (entry,) = of_its_share([self.ENTRY], rows)
        assert entry["kind"] == "unknown"
        assert "GB/s" not in entry["text"]
        assert entry["source"] is None

    def test_a_part_is_said_to_be_one(self) -> None:
        rows = assigned([pool(share=0.75), pool("x", undescribed="no", share=0.25)], decision("hybrid"))
        (entry,) = of_its_share([self.ENTRY], rows)
        assert entry["text"].startswith("75% of the bytes: 50.5 GB/s")
        assert share_of(rows) == 0.75

    def test_nothing_is_changed_where_the_pools_are_not_known(self) -> None:
        assert of_its_share([self.ENTRY], ()) == [self.ENTRY]


@pytest.mark.usefixtures("cpu_sglang")
class TestRealPools:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bytes_are_those_that_a_record_moves(self, kind: str) -> None:
        built = build(kind, "page_first")
        (row,) = host_pools([("x", built.host, None)])
        nbytes = sum(int(rows[0].numel()) * rows.element_size() for _, rows in built.rows)
        assert row.bytes == nbytes
        assert row.tokens == {"states": None, "keys_only": 1}.get(kind, built.per_record)
        assert row.undescribed is None
        assert pool_rows([row])[0][0] == "x"
        assert bytes_of(built.host, built.per_record * 3) == 3 * nbytes

    def test_a_pool_that_follows_longer_indices_than_it_holds_ends_the_start(self) -> None:
        """With decode context parallelism ranks share the rows, not the indices."""
        built = build("index_pages", "page_first")
        anchor = SimpleNamespace(
            size=built.host.size,
            dcp_size=8,
            logical_size=8 * built.host.size,
            page_size=64,
            layout="page_first",
            size_per_token=4,
        )
        with pytest.raises(ShortHostRowsError, match=r"pool indexer holds 1,280 tokens .* up to 10,240"):
            host_pools([("kv", anchor, None), ("indexer", built.host, None)])
        anchor.dcp_size, anchor.logical_size = 1, built.host.size
        found = host_pools([("kv", anchor, None), ("indexer", built.host, None)])
        assert [row.name for row in found] == ["kv", "indexer"]

    def test_rows_whose_scales_the_host_does_not_hold_end_the_start(self) -> None:
        """As MXFP8 before SGLang 0.5.21: the host pool is the plain one, and the scales are lost."""
        MHATokenToKVPoolHost = type("MHATokenToKVPoolHost", (), {})  # known by its name
        scaled = SimpleNamespace(k_scale_buffer=[object()])
        with pytest.raises(ShortHostRowsError, match="pool kv: its device rows have scales beside them"):
            host_pools([("kv", MHATokenToKVPoolHost(), scaled)])
        # A host pool of its own holds them; rows without scales lose none.
        geometry.refuse_lost_scales("kv", type("MHATokenToKVPoolMXFP8Host", (), {})(), scaled)
        for plain in (SimpleNamespace(), SimpleNamespace(k_scale_buffer=None), None):
            geometry.refuse_lost_scales("kv", MHATokenToKVPoolHost(), plain)

    def test_index_keys_that_the_host_does_not_hold_end_the_start(self) -> None:
        """As Qwen4-Exp before SGLang 0.5.22: only its keys and values are written back."""
        indexed = SimpleNamespace(qsa_compressed_k_buffer_pool=[object()])
        with pytest.raises(ShortHostRowsError, match="no host pool of this SGLang holds them"):
            host_pools([("kv", SimpleNamespace(), None)], None, indexed)
        geometry.refuse_lost_index(indexed, {"MHATokenToKVPoolHost", "QSAIndexerPoolHost"})
        for plain in (SimpleNamespace(), SimpleNamespace(qsa_compressed_k_buffer_pool=[]), None):
            geometry.refuse_lost_index(plain, {"MHATokenToKVPoolHost"})


class TestAServersList:
    """Made when a scheduler starts, for people."""

    def test_a_draft_pool_apart_is_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SGLang 0.5.18 keeps it beside the group of the target's pools."""
        seen: list[Any] = []
        caches: list[Any] = []

        def keep(entries: Any, window: Any, cache: Any) -> tuple[HostPool, ...]:
            seen.extend(entries)
            caches.append(cache)
            return ()

        monkeypatch.setattr(scheduler_hooks, "host_pools", keep)
        active: Any = SimpleNamespace(scheduler=None, decision=None, writeback=SimpleNamespace(pools={}))
        target, device = SimpleNamespace(pool_label="kv"), object()
        draft, of_draft = object(), object()
        controller = SimpleNamespace(mem_pool_host=target, mem_pool_device=device)
        scheduler_hooks._listed(controller, active)
        controller.mem_pool_host_draft, controller.mem_pool_device_draft = draft, of_draft
        controller.mem_pool_device_allocator = SimpleNamespace(get_kvcache=lambda: "the whole cache")
        scheduler_hooks._listed(controller, active)
        assert seen == [("kv", target, device), ("kv", target, device), ("draft", draft, of_draft)]
        assert caches == [None, "the whole cache"]

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], tuple[HostPool, ...]]:
        def list_with(error: Exception) -> tuple[HostPool, ...]:
            def fail(*_: Any) -> Any:
                raise error

            monkeypatch.setattr(scheduler_hooks, "host_pools", fail)
            active: Any = SimpleNamespace(scheduler=None, writeback=SimpleNamespace(pools={}))
            return scheduler_hooks._listed(SimpleNamespace(mem_pool_host=object()), active)

        return list_with

    def test_what_it_cannot_read_is_no_reason_not_to_serve(
        self, made: Callable[[Exception], tuple[HostPool, ...]]
    ) -> None:
        assert made(AttributeError("another release names it otherwise")) == ()

    def test_bytes_that_would_be_lost_are(self, made: Callable[[Exception], tuple[HostPool, ...]]) -> None:
        with pytest.raises(RefusedError, match="too short"):
            made(ShortHostRowsError("too short"))


def by_name(server: dict[str, Any]) -> dict[str, HostPool]:
    return {each["name"]: HostPool.from_dict(each) for each in server["pools"]}


@pytest.fixture(scope="module")
def servers() -> list[dict[str, Any]]:
    """What SGLang's own code builds for each server of models/, now."""
    return coverage.servers(MODELS / "servers.json")


def test_the_saved_list_is_what_sglang_builds(servers: list[dict[str, Any]]) -> None:
    """`python -m sglang_hicache.bench.lab.coverage tests/support/models/servers.json
    tests/support/models/coverage.json`, then `make tables`."""
    assert servers == json.loads((MODELS / "coverage.json").read_text(encoding="utf-8"))


def test_bytes_are_those_of_the_models_own_numbers(servers: list[dict[str, Any]]) -> None:
    """Computed here from each config.json, without SGLang."""
    seen = set()
    for server in servers:
        config = json.loads((MODELS / server["model"] / "config.json").read_text(encoding="utf-8"))
        words = server["options"].split()
        tp = int(words[words.index("--tp") + 1]) if "--tp" in words else 1
        pools = by_name(server)
        layers, packed_layers = config["num_hidden_layers"], 0
        if "--speculative-algorithm" in words:
            named = "--speculative-draft-model-path"
            draft = words[words.index(named) + 1] if named in words else None
            if draft is None:  # a head of the model's own: a layer behind its others, in the same pools
                packed_layers = 1
                seen.add("packed")
            else:
                of_draft = json.loads((MODELS / draft / "config.json").read_text(encoding="utf-8"))
                draft_row = 2 * 2 * of_draft["num_key_value_heads"] * of_draft["head_dim"]
                assert pools["draft"].bytes == of_draft["num_hidden_layers"] * draft_row, server
                seen.add("sidecar")
        if config["model_type"] == "deepseek_v4":
            # fp8 without rope, a scale for 64 of them in 8 bytes, bf16 of rope; pages padded to 576 bytes.
            row = config["qk_nope_head_dim"] + 8 + 2 * config["qk_rope_head_dim"]
            ratios = config["compress_ratios"][:layers]

            def padded(tokens: int, row: int = row) -> int:
                return -(-tokens * row // 576) * 576

            assert {name: pool.bytes for name, pool in pools.items()} == {
                "swa": layers * padded(256),
                "deepseek_v4_c4": ratios.count(4) * padded(64),
                "deepseek_v4_c4_indexer": ratios.count(4) * 64 * (config["index_head_dim"] + 4),
                "deepseek_v4_c128": ratios.count(128) * padded(2),
                # Of a page: a ring of 8 tokens; key and score, two of each for windows overlap, float32.
                "deepseek_v4_c4_state": ratios.count(4) * 8 * 2 * 2 * config["head_dim"] * 4,
                "deepseek_v4_c4_indexer_state": ratios.count(4) * 8 * 2 * 2 * config["index_head_dim"] * 4,
            }
        elif config["model_type"].startswith("deepseek"):
            latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
            # DeepSeek-V3.2 keeps a byte an element of the latent, a scale for 128 of them, and bf16 of rope.
            packed = config["kv_lora_rank"] * 132 // 128 + 2 * config["qk_rope_head_dim"]
            layers += packed_layers
            assert pools["kv"].bytes in (layers * latent * 2, layers * packed), server
            if "index_head_dim" in config:
                assert pools["indexer"].bytes == layers * 64 * (config["index_head_dim"] + 4)
                seen.add("indexer")
        else:
            heads = max(1, config["num_key_value_heads"] // tp)
            row = 2 * 2 * heads * config["head_dim"]
            if "linear_num_value_heads" in config:
                layers //= config["full_attention_interval"]
                seen.add("states")
            if "layer_types" in config:
                layers = config["layer_types"].count("full_attention")
                sliding = config["layer_types"].count("sliding_attention")
                assert pools["swa"].bytes == sliding * row
                assert pools["swa"].written() < PROMPT_TOKENS * sliding * row
                seen.add("window")
            assert pools["kv"].bytes == (layers + packed_layers) * row, server
    assert seen == {"indexer", "states", "window", "packed", "sidecar"}


def test_of_the_models_every_byte_but_the_states_of_deepseek_v4_is_ours(
    servers: list[dict[str, Any]],
) -> None:
    for server in servers:
        left = {name for name, pool in by_name(server).items() if pool.why}
        states = {"deepseek_v4_c4_state", "deepseek_v4_c4_indexer_state"}
        assert left == (states if server["model"] == "DeepSeek-V4-Flash" else set()), server
        assert (share_of(list(by_name(server).values())) == 1) == (not left)


def test_at_least_95_of_100_bytes_are_ours_for_each_of_the_models() -> None:
    least, together = coverage.overall(MODELS / "coverage.json")
    assert 0.95 <= least <= together <= 1
    # The document's sentence is made of these, and tests/test_documents.py holds it to them.
    assert coverage.percent(least) in coverage.table(MODELS / "coverage.json")
    assert coverage.percent(0.99999) == "99.9 %"


def test_pages_with_several_indices_for_a_row_are_known_as_such(servers: list[dict[str, Any]]) -> None:
    steps = {
        (server["model"], pool.index_step)
        for server in servers
        for pool in by_name(server).values()
        if pool.index_step > 1
    }
    assert steps == {("DeepSeek-V4-Flash", 256), ("DeepSeek-R1", 8)}


@pytest.mark.usefixtures("quick_dry_runs")
def test_explain_names_no_speed_for_a_server_whose_every_byte_sglang_copies() -> None:
    line = (
        f"sglang serve --model-path {MODELS / 'gpt-oss-120b'} --skip-tokenizer-init "
        "--enable-hierarchical-cache --hicache-io-backend auto --tp 4 --enable-unified-memory --page-size 64 "
        "--attention-backend triton"
    )
    shown = CliRunner().invoke(app, ["explain", "--server-args", line, "--gpu-arch", "sm90", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert [(each["name"], each["writer"]) for each in found["pools"]] == [
        ("kv", ["SGLang"]),
        ("swa", ["SGLang"]),
    ]
    assert found["pools_unknown"] is None
    assert {each["kind"] for each in found["cost"]} == {"unknown"}
