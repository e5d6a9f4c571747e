"""Facts of a server: from every supported SGLang's own resolution, and from a scheduler as it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import releases
from launching import CHILDREN, Machine, inject
from repository import VERSIONS
from test_hook_points import assigned_attributes

from sglang_hicache.bench import tiny_model
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.handover import server_facts
from sglang_hicache.io_backends.sglang.handover.server_facts import differences, running_facts
from sglang_hicache.io_backends.sglang.versions import SUPPORTED
from sglang_hicache.policy.facts import Fact, Facts

HERE = Path(__file__).parent
WHEELS = VERSIONS

POLICY = """\
version: 1
rules: []
default: {use: {backend: copy_engine}, because: a test}
"""
EAGLE = [
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
]


def quantized(**how: str) -> list[str]:
    """Options with which a model's config.json says so."""
    return ["--json-model-override-args", json.dumps({"quantization_config": how})]


ARGUMENTS = {
    "default": [],
    "split": ["--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"],
    "policy": ["--hicache-io-policy", "POLICY"],
    "pipeline": ["--pp-size", "2"],
    "eagle": [*EAGLE, "--speculative-draft-model-path", "MODEL"],
    "eagle by prefill": [
        *(*EAGLE, "--speculative-draft-model-path", "MODEL", "--speculative-attention-mode", "prefill"),
        *("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"),
        *("--speculative-draft-attention-backend", "triton"),
    ],
    "write back": ["--hicache-write-policy", "write_back", "--page-size", "32", "--tp-size", "2"],
    "fp8 weights": quantized(quant_method="fp8", activation_scheme="dynamic"),
    "fp8 rows": quantized(quant_method="modelopt", quant_algo="FP8", kv_cache_quant_algo="FP8"),
    "fp8 asked for": ["--kv-cache-dtype", "fp8_e4m3"],
}


