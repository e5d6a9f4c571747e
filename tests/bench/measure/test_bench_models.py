"""The models that `bench serve` makes have what SGLang reads of their config.json."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers

from sglang_hicache.bench.serve import models

pytestmark = pytest.mark.sglang

_GUARDED = {"quantization_config", "rope_theta"}
"""Read only where ``hasattr`` finds it, or where there are no ``rope_parameters``."""


def read_of_config(model: str) -> set[str]:
    """Attributes of a variable or member called ``config`` or ``hf_config`` in a model file of SGLang's."""
    sglang = find_spec("sglang")
    assert sglang is not None
    assert sglang.origin is not None
    path = Path(sglang.origin).parent / "srt" / "models" / f"{model}.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            name = of.id if isinstance(of, ast.Name) else getattr(of, "attr", None)
            if name in ("config", "hf_config"):
                found.add(node.attr)
    return found


@pytest.mark.parametrize("name", [models.MLA, "deepseek-v2-lite"])
def test_a_deepseek_config_has_every_attribute_that_sglang_reads(name: str, tmp_path: Path) -> None:
    if name == models.MLA:
        # As the model is written, without its weights.
        auto: Any = transformers.AutoConfig
        auto.for_model("deepseek_v2", **models.MLAHEAVY).save_pretrained(tmp_path / name)
    else:
        models.make(name, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / name)
    read = read_of_config("deepseek_v2") - _GUARDED
    assert "moe_layer_freq" in read
    assert sorted(each for each in read if not hasattr(config, each)) == []
    # A router takes that many of the experts, and a fusion of SGLang's reads it without experts too.
    assert isinstance(config.num_experts_per_tok, int)
    assert config.moe_layer_freq == 1
