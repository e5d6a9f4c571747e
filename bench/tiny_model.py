"""A tiny random Llama on disk, whose outputs depend on the KV cache.

SGLang's own `--load-format dummy` draws weights so small that attention hardly matters: a server that
loses the last layer's V on the way to the host still answers every prompt alike. Weights of standard
deviation 0.25 make the output turn on what attention reads, so that a damaged KV cache shows.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .random_model import write_random_model

VOCAB_SIZE = 512

# Grouped-query attention (two KV heads under four query heads), because that is what most served models use.
_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}


def write(folder: Path, *, seed: int = 0) -> Path:
    """Write the model (bfloat16, no tokenizer) into `folder`, unless it is there already, and return that.

    Requests to a server of this model carry `input_ids` below `VOCAB_SIZE`.

    Raises:
        ModuleNotFoundError: transformers or torch is not installed (SGLang brings both).
        OSError: `folder` cannot be written.
    """
    return write_random_model(folder, _CONFIG, seed=seed)


def environment() -> dict[str, str]:
    """Variables that spare a server of this model the import of SGLang's some 200 other models: 3 s of 25."""
    sglang = find_spec("sglang")
    if sglang is None or sglang.origin is None:
        return {}
    models = Path(sglang.origin).parent / "srt" / "models"
    others = sorted(path.stem for path in models.glob("*.py") if path.stem not in ("__init__", "llama"))
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(others)}
