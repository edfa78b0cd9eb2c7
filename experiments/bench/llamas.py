"""Random Llama-like models with fine-tunes and curvature files, for the merging benchmark."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

SIZES = {  # hidden, intermediate, layers, vocabulary
    "30M": (384, 1024, 8, 20_000),
    "125M": (768, 2048, 12, 32_000),
    "500M": (1536, 4096, 14, 32_000),
}


def generate(folder: Path, size: str, dtype: str, count: int) -> dict[str, list[str]]:
    """Base and fine-tunes of a random Llama-like model with their curvature files; kept for the next run."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, vocabulary = SIZES[size]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "dtype": dtype,
    }  # fmt: skip
    models, curvatures = [], []
    for number in range(count):
        target, known = folder / f"{size}-{dtype}-{number}", folder / f"{size}-{number}.curvature.safetensors"
        models.append(str(target))
        curvatures.append(str(known))
        if not (target / "config.json").is_file():
            generator = torch.Generator()
            target.mkdir(exist_ok=True)
            tensors = {}
            for name, shape in shapes.items():
                base = 0.02 * torch.randn(shape, generator=generator.manual_seed(hash_of(name)))
                noise = (
                    torch.randn(shape, generator=generator.manual_seed(hash_of(name) + number))
                    if number
                    else 0.0
                )
                tensors[name] = (base + 1e-3 * noise).to(getattr(torch, dtype))
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text(json.dumps(config))
        if not known.is_file():
            generator = torch.Generator().manual_seed(1000 + number)
            mean = {f"mean/{n}": 1e-5 * torch.rand(s, generator=generator).pow(4) for n, s in shapes.items()}
            save_file(
                mean, known, metadata={"format_version": "1", "num_examples": "10000", "estimator": "fisher"}
            )
    os.sync()
    return {"models": models, "curvatures": curvatures}


def hash_of(name: str) -> int:
    return zlib.crc32(name.encode())
