"""Models of random weights, by shape: for tests (`random:tiny`) and for measurements (`random:llama-3.1-8b`)."""

from __future__ import annotations

from typing import Any

# The byte-level tokenizer of random models knows three special tokens, whatever the real model's are: 0 unknown, 1 begin, 2 end.
_TOKENIZER = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
}

# Configs in the manner of a Hugging Face config.json; sizes of real shapes as their owners published them.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_TOKENIZER,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2_048,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        **_TOKENIZER,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
        "rope_theta": 100_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8_192,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_TOKENIZER,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8_192,
        },
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    },
}
