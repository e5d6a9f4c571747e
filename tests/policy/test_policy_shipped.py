"""The shipped policy: what it decides for every setup, and that each rule says where it comes from."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
from hypothesis import strategies as st
from make_figures import figures
from policy_strategies import ATTENTION_KEYS, FACT_VALUES, given, writes
from repository import ROOT

from sglang_hicache.bench.measure.cases import MODELS, PAGE_SIZES
from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.policy.decide import Decision, decide
from sglang_hicache.policy.fact_spec import FactValue
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.schema import Default, Rule
from sglang_hicache.policy.names import ATTENTION_BACKENDS, MEM_LAYOUTS
from sglang_hicache.policy.routes import WriteFacts

SHIPPED = default_policy()
ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "cpu")
BY_HAND = ("auto", "hybrid", "copy_engine", "fenced_kernel")
# Which of this project's two forwards an attention backend runs in.
RUNS_IN = {
    "prefill_attention_backend": {"extend"},
    "decode_attention_backend": {"decode"},
    "verify_attention_backend": {"decode"},
    "draft_attention_backend": {"extend", "decode"},
}


def decided(**facts: FactValue) -> Decision:
    return decide(SHIPPED, Facts.given(**{"speculative": "none", **facts}))


@st.composite
def servers_with_fa3_on_hopper(draw: st.DrawFn) -> dict[str, Any]:
    """All that is true of a server that runs fa3 on sm90 in some forward."""
    true = {name: draw(st.sampled_from(values)) for name, values in FACT_VALUES.items()}
    true |= {"gpu_arch": "sm90", "device": "cuda"}
    fa3 = draw(st.sampled_from(ATTENTION_KEYS))
    if fa3 in ("verify_attention_backend", "draft_attention_backend"):
        true["speculative"] = "EAGLE"
    return {**true, fa3: "fa3"}


@given(
    servers_with_fa3_on_hopper(),
    st.sets(st.sampled_from(sorted(FACT_VALUES))),
    writes,
    st.sampled_from(BY_HAND),
)
def test_fa3_on_hopper_is_fenced_whatever_else_is_true_and_however_little_is_known(
    true: dict[str, Any], hidden: set[str], write: WriteFacts, backend: str
):
    """Every route, speculative decoding, unknown facts and backends given by hand included."""
    known = Facts.given(**{name: value for name, value in true.items() if name not in hidden})
    decision = decide(SHIPPED, known, backend=backend)
    names = ATTENTION_KEYS[:2] if true["speculative"] == "none" else ATTENTION_KEYS
    wanted = set().union(*(RUNS_IN[name] for name in names if true[name] == "fa3"))
    assert wanted
    assert wanted <= set(decision.routes[decision.route(write)].fence_forward)


@pytest.mark.parametrize("backend", ["auto", "hybrid", "copy_engine"])
def test_only_the_forwards_that_run_fa3_wait(backend: str):
    """Every combination with another attention backend that no report speaks of, layout and page size."""
    for other, layout, size in product(("triton", "flashinfer", "fa4"), (*MEM_LAYOUTS, None), (1, 64, None)):
        for prefill, decode, wanted in (("fa3", other, ("extend",)), (other, "fa3", ("decode",))):
            known = Facts.given(
                prefill_attention_backend=prefill,
                decode_attention_backend=decode,
                gpu_arch="sm90",
                mem_layout=layout,
                page_size=size,
                row_bytes=2048,
                speculative="none",
            )
            decision = decide(SHIPPED, known, backend=backend)
            assert {route.fence_forward for route in decision.routes} == {wanted}, (prefill, layout, size)
            assert all(route.rule.startswith("fa3-on-hopper") for route in decision.routes)


# Attention backend, architecture: the setups that a report, or the kernels of one, speaks of.
FENCED = {
    ("fa3", "sm90"),
    ("dsa", "sm90"),
    ("nsa", "sm90"),
    ("dual_chunk_flash_attn", "sm90"),
    ("minicpm_flashattn", "sm90"),
    *product(("dsa", "nsa", "trtllm_mha", "trtllm_mla"), ("sm100", "sm103")),
}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_other_known_setup_overlaps_fully(arch: str):
    for attention, layout, size in product(ATTENTION_BACKENDS, (*MEM_LAYOUTS, None), (1, 64)):
        expected = ("extend", "decode") if (attention, arch) in FENCED else ()
        known = {"attention_backend": attention, "gpu_arch": arch, "mem_layout": layout, "page_size": size}
        assert decided(**known).fences() == expected, (attention, layout, size)


def test_what_is_not_known_is_fenced_where_it_may_be_what_a_report_speaks_of():
    assert decided(gpu_arch="sm90").rule == "fa3-on-hopper"
    assert decided(attention_backend="fa3").rule == "fa3-on-hopper"
    assert decided().fences() == ("extend", "decode")
    assert decided(gpu_arch="sm100").rule == "trtllm-on-blackwell"
    assert decided(attention_backend="dsa").rule == "fa3-inside-dsa-on-hopper"
    # And nowhere else: these two are of no report, whatever the other is.
    assert decided(attention_backend="triton").fences() == ()
    assert decided(gpu_arch="sm80").fences() == ()
    assert decided(attention_backend="a_third_party", gpu_arch="sm90").fences() == ()


def test_versions_do_not_lift_the_fence():
    for kernel, sglang, fa3 in product(
        ("0.3.21", "0.4.10", None), ("0.5.18", "0.5.23", None), ("sgl_kernel", "kernels_community", None)
    ):
        known = {"sgl_kernel": kernel, "sglang": sglang, "fa3_binary": fa3}
        assert decided(attention_backend="fa3", gpu_arch="sm90", **known).fences() == ("extend", "decode")


# Layout, page size, row bytes, entry bytes -> backend, where no forward waits and where one must (fa3, sm90).
CHOICES = [
    ("page_first", 1, 2048, 73_728, "hybrid", "hybrid"),
    ("page_first_direct", 16, 2048, 1_179_648, "hybrid", "hybrid"),
    ("page_head", 64, 2048, 100, "hybrid", "hybrid"),
    ("layer_first", 1, 2048, 2_048, "fenced_kernel", "fenced_kernel"),
    ("layer_first", 16, 1152, 18_432, "fenced_kernel", "fenced_kernel"),
    ("layer_first", 16, 2048, 32_768, "fenced_kernel", "hybrid"),
    ("layer_first", 64, 1152, 73_728, "fenced_kernel", "hybrid"),
    ("layer_first", 64, 2048, 131_072, "hybrid", "hybrid"),
    ("layer_first", 1, 2048, 8_388_608, "hybrid", "hybrid"),
    ("page_unified", 64, 2048, 131_072, "fenced_kernel", "hybrid"),
]


@pytest.mark.parametrize(("layout", "page", "row", "entry", "unfenced", "fenced"), CHOICES)
def test_bytes_per_entry_choose_the_backend(
    layout: str, page: int, row: int, entry: int, unfenced: str, fenced: str
):
    write = WriteFacts(tokens=4096, entries=1000, nbytes=1000 * entry, runs=10)
    for attention, expected in (("triton", unfenced), ("fa3", fenced)):
        known = {"mem_layout": layout, "page_size": page, "row_bytes": row}
        decision = decided(attention_backend=attention, gpu_arch="sm90", **known)
        assert decision.routes[decision.route(write)].backend == expected


LATEST, PROFILE = (
    json.loads((ROOT / "bench/results/2026-11-26-h100" / name).read_text(encoding="utf-8"))
    for name in ("bench.json", "profile.json")
)
ROWS = {"Qwen3-8B": (36, 2, 2048, "mha"), "DeepSeek-V3": (61, 1, 1152, "mla")}


def measured(tokens: int) -> dict[tuple[str, str, int, bool], dict[str, float]]:
    """GB/s of each of this project's backends, by case."""
    cells: dict[tuple[str, str, int, bool], dict[str, float]] = {}
    for row in LATEST["rows"]:
        case = row["case"]
        if row["measurement"] == "bandwidth" and case["tokens"] == tokens and row["metrics"]:
            key = (case["model"], case["layout"], case["page_size"], case["fragmented"])
            cells.setdefault(key, {})[row["contender"]] = row["metrics"]["gb_per_s"]["median"]
    return cells