@pytest.fixture(scope="module", params=SUPPORTED)
def resolved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Each decision of `ARGUMENTS` on sm90, by one release."""
    folder = tmp_path_factory.mktemp("resolve")
    model = tiny_model.write(folder / "model")
    (folder / "policy.yaml").write_text(POLICY)
    places = {"POLICY": str(folder / "policy.yaml"), "MODEL": str(model)}
    base = ["--model-path", str(model), "--skip-tokenizer-init", "--enable-hierarchical-cache"]
    lines = [
        [*base, "--hicache-io-backend", "auto", *(places.get(word, word) for word in words)]
        for words in ARGUMENTS.values()
    ]
    decisions = releases.answers(HERE / "resolve_cases.py", request.param, "sm90", lines, folder)
    return dict(zip(ARGUMENTS, decisions, strict=True))


def values(decision: dict[str, Any], *names: str) -> list[Any]:
    return [decision["facts"][name]["value"] for name in names]


ATTENTION = (
    "prefill_attention_backend",
    "decode_attention_backend",
    "verify_attention_backend",
    "draft_attention_backend",
)


class TestEveryRelease:
    def test_sglangs_own_default_reaches_the_decision(self, resolved: dict[str, dict[str, Any]]) -> None:
        """In 0.5.18 the arguments do not hold it before the end of the resolution."""
        found = resolved["default"]
        assert values(found, *ATTENTION, "gpu_arch") == ["fa3", "fa3", None, None, "sm90"]
        assert found["fence_forward"] == ["extend", "decode"]
        assert values(found, "kv_kind", "mem_layout", "page_size", "overlap", "speculative") == [
            *("mha", "page_first", 1, True, "none")
        ]
        assert values(found, "write_policy", "tp", "dp", "pp", "device", "pinned_memory") == [
            *("write_through", 1, 1, 1, "cuda", True)
        ]

    def test_backends_of_prefill_and_decode_may_differ(self, resolved: dict[str, dict[str, Any]]) -> None:
        found = resolved["split"]
        assert values(found, *ATTENTION) == ["fa3", "flashinfer", None, None]
        assert found["fence_forward"] == ["extend"]

    def test_the_policy_option_is_heard(self, resolved: dict[str, dict[str, Any]]) -> None:
        """0.5.18 resolves inside its constructor, before anything can be set on the arguments."""
        assert (resolved["policy"]["backend"], resolved["policy"]["rule"]) == ("copy_engine", "default")

    def test_what_is_changed_behind_the_hicache_step_counts(
        self, resolved: dict[str, dict[str, Any]]
    ) -> None:
        assert values(resolved["pipeline"], "overlap", "pp") == [False, 2]

    def test_verification_and_draft_run_the_targets_backend(
        self, resolved: dict[str, dict[str, Any]]
    ) -> None:
        found = resolved["eagle"]
        assert values(found, *ATTENTION, "speculative") == [*(["fa3"] * 4), "EAGLE"]

    def test_options_move_verification_and_draft(self, resolved: dict[str, dict[str, Any]]) -> None:
        found = resolved["eagle by prefill"]
        assert values(found, *ATTENTION) == ["fa3", "flashinfer", "fa3", "triton"]

    def test_what_is_given_is_what_is_decided_on(self, resolved: dict[str, dict[str, Any]]) -> None:
        found = resolved["write back"]
        # 2 KV heads over 2 ranks, 32 wide, bfloat16.
        assert values(found, "write_policy", "page_size", "tp", "row_bytes") == ["write_back", 32, 2, 64]

    def test_a_row_is_no_bfloat16_because_the_weights_are_none(
        self, resolved: dict[str, dict[str, Any]]
    ) -> None:
        """2 KV heads, 32 wide; `auto` takes the dtype of the rows from the checkpoint where that has one."""
        assert values(resolved["fp8 weights"], "row_bytes") == [128]
        assert values(resolved["fp8 rows"], "row_bytes") == [None]
        assert values(resolved["fp8 asked for"], "row_bytes") == [64]


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_read_off_a_scheduler_is_there(version: str) -> None:
    scheduler = assigned_attributes(version, "sglang.srt.managers.scheduler.Scheduler")
    assert scheduler >= {
        *("world_group", "page_size", "spec_algorithm", "draft_worker", "tp_worker"),
        *("enable_overlap", "tree_cache", "server_args"),
    }
    runner = assigned_attributes(version, "sglang.srt.model_executor.model_runner.ModelRunner")
    assert runner >= {"prefill_attention_backend_str", "decode_attention_backend_str"}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Arguments of a server on sm90, as far as they are read here, and SGLang's ways to read them."""
    found = SimpleNamespace(
        device="cuda",
        attention_backend="flashinfer",
        speculative_algorithm=None,
        speculative_attention_mode="prefill",
        mm_attention_backend=None,
        dsa_prefill_backend=None,
        dsa_decode_backend=None,
        multimodal=False,
    )
    found.get_model_config = lambda: SimpleNamespace(is_multimodal=found.multimodal)
    monkeypatch.setattr(versions, "arguments", versions.ArgumentsInPlace)
    monkeypatch.setattr(server_facts, "detect", lambda given: machine())
    return found


def machine(arch: str = "sm90") -> Facts:
    return Facts.given(gpu_arch=arch, sglang="0.5.23", batch_copy=True)


def scheduler(config: Any, prefill: str, decode: str, draft: str | None = None) -> Any:
    def runner(prefill: str, decode: str) -> Any:
        return SimpleNamespace(prefill_attention_backend_str=prefill, decode_attention_backend_str=decode)

    algorithm = SimpleNamespace(is_none=lambda: config.speculative_algorithm is None)
    return SimpleNamespace(
        server_args=config,
        tp_worker=SimpleNamespace(model_runner=runner(prefill, decode)),
        spec_algorithm=algorithm,
        draft_worker=None
        if draft is None
        else SimpleNamespace(_draft_worker=SimpleNamespace(draft_runner=runner(draft, draft))),
        page_size=64,
        enable_overlap=True,
        tree_cache=SimpleNamespace(),
    )


def attention(facts: Facts) -> Iterator[Any]:
    return (facts.value(name) for name in ATTENTION)


