"""Models with random weights on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_hicache.bench.random_model import write_random_model
from sglang_hicache.bench.serve.models import MAMBAHEAVY

pytestmark = pytest.mark.sglang


def test_what_was_asked_for_is_in_the_config(tmp_path: Path) -> None:
    """transformers keeps ``layer_types`` of Qwen3-Next, and SGLang reads what they were made of."""
    asked = {
        **MAMBAHEAVY,
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 16},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8},
        **{"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    }
    folder = write_random_model(tmp_path / "model", asked, model_type="qwen3_next")
    config = json.loads((folder / "config.json").read_text())
    assert {name: config.get(name) for name in asked} == asked
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["dtype"] == "bfloat16"