@pytest.mark.parametrize("cell", measured(4096), ids=lambda cell: " ".join(map(str, cell)))
def test_the_chosen_backend_is_near_the_fastest_where_it_was_measured(cell: tuple[str, str, int, bool]):
    """Where no forward waits, for 4,096 tokens: at most an eighth is given away, for quieter SMs."""
    model, layout, page, fragmented = cell
    layers, parts, row, kind = ROWS[model]
    runs = 4096 // page if fragmented else 1
    per_run = parts * (layers if layout == "layer_first" else 1)
    write = WriteFacts(4096, runs * per_run, 4096 * layers * parts * row, runs)
    known = {"mem_layout": layout, "page_size": page, "row_bytes": row, "kv_kind": kind}
    decision = decided(attention_backend="triton", gpu_arch="sm90", **known)
    speeds = measured(4096)[cell]
    chosen = speeds[decision.routes[decision.route(write)].backend]
    ours = {name: speeds[name] for name in ("hybrid", "copy_engine", "fenced_kernel") if name in speeds}
    assert chosen >= max(ours.values()) * 7 / 8


RULES: list[tuple[str, Rule | Default]] = [
    *((rule.name, rule) for rule in SHIPPED.rules),
    ("default", SHIPPED.default),
]


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[name for name, _ in RULES])
def test_every_number_is_in_the_reason(name: str, rule: Rule | Default):
    """A threshold or an option that the reason does not mention has no source."""
    said = rule.because.replace(",", "")
    values = [str(each) for value in rule.use.options.values() for each in [value]]
    if isinstance(rule, Rule):
        stated = rule.when.written()
        numbers = ("page_size", "row_bytes", "write_entry_bytes", "write_tokens", "write_entries")
        values += [str(value) for key in numbers for value in stated.get(key, ())]
    for number in re.findall(r"\d+", " ".join(values)):
        kib = f"{int(number) // 1024} KiB"
        assert re.search(rf"\b{number}\b", said) or kib in said, f"{name}: {number} is not in its reason"


