"""The shipped policy: what it decides for every setup, and that each rule says where it comes from."""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import product

import pytest

from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.load import default_policy
from sglang_hicache.policy.vocabulary import ATTENTION_BACKENDS, MEM_LAYOUTS

SHIPPED = default_policy()
ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "cpu", None)
LAYOUTS = (*MEM_LAYOUTS, None)
BY_HAND = ("auto", "hybrid", "copy_engine", "fenced_kernel")


def fences(
    prefill: str | None, decode: str | None, arch: str | None, **more: str | int | None
) -> tuple[str, ...]:
    known = Facts.given(
        prefill_attention_backend=prefill, decode_attention_backend=decode, gpu_arch=arch, **more
    )
    return decide(SHIPPED, known).fence_forward


@pytest.mark.parametrize("backend", BY_HAND)
def test_fa3_on_hopper_is_always_fenced(backend: str):
    """Every combination of the other backend, layout and page size, by the policy and by hand."""
    for other, layout, size in product((*ATTENTION_BACKENDS, None), LAYOUTS, (1, 64, None)):
        for prefill, decode in (("fa3", other), (other, "fa3")):
            known = Facts.given(
                prefill_attention_backend=prefill,
                decode_attention_backend=decode,
                gpu_arch="sm90",
                mem_layout=layout,
                page_size=size,
            )
            wanted = {name for name, used in (("extend", prefill), ("decode", decode)) if used == "fa3"}
            decision = decide(SHIPPED, known, backend=backend)
            assert wanted <= set(decision.fence_forward), (prefill, decode, layout, size)
            if backend != "fenced_kernel":  # which fences everything, as the contract says
                tiny = layout == "layer_first" and size == 1
                assert decision.rule == "fa3-on-hopper" + ("-tiny-pages" if tiny else "")
                assert wanted == set(decision.fence_forward), (prefill, decode, layout, size)


# Attention backend, architecture: the setups that a report, or the kernels of one, speaks of.
FENCED = {
    ("fa3", "sm90"),
    ("dsa", "sm90"),
    ("nsa", "sm90"),
    *product(("dsa", "nsa", "trtllm_mha", "trtllm_mla"), ("sm100", "sm103")),
}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_other_setup_overlaps_fully(arch: str | None):
    for attention, layout, size in product((*ATTENTION_BACKENDS, None), LAYOUTS, (1, 64)):
        expected = ("extend", "decode") if (attention, arch) in FENCED else ()
        assert fences(attention, attention, arch, mem_layout=layout, page_size=size) == expected, attention


def test_sgl_kernel_and_sglang_versions_do_not_lift_the_fence():
    for kernel, sglang in product(("0.3.21", "0.4.0", "0.4.10", None), ("0.5.18", "0.5.23", None)):
        assert fences("fa3", "fa3", "sm90", sgl_kernel=kernel, sglang=sglang) == ("extend", "decode")


def test_every_reason_cites_where_it_comes_from():
    for rule in SHIPPED.rules:
        assert re.search(r"#\d{4,}|bench/results/\S+", rule.because), rule.name
        assert re.search(r"\d+x[A-Z]+\d+", rule.because), f"{rule.name} does not say on which hardware"
        assert "Not known: " in rule.because, rule.name
    assert "#20611" in SHIPPED.default.because


@pytest.mark.sglang
@pytest.mark.skipif(find_spec("sglang") is None, reason="needs an installed SGLang")
def test_the_vocabulary_is_that_of_the_installed_sglang():
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    assert set(ATTENTION_BACKEND_CHOICES) <= set(ATTENTION_BACKENDS)