class TestAScheduler:
    def test_says_what_its_runners_run(self, config: SimpleNamespace) -> None:
        config.speculative_algorithm = "EAGLE"
        running = running_facts(scheduler(config, "fa3", "flashinfer", draft="triton"))
        assert [*attention(running)] == ["fa3", "flashinfer", "fa3", "triton"]
        assert (running.value("page_size"), running.value("overlap")) == (64, True)
        config.speculative_attention_mode = "decode"
        running = running_facts(scheduler(config, "fa3", "flashinfer", draft="triton"))
        assert running.value("verify_attention_backend") == "flashinfer"

    def test_dsa_is_fa3_where_it_runs_its_kernels(self, config: SimpleNamespace) -> None:
        config.dsa_prefill_backend, config.dsa_decode_backend = "flashmla_sparse", "fa3"
        running = running_facts(scheduler(config, "dsa", "dsa"))
        # Short prefills on Hopper take FA3 whatever the option says.
        assert [*attention(running)] == ["fa3", "fa3", None, None]
        config.dsa_decode_backend = "flashmla_kv"
        assert running_facts(scheduler(config, "dsa", "dsa")).value("decode_attention_backend") == "dsa"

    def test_dsa_elsewhere_keeps_its_name(
        self, config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_facts, "detect", lambda given: machine("sm103"))
        config.dsa_prefill_backend = config.dsa_decode_backend = "trtllm"
        assert [*attention(running_facts(scheduler(config, "dsa", "dsa")))] == ["dsa", "dsa", None, None]

    @pytest.mark.parametrize(
        ("multimodal", "encoder", "prefill"),
        [
            (True, None, "fa3"),
            (True, "triton_attn", "flashinfer"),
            (False, None, "flashinfer"),
        ],
    )
    def test_a_vision_encoder_runs_inside_prefill(
        self, config: SimpleNamespace, multimodal: bool, encoder: str | None, prefill: str
    ) -> None:
        config.multimodal, config.mm_attention_backend = multimodal, encoder
        running = running_facts(scheduler(config, "flashinfer", "flashinfer"))
        assert running.value("prefill_attention_backend") == prefill
        assert running.value("decode_attention_backend") == "flashinfer"


class TestDifferences:
    def test_the_same_has_none(self) -> None:
        facts = Facts.given(attention_backend="fa3", gpu_arch="sm90", page_size=64)
        assert differences(facts, facts) == []

    def test_each_is_named_with_both_values(self) -> None:
        decided = Facts.given(attention_backend="fa3", gpu_arch="sm90")
        running = Facts({**decided, "decode_attention_backend": Fact("triton", "as this scheduler runs")})
        assert differences(decided, running) == [
            "decode_attention_backend is triton (as this scheduler runs), and the decision was made for fa3"
        ]

    def test_what_a_scheduler_cannot_say_is_none(self) -> None:
        assert differences(Facts.given(page_size=64, kv_kind="mla"), Facts()) == []

    def test_what_was_unknown_counts_where_forwards_are_fenced_by_it(self) -> None:
        assert differences(Facts(), Facts.given(page_size=64, row_bytes=128, pinned_memory=True)) == []
        (found,) = differences(Facts(), Facts.given(gpu_arch="sm90"))
        assert found == "gpu_arch is sm90 (given), and the decision was made for unknown"


@pytest.mark.server
def test_a_scheduler_that_runs_another_backend_than_decided_on_refuses(
    machine: Machine, tmp_path: Path
) -> None:
    fault = """
original_init = ModelRunner.init_attention_backends
def init_attention_backends(self):
    original_init(self)
    self.decode_attention_backend_str = "fa3"
ModelRunner.init_attention_backends = init_attention_backends
"""
    env = inject(CHILDREN, "sglang.srt.model_executor.model_runner", fault)
    ended = machine.launch(machine.hicache_args(), env=env)
    assert ended.status != 0
    (message,) = set(ended.lines_of_ours())
    assert "decode_attention_backend is fa3" in message
    assert "the decision was made for torch_native" in message
    assert "Uvicorn running on" not in ended.output