def test_a_few_neighbouring_pages_do_not_change_who_writes():
    """An entry's bytes are a write's mean: in a shuffled pool it is a little above a page's own. A bound just
    there sent DeepSeek-V3's pages of 64 to hybrid, at fifty times the thread's time (an H200, 2026-11-28)."""
    pages = {row * size for model in MODELS.values() for row in model.components for size in PAGE_SIZES}
    for rule in SHIPPED.rules:
        for stated in rule.when.written().get("write_entry_bytes", ()):
            bound = int(re.sub(r"\D", "", str(stated)))
            assert not [page for page in pages if page <= bound < 1.25 * page], rule.name


@pytest.mark.parametrize("name", ["policy.md", "operations.md", "architecture.md"])
def test_the_documents_name_the_bounds(name: str):
    said = " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())
    rules = {rule.name: rule.when.written() for rule in SHIPPED.rules}
    for rule, words in (
        ("layer-first-short-copies", "up to {} KiB"),
        ("fa3-on-hopper-short-copies", "up to {} KiB beside FA3 on Hopper"),
    ):
        (stated,) = rules[rule]["write_entry_bytes"]
        kib = int(re.sub(r"\D", "", str(stated))) // 1024
        other = "beside FA3 on Hopper, where forwards wait: up to {} KiB"
        assert words.format(kib) in said or other.format(kib) in said, (rule, kib)


def test_every_reason_cites_where_it_comes_from():
    for rule in SHIPPED.rules:
        assert re.search(r"#\d{4,}|bench/results/\S+", rule.because), rule.name
        assert re.search(r"\d+x[A-Z]+\d+", rule.because), f"{rule.name} does not say on which hardware"
        assert "Not known: " in rule.because, rule.name
        assert rule.unmeasured, f"{rule.name} says of nothing that it is unmeasured"
    assert "#20611" in SHIPPED.default.because


def test_every_figure_in_a_reason_was_measured():
    """GB/s, ms and slow-downs that stand for the choice of a backend are of the saved run, to the digit."""
    metrics = [
        row["metrics"] for row in LATEST["rows"] if row["measurement"] in ("bandwidth", "interference")
    ]
    known = {f"{LATEST['ceilings_gb_per_s']['link']['median']:.1f}"}
    for name, scale, digits in (
        ("gb_per_s", 1, 1),
        ("ms", 1, 1),
        ("submit_us", 1000, 1),
        ("slow_down", 1, 2),
    ):
        known |= {f"{each[name]['median'] / scale:.{digits}f}" for each in metrics if name in each}
    for part in PROFILE["parts"]:
        if part["part"] == "order":
            known |= {f"{part['metrics'][name]['median']:.1f}" for name in ("ms", "gb_per_s")}
        if part["part"] == "small_copy" and part["what"].startswith(("hybrid", "copy_engine")):
            known.add(f"{part['metrics']['most_us']['median'] / 1e3:.1f}")
    for rule in SHIPPED.rules:
        if rule.name in ("fa3-on-hopper-short-copies", "layer-first-short-copies"):
            _all_measured(rule.because, known)
    _all_measured(SHIPPED.default.because, known)


def _all_measured(because: str, known: set[str]) -> None:
    text = re.sub(r"(SGLang|from|CUDA) \d+\.\d+\.\d+|\d+\.\d+\.\d+", "", because)
    for figure in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.]*\d)", text):
        assert figure in known, f"{figure} is in no saved row"


def test_the_quoted_figures_are_made_from_the_saved_runs():
    packaged = files("sglang_hicache.policy").joinpath("figures.yaml")
    assert packaged.read_text(encoding="utf-8") == figures()


@pytest.mark.sglang
@pytest.mark.skipif(find_spec("sglang") is None, reason="needs an installed SGLang")
def test_the_vocabulary_is_that_of_the_installed_sglang():
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_hicache.policy.names import SPECULATIVE

    assert set(ATTENTION_BACKEND_CHOICES) <= set(ATTENTION_BACKENDS)
    assert {each.name for each in SpeculativeAlgorithm} - {"NONE"} <= set(SPECULATIVE)
