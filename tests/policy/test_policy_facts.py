"""Facts: what is given, what is detected, and what stays unknown."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.policy import facts as facts_module
from sglang_hicache.policy.facts import FACT_NAMES, Fact, Facts, detect
from sglang_hicache.policy.vocabulary import NameProblem


def fake_torch(*, gpu: tuple[int, int] | None, hip: str | None = None) -> Any:
    cuda = SimpleNamespace(is_available=lambda: gpu is not None, get_device_capability=lambda: gpu)
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=hip))


def test_every_name_is_always_there():
    known = Facts({"gpu_arch": Fact("sm90", "here")})
    assert tuple(known) == FACT_NAMES
    assert known["gpu_arch"] == Fact("sm90", "here")
    assert known["kv_kind"].value is None
    assert str(known["kv_kind"]) == "unknown"


def test_attention_backend_sets_both_where_they_are_not_set():
    known = Facts.given(attention_backend="fa3", decode_attention_backend="flashinfer")
    assert known.value("prefill_attention_backend") == "fa3"
    assert known.value("decode_attention_backend") == "flashinfer"
    assert known["prefill_attention_backend"].source == "given"


def test_a_name_that_is_no_fact():
    with pytest.raises(NameProblem, match=r"unknown fact 'gpu_arc' \(did you mean 'gpu_arch'\?\)"):
        Facts.given(gpu_arc="sm90")


@pytest.mark.parametrize(("name", "value"), [("page_size", "64"), ("page_size", True), ("gpu_arch", 90)])
def test_a_value_of_the_wrong_type(name: str, value: Any):
    with pytest.raises(TypeError, match=f"fact {name} is "):
        Facts.given(**{name: value})


def test_facts_travel_as_plain_json():
    known = detect({"attention_backend": "fa3", "gpu_arch": "sm90"})
    assert Facts.from_dict(known.to_dict()) == known
    assert known.to_dict()["kv_kind"]["value"] is None


def test_given_comes_before_detected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would raise
    known = detect({"gpu_arch": "sm100", "sglang": "0.5.19", "page_size": 64, "kv_kind": None})
    assert known["gpu_arch"] == Fact("sm100", "given")
    assert known["sglang"] == Fact("0.5.19", "given")
    assert known["page_size"] == Fact(64, "given")
    assert known["device"] == Fact("cuda", "follows from gpu_arch")
    assert known.value("kv_kind") is None


def test_sglangs_defaults_say_that_they_are():
    known = detect({"gpu_arch": "cpu"})
    assert known["mem_layout"] == Fact("page_first", "SGLang's default since 0.5.14")
    assert known.value("page_size") == 1
    assert known.value("device") == "cpu"
    for name in ("prefill_attention_backend", "decode_attention_backend", "kv_kind"):
        assert known.value(name) is None
        assert known[name].source.startswith("not given; SGLang ")


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        (fake_torch(gpu=(9, 0)), Fact("sm90", "torch.cuda on this machine")),
        (fake_torch(gpu=(10, 3)), Fact("sm103", "torch.cuda on this machine")),
        (fake_torch(gpu=None), Fact(None, "torch sees no GPU here")),
        (fake_torch(gpu=(9, 4), hip="6.2"), Fact(None, "an AMD GPU has no sm architecture")),
    ],
)
def test_the_gpu_through_torch(monkeypatch: pytest.MonkeyPatch, torch: Any, expected: Fact):
    monkeypatch.setitem(sys.modules, "torch", torch)
    known = detect()
    assert known["gpu_arch"] == expected
    assert known.value("device") == ("cuda" if expected.value else None)


def test_a_gpu_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    torch = fake_torch(gpu=(9, 0))

    def broken() -> None:
        raise RuntimeError("driver too old\nand more")

    torch.cuda.get_device_capability = broken
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert detect()["gpu_arch"] == Fact(None, "torch cannot read the GPU: driver too old")


@pytest.mark.parametrize(
    ("error", "source"),
    [
        (ModuleNotFoundError("No module named 'torch'"), "torch is not installed here"),
        (ImportError("bad symbol"), "torch cannot be imported here: bad symbol"),
        (
            OSError("libcudart.so.13: no such file\n"),
            "torch cannot be imported here: libcudart.so.13: no such file",
        ),
    ],
)
def test_torch_is_optional(monkeypatch: pytest.MonkeyPatch, error: Exception, source: str):
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(facts_module.importlib, "import_module", fails)
    assert detect()["gpu_arch"] == Fact(None, source)


def test_the_kernels_package_had_another_name(monkeypatch: pytest.MonkeyPatch):
    installed = {"sgl-kernel": "0.3.21"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(facts_module, "version", version)
    known = detect({"gpu_arch": "sm90"})
    assert known["sgl_kernel"] == Fact("0.3.21", "the installed sgl-kernel")
    assert known["sglang"] == Fact(None, "sglang is not installed here")
