"""Models made on the spot: nothing is downloaded, and the KV cache has the shape of one that people serve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...policy.names import check_name
from .. import tiny_model
from ..random_model import write_random_model


@dataclass(frozen=True)
class ServedModel:
    """What a server serves.

    Attributes:
        name: of the model, or the path that was given.
        path: its folder.
        vocab_size: token ids of prompts are below this.
        args: options that a server of it needs.
        real_weights: whether its answers turn on the KV cache; with dummy weights they do not, and a wrong
            cache would not show.
    """

    name: str
    path: str
    vocab_size: int
    args: tuple[str, ...] = ()
    real_weights: bool = True


KVHEAVY: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 36,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""The KV cache of Qwen3-8B (36 layers, 8 KV heads of 128) on 0.46B parameters: write-back has the most work
for the least computing."""

MLAHEAVY: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    # No layer has experts. SGLang reads what it would need of them all the same, and transformers' class for
    # this model has no default for the last two.
    "first_k_dense_replace": 27,
    "num_experts_per_tok": 6,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""The attention of DeepSeek-V2-Lite, and with it its KV cache, on 0.7B parameters: no experts."""

SWAHEAVY: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""The attention of gpt-oss-20b: 24 layers, 8 KV heads of 64, every second layer with a window of 128 tokens.
Each layer has 4 small experts."""

DSAHEAVY: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    # SGLang's sparse kernels on Hopper take multiples of 64.
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    # As above: no layer has experts, but SGLang reads what it would need of them.
    "first_k_dense_replace": 16,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
"""The attention of DeepSeek-V3.2 with its indexer, on 16 layers of 64 heads."""

MAMBAHEAVY: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""Qwen3-Next in small: to each layer of attention three of linear attention, with states of 0.5 MiB."""

_SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
        "max_position_embeddings": 32768,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
}

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Give a made model a tokenizer, whose tokens are words: SGLang's own benchmark sends text.

    Raises:
        ModuleNotFoundError: transformers or tokenizers is not installed (SGLang brings both).
    """
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made: Any = WordLevel({f"t{token}": token for token in range(vocab_size)}, unk_token="t0")
    tokenizer = Tokenizer(made)
    split: Any = WhitespaceSplit()
    tokenizer.pre_tokenizer = split
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, chat_template=_CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)


TINY, HEAVY, MLA = "tiny", "kvheavy", "mlaheavy"
SWA, DSA, MAMBA = "swaheavy", "dsaheavy", "mambaheavy"
_RANDOM = {
    HEAVY: ("llama", KVHEAVY),
    MLA: ("deepseek_v2", MLAHEAVY),
    SWA: ("gpt_oss", SWAHEAVY),
    DSA: ("deepseek_v32", DSAHEAVY),
    MAMBA: ("qwen3_next", MAMBAHEAVY),
}
NAMES = (TINY, *_RANDOM, *_SHAPES)
"""``tiny`` is the demo's model, for the CPU engine; the last two have dummy weights."""


def make(name: str, folder: Path) -> ServedModel:
    """Write a model into a folder of its own below ``folder`` unless it is there, or take one from a path.

    Raises:
        NameProblem: ``name`` is neither one of `NAMES` nor a folder with a config.json.
        OSError: the folder cannot be written.
    """
    given = Path(name)
    if (given / "config.json").is_file():
        config = json.loads((given / "config.json").read_text(encoding="utf-8"))
        vocab = int(config.get("text_config", config)["vocab_size"])
        return ServedModel(name, str(given.resolve()), vocab)
    check_name("model", name, NAMES)
    made = _make(name, (folder / name).resolve())
    write_tokenizer(Path(made.path), made.vocab_size)
    return made


def _make(name: str, path: Path) -> ServedModel:
    if name == TINY:
        return ServedModel(name, str(tiny_model.write(path)), tiny_model.VOCAB_SIZE)
    if name in _RANDOM:
        model_type, config = _RANDOM[name]
        written = write_random_model(path, config, model_type=model_type)
        return ServedModel(name, str(written), int(config["vocab_size"]))
    shape = _SHAPES[name]
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape, indent=1) + "\n", encoding="utf-8")
    return ServedModel(
        name, str(path), int(shape["vocab_size"]), ("--load-format", "dummy"), real_weights=False
    )
