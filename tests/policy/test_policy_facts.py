"""Facts: what is given, what is detected, and what stays unknown."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.bench.explain import launch_line
from sglang_hicache.io_backends.device import gpu_facts
from sglang_hicache.io_backends.sglang.handover import machine_facts
from sglang_hicache.io_backends.sglang.handover.machine_facts import detect
from sglang_hicache.policy.fact_spec import FactKind, FactSpec
from sglang_hicache.policy.fact_table import FACT_NAMES, MACHINE_FACTS, SERVER_FACTS
from sglang_hicache.policy.facts import NOT_GIVEN, Fact, Facts
from sglang_hicache.policy.names import NameProblem


def fake_torch(*, gpu: tuple[int, int] | None, hip: str | None = None) -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: gpu is not None,
        get_device_capability=lambda: gpu,
        get_device_name=lambda: "NVIDIA H200",
    )
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=hip, cuda="13.0"))


def test_every_name_is_always_there():
    known = Facts({"gpu_arch": Fact("sm90", "here")})
    assert tuple(known) == FACT_NAMES
    assert known["gpu_arch"] == Fact("sm90", "here")
    assert known["kv_kind"].value is None
    assert str(known["kv_kind"]) == "unknown"


@pytest.mark.parametrize("meaning", ["", "a page size", "Tokens in a page", "tokens in a page."])
def test_a_fact_without_a_sentence_that_says_what_it_is_cannot_be_made(meaning: str):
    with pytest.raises(ValueError, match="meaning of fact page_size is no sentence"):
        FactSpec("page_size", FactKind.NUMBER, meaning)


def test_what_sglangs_options_give_is_in_the_command_that_explain_prints():
    """Another server would be started than the one that was explained."""
    without = {name for name, spec in SERVER_FACTS.items() if not (spec.launched or spec.launched_as)}
    others = {"verify_attention_backend", "kv_kind", "row_bytes", "pinned_memory"}
    assert without == others | set(MACHINE_FACTS)
    given = Facts.given(
        **{"draft_attention_backend": "triton", "page_size": 16, "overlap": False, "speculative": "EAGLE"},
        **{"tp": 2, "prefill_attention_backend": "fa3", "decode_attention_backend": "fa3", "dp": 4},
    )
    words = " ".join(launch_line.of_facts(given, backend="auto", policy=None))
    for option in (
        *("--attention-backend fa3", "--speculative-draft-attention-backend triton", "--page-size 16"),
        *("--disable-overlap-schedule", "--speculative-algorithm EAGLE", "--tp-size 2", "--dp-size 4"),
    ):
        assert f" {option} " in words
    plain = Facts.given(overlap=True, speculative="none", device="cuda")
    assert launch_line.of_facts(plain, backend="auto", policy=None)[4:-2] == [
        *("--device", "cuda", "--enable-hierarchical-cache"),
    ]


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


def test_every_fact_of_the_table_is_looked_for():
    """A new entry of the table needs code that finds it, or says why it is unknown, or SGLang's default."""
    assert [name for name, fact in detect().items() if fact.source == NOT_GIVEN] == []


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

    monkeypatch.setattr(gpu_facts.importlib, "import_module", fails)
    # A machine with a GPU: on any other torch is not even tried, unless something has imported it.
    monkeypatch.setattr(gpu_facts, "_GPU_NODES", ("/",))
    assert detect()["gpu_arch"] == Fact(None, source)


def test_the_kernels_package_had_another_name(monkeypatch: pytest.MonkeyPatch):
    installed = {"sgl-kernel": "0.3.21"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(machine_facts, "version", version)
    known = detect({"gpu_arch": "sm90"})
    assert known["sgl_kernel"] == Fact("0.3.21", "the installed sgl-kernel")
    assert known["sglang"] == Fact(None, "sglang is not installed here")


def test_a_given_architecture_may_be_another_machines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(gpu=(8, 0)))
    known = detect({"gpu_arch": "sm90"})
    for name in ("gpu_name", "driver", "cuda", "batch_copy"):
        assert known[name] == Fact(None, "not given; gpu_arch was, and this machine's GPU may be another")
    assert detect({"gpu_arch": "sm90", "batch_copy": True})["batch_copy"] == Fact(True, "given")


def test_this_machines_gpu_has_a_name_and_software(monkeypatch: pytest.MonkeyPatch):
    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.159.04",
        NVMLError=NVMLError,
    )
    monkeypatch.setitem(sys.modules, "torch", fake_torch(gpu=(9, 0)))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    known = detect()
    assert known["gpu_name"] == Fact("NVIDIA H200", "torch.cuda on this machine")
    assert known["driver"] == Fact("580.159.04", "NVML on this machine")
    assert known["cuda"] == Fact("13.0", "torch's build")

    def fails() -> None:
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = fails
    assert detect()["driver"] == Fact(None, "NVML cannot say: Driver Not Loaded")


def test_a_cpu_server_has_no_gpu_and_no_copy_engine():
    known = detect({"device": "cpu"})
    assert known["gpu_arch"] == Fact("cpu", "follows from device")
    assert known["driver"] == Fact(None, "a CPU server has no GPU")
    assert known["batch_copy"] == Fact(False, "a CPU server has no copy engine")


@pytest.mark.parametrize(
    ("variable", "hub", "binary"),
    [
        (None, True, "sgl_kernel"),
        ("1", True, "sgl_kernel"),
        # Whether the Hub's can be loaded shows later, and where it cannot SGLang runs its own: a rule that
        # takes a fence away for the Hub's must not match.
        ("0", True, None),
        ("False", True, None),
        # SGLang falls back to its own without the package that loads from the Hub.
        ("0", False, "sgl_kernel"),
    ],
)
def test_whose_fa3_is_loaded(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, hub: bool, binary: str | None
):
    if variable is None:
        monkeypatch.delenv("SGLANG_USE_SGL_FA3_KERNEL", raising=False)
    else:
        monkeypatch.setenv("SGLANG_USE_SGL_FA3_KERNEL", variable)
    monkeypatch.setattr(machine_facts.importlib.util, "find_spec", lambda name: object() if hub else None)
    assert detect({"gpu_arch": "sm90"}).value("fa3_binary") == binary


def test_batches_are_what_the_driver_offers(monkeypatch: pytest.MonkeyPatch):
    from sglang_hicache.io_backends.device import driver

    monkeypatch.setitem(sys.modules, "torch", fake_torch(gpu=(9, 0)))
    monkeypatch.setattr(gpu_facts, "Driver", lambda: SimpleNamespace(batched=False, version=12_040))
    assert detect()["batch_copy"] == Fact(False, "the CUDA driver, version 12040")

    def missing() -> None:
        raise driver.DeviceUnavailableError("the CUDA driver does not start: no libcuda.so.1")

    monkeypatch.setattr(gpu_facts, "Driver", missing)
    known = detect()["batch_copy"]
    assert (known.value, known.source.startswith("the driver cannot be asked here: ")) == (None, True)
