"""The models and batches on which estimators are timed, all with random weights: name -> (model, batch, loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Shape:
    """One benchmark case; `batch` is what `estimate` takes, `loss` the loss of a batch summed over its examples."""

    name: str
    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    examples: int
    target: float

    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())


def _plain(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _classifier(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="sum")


def _causal(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def mlp(examples: int = 128, width: int = 1024) -> Shape:
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    batch = (torch.randn(examples, 784), torch.randint(0, 10, (examples,)))
    return Shape(f"MLP, {examples}", model, batch, _plain, examples, 1.3)


def cnn(examples: int = 64) -> Shape:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    batch = (torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,)))
    return Shape(f"CNN, {examples}", model, batch, _plain, examples, 1.4)


def bert(examples: int = 16, length: int = 64, width: int = 384) -> Shape:
    import transformers

    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=6, num_attention_heads=width // 32, intermediate_size=4 * width,
    )  # fmt: skip
    batch = _text(examples, length, config.vocab_size)
    model = transformers.BertForSequenceClassification(config)
    return Shape(f"BERT 6 x {width}, {examples} x {length}", model, batch, _classifier, examples, 1.15)


def roberta(examples: int = 4, length: int = 64) -> Shape:
    import transformers

    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    model = transformers.RobertaForSequenceClassification(config)
    return Shape(
        f"RoBERTa-base, {examples} x {length}",
        model,
        _text(examples, length, 50265),
        _classifier,
        examples,
        1.15,
    )


def gpt2(examples: int = 8, length: int = 128) -> Shape:
    import transformers

    config = transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=256)
    ids = torch.randint(0, config.vocab_size, (examples, length))
    model = transformers.GPT2LMHeadModel(config)
    return Shape(
        f"GPT-2-like 30M, {examples} x {length}",
        model,
        {"input_ids": ids, "labels": ids},
        _causal,
        examples,
        1.25,
    )


def _text(examples: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(5, vocabulary, (examples, length)),
        "attention_mask": torch.ones(examples, length, dtype=torch.long),
        "labels": torch.arange(examples) % 2,
    }


SHAPES: dict[str, Callable[[], Shape]] = {
    "mlp": mlp,
    "cnn": cnn,
    "bert": bert,
    "roberta": roberta,
    "gpt2": gpt2,
    "short": lambda: bert(128, 8),
}


def llama(examples: int = 8, length: int = 128) -> Shape:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 8000, (examples, length))
    model = transformers.LlamaForCausalLM(config)
    return Shape(
        f"Llama-like, {examples} x {length}",
        model,
        {"input_ids": ids, "labels": ids},
        _causal,
        examples,
        1.15,
    )


def vit(examples: int = 16) -> Shape:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, image_size=112
    )
    batch = {"pixel_values": torch.randn(examples, 3, 112, 112), "labels": torch.arange(examples) % 2}
    model = transformers.ViTForImageClassification(config)
    return Shape(f"ViT-small/6, {examples}", model, batch, _pictures, examples, 1.15)


def _pictures(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="sum")


def t5(examples: int = 8, length: int = 64) -> Shape:
    import transformers

    config = transformers.T5Config(
        vocab_size=8000, d_model=384, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=0
    )
    ids = torch.randint(1, 8000, (examples, length))
    model = transformers.T5ForConditionalGeneration(config)
    return Shape(
        f"T5, {examples} x {length}", model, {"input_ids": ids, "labels": ids}, _pairs, examples, 1.15
    )


def _pairs(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


class _Torch(nn.Module):
    """torch.nn's own transformer layers, or its LSTM, over tokens."""

    def __init__(self, kind: str, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8000, width)
        if kind == "LSTM":
            self.body: nn.Module = nn.LSTM(width, width, 2, batch_first=True)
        else:
            self.body = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True),
                4,
                enable_nested_tensor=False,
            )
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.body(self.embedding(ids))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


def _tokens(kind: str, examples: int = 16, length: int = 64) -> Shape:
    batch = (torch.randint(0, 8000, (examples, length)), torch.arange(examples) % 2)
    return Shape(f"torch.nn {kind}, {examples} x {length}", _Torch(kind), batch, _plain, examples, 1.15)


GENERAL: tuple[Callable[[], Shape], ...] = (
    llama, vit, t5, lambda: _tokens("MultiheadAttention"), lambda: _tokens("LSTM"),
)  # fmt: skip
