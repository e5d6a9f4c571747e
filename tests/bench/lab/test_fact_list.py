"""The table of facts says of each what detection does with it."""

from __future__ import annotations

from sglang_hicache.bench.lab import fact_list
from sglang_hicache.io_backends.sglang.handover.machine_facts import detect
from sglang_hicache.policy.fact_spec import FactSource
from sglang_hicache.policy.fact_table import CONDITIONS, SERVER_FACTS

_, _, *LINES = fact_list.table().splitlines()
ROWS = {row[0].strip("`"): row[1:] for row in ([*map(str.strip, line.split("|"))][1:-1] for line in LINES)}


def test_each_fact_has_a_line_with_its_meaning_and_its_values() -> None:
    assert list(ROWS) == list(CONDITIONS)
    for name, (meaning, values, _, _) in ROWS.items():
        spec = CONDITIONS[name]
        assert meaning == spec.meaning
        first = values.removeprefix("those of `").removesuffix("`") if "those of" in values else name
        assert CONDITIONS[first].values == spec.values
        if first == name:
            assert all(f"`{value}`" in values for value in spec.values)


def test_what_a_fact_is_where_nobody_says_is_what_detection_makes_of_it() -> None:
    found = detect({"gpu_arch": "sm90"})
    for name, spec in SERVER_FACTS.items():
        fact, said = found[name], ROWS[name][3]
        if spec.source is FactSource.MACHINE:
            assert said == "looked for on this machine; else unknown"
        elif name == "device":
            assert (said, fact.source) == ("by `gpu_arch`", "follows from gpu_arch")
        elif fact.value is None:
            assert said == f"unknown: {fact.source.removeprefix('not given; ')}"
        else:
            assert said == f"`{fact.value}`: {fact.source}".lower().replace("sglang", "SGLang")
