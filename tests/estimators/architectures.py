"""Tiny random models of every kind, each with a batch and its loss for one row: cases as data."""

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from gradmatch.estimators import estimate
from tests import oracle

B, T, V = 5, 7, 23


def tokens(seed=0, rows=B, length=T, vocabulary=V):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, length), generator=generator)


def right_padding(rows=B, length=T):
    lengths = torch.tensor([length - n % 4 for n in range(rows)])
    return (torch.arange(length)[None] < lengths[:, None]).long()


def token_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


# How one row's loss is written out by hand, for each kind of batch.


def classifier_loss(model, row):
    inputs = {key: value for key, value in row.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, row["labels"], reduction="sum")


def causal_loss(model, row):
    """Of one row, without its padding: wherever that is, it counts for nothing."""
    if "attention_mask" in row:
        real = row["attention_mask"][0].bool()
        row = {key: row[key][:, real] for key in ("input_ids", "labels")}
    logits = model(row["input_ids"], use_cache=False).logits
    return token_loss(logits[:, :-1], row["labels"][:, 1:])


def per_token_loss(model, row):
    inputs = {key: value for key, value in row.items() if key != "labels"}
    return token_loss(model(**inputs).logits, row["labels"])


def seq2seq_loss(model, row):
    return token_loss(model(**row).logits, row["labels"])


def plain_loss(model, row):
    logits = model(row["x"])
    if logits.dim() == 3:
        return token_loss(logits, row["labels"])
    return F.cross_entropy(logits, row["labels"], reduction="sum")


def text(mask=True, classes=3, **extra):
    ids, attention = tokens(), right_padding()
    if mask:
        ids = ids.masked_fill(attention == 0, 1)
        extra["attention_mask"] = attention
    return {"input_ids": ids, "labels": torch.arange(B) % classes, **extra}


def language(side="right", mask=True):
    ids, attention = tokens(), right_padding()
    if side == "left":
        attention = attention.flip(1)
    labels = ids.masked_fill(attention == 0, -100)
    if not mask:
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids.masked_fill(attention == 0, 1), "attention_mask": attention, "labels": labels}


def masked_language():
    batch = language()
    keep = torch.arange(B * T).view(B, T) % 3 == 0
    batch["labels"] = batch["labels"].masked_fill(~keep, -100)
    return batch


def translation():
    labels = tokens(1, length=5)
    labels[1, 3:] = -100
    return {**{k: v for k, v in language().items() if k != "labels"}, "labels": labels}


def images(size=8, channels=3, classes=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(B, channels, size, size, generator=generator).double(),
        "labels": torch.arange(B) % classes,
    }


def plain(*shape, classes=3, places=None):
    generator = torch.Generator().manual_seed(0)
    labels = (
        torch.arange(B) % classes if places is None else torch.arange(B * places).view(B, places) % classes
    )
    return {"x": torch.randn(B, *shape, generator=generator).double(), "labels": labels}


ENCODER = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 1,
}  # fmt: skip
DECODER = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


class GroupedCNN(nn.Module):
    """Strides, groups, dilation, padding modes and BatchNorm in eval."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(6, 6, 3, dilation=2, padding="same", padding_mode="circular"), nn.GroupNorm(2, 6), nn.GELU(),
            nn.Conv2d(6, 4, 2, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16, 3)
        self.body[1].running_mean.normal_()
        self.body[1].running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Residual(nn.Module):
    """A block that adds in place, as ResNets do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        out = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class Signal(nn.Module):
    """Conv1d on a sequence, BatchNorm1d after it and on plain features."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, stride=2, groups=1), nn.BatchNorm1d(4)
        self.grouped = nn.Conv1d(4, 4, 2, groups=4)
        self.features, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.features(self.grouped(self.norm(self.conv(x))).mean(2)))


class Recurrent(nn.Module):
    """An LSTM; `batch_first` or not."""

    def __init__(self, batch_first, kind=nn.LSTM):
        super().__init__()
        self.batch_first = batch_first
        self.rnn, self.head = kind(4, 5, batch_first=batch_first), nn.Linear(5, 3)

    def forward(self, x):
        if self.batch_first:
            return self.head(self.rnn(x)[0][:, -1])
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


class Twice(nn.Module):
    """One layer called several times, and a recurrent cell."""

    def __init__(self):
        super().__init__()
        self.layer, self.cell, self.norm = nn.Linear(4, 4), nn.GRUCell(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = self.cell(torch.tanh(self.layer(x[:, t])), self.norm(self.layer(state)))
        return self.head(self.layer(state))


class NanoGPT(nn.Module):
    """Position embeddings without a batch dimension, tied output layer, weights used outside their modules."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(V, 8), nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, V, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x):
        x = x.long()
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype)
        return self.head(self.norm(self.block(h, src_mask=mask, is_causal=True)))


class OwnParameters(nn.Module):
    """Parameters used directly by modules with children, by the model itself, and through another's weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.mixing = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.inner(x * self.scale)
        for weight in self.mixing:
            x = torch.tanh(x @ weight)
        return self.head(F.linear(x, self.inner.weight))


class TimeFirst(nn.Module):
    """Everything inside is (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        h = self.norm(self.inner(x.transpose(0, 1)))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h.reshape(-1, 6)).view(x.shape[1], x.shape[0], 3).transpose(0, 1)


class Windows(nn.Module):
    """Examples folded into the leading dimension, as windows of images are."""

    def __init__(self):
        super().__init__()
        self.inner, self.conv, self.head = nn.Linear(4, 4), nn.Conv2d(1, 2, 2), nn.Linear(6, 3)

    def forward(self, x):  # (B, T, 4)
        h = self.inner(x.reshape(-1, 4))
        h = self.conv(h.view(-1, 1, 2, 2)).view(x.shape[0], x.shape[1], 2)
        return self.head(h[:, :3].flatten(1))


class StateSpace(nn.Module):
    """Mamba-like: parameters used through exp, a depthwise convolution and a scan."""

    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Linear(4, 6), nn.Conv1d(6, 6, 3, groups=6, padding=2)
        self.log_decay, self.skip = nn.Parameter(torch.randn(6)), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.conv(self.inner(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        state, out = torch.zeros_like(h[:, 0]), []
        for t in range(h.shape[1]):
            state = torch.exp(-torch.exp(self.log_decay)) * state + h[:, t]
            out.append(state + self.skip * h[:, t])
        return self.head(torch.stack(out, 1).mean(1))


def weight_normed():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


def adapted():
    import peft

    model = tf.BertForSequenceClassification(tf.BertConfig(**ENCODER))
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def partly_frozen():
    model = tf.BertForSequenceClassification(tf.BertConfig(**ENCODER))
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].attention.requires_grad_(False)
    return model


def gpt2():
    sizes = {"vocab_size": V, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=2))


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, num_key_value_heads=1))


def mlp():
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    )


# name -> (make the model, make the batch, loss of one row)
CASES = {
    "mlp": (mlp, lambda: plain(4), plain_loss),
    "mlp on positions": (mlp, lambda: plain(T, 4, places=T), plain_loss),
    "grouped cnn": (GroupedCNN, lambda: plain(3, 8, 8), plain_loss),
    "resnet-like": (Residual, lambda: plain(3, 6, 6), plain_loss),
    "conv1d": (Signal, lambda: plain(3, 9), plain_loss),
    "lstm": (lambda: Recurrent(True), lambda: plain(T, 4), plain_loss),
    "lstm, time first": (lambda: Recurrent(False), lambda: plain(T, 4), plain_loss),
    "lstm, time first, as many steps as examples": (lambda: Recurrent(False), lambda: plain(4, 4), plain_loss),
    "gru": (lambda: Recurrent(True, nn.GRU), lambda: plain(T, 4), plain_loss),
    "layer used twice": (Twice, lambda: plain(3, 4), plain_loss),
    "nano gpt": (NanoGPT, lambda: {"x": tokens(), "labels": tokens(2)}, plain_loss),
    "own parameters": (OwnParameters, lambda: plain(4), plain_loss),
    "time first": (TimeFirst, lambda: plain(T, 4, places=T), plain_loss),
    "time first, as many steps as examples": (TimeFirst, lambda: plain(4, 4, places=4), plain_loss),
    "windows": (Windows, lambda: plain(T, 4), plain_loss),
    "state space": (StateSpace, lambda: plain(T, 4), plain_loss),
    "weight norm": (weight_normed, lambda: plain(4), plain_loss),
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)), text, classifier_loss),
    "bert, two of it frozen": (partly_frozen, text, classifier_loss),
    "bert with lora": (adapted, text, classifier_loss),
    "bert, tokens": (
        lambda: tf.BertForTokenClassification(tf.BertConfig(**ENCODER)),
        lambda: {**language(), "labels": language()["labels"].clamp(max=2)}, per_token_loss,
    ),
    "bert, masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), masked_language, per_token_loss),
    "roberta": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER)), text, classifier_loss),
    "distilbert": (
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=V, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16, num_labels=3)
        ), text, classifier_loss,
    ),
    "albert": (
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**ENCODER, embedding_size=4)), text, classifier_loss,
    ),
    "deberta": (
        lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(
            **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            norm_rel_ebd="layer_norm", position_buckets=4,
        )), text, classifier_loss,
    ),
    "gpt2": (gpt2, language, causal_loss),
    "gpt2, padding left": (gpt2, lambda: language("left"), causal_loss),
    "opt": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(
            vocab_size=V, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, max_position_embeddings=16,
            word_embed_proj_dim=8, pad_token_id=1,
        )), language, causal_loss,
    ),
    "gpt neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**DECODER)), language, causal_loss),
    "llama": (llama, language, causal_loss),
    "llama, padding left": (llama, lambda: language("left"), causal_loss),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, num_key_value_heads=1)), language, causal_loss),
    "qwen2": (
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, num_key_value_heads=1, tie_word_embeddings=True)),
        language, causal_loss,
    ),
    "gemma": (
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=4)), language, causal_loss,
    ),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_key_value_heads=1, num_local_experts=3, experts_implementation="eager")),
        language, causal_loss,
    ),
    "mamba": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=V, hidden_size=8, state_size=3, num_hidden_layers=2, pad_token_id=1)),
        lambda: language(mask=False), causal_loss,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(
            vocab_size=V, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, relative_attention_num_buckets=4,
            pad_token_id=1, decoder_start_token_id=1,
        )), translation, seq2seq_loss,
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4, num_labels=3,
        )), images, classifier_loss,
    ),
    "convnext": (
        lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(
            depths=[1, 1], hidden_sizes=[4, 6], num_stages=2, patch_size=2, num_labels=3, image_size=16, layer_scale_init_value=0.5,
        )), lambda: images(16), classifier_loss,
    ),
}  # fmt: skip


def make(name):
    """The model in float64 with weights large enough to matter, its batch, and the loss of one row."""
    build, batch, loss = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model.eval(), batch(), loss


def as_batches(batch, step=None):
    """The batch as `estimate` takes it: tuples for plain modules, dicts for others; in pieces of `step` rows."""
    step = step or next(iter(batch.values())).shape[0]
    rows = next(iter(batch.values())).shape[0]
    for first in range(0, rows, step):
        piece = {key: value[first : first + step] for key, value in batch.items()}
        yield (piece["x"], piece["labels"]) if "x" in piece else piece


def squared(model, batch, loss=plain_loss):
    """The empirical Fisher by the slow loop over rows."""
    return oracle.mean_of_squares(oracle.per_example_gradients(model, batch, loss))


def error(model, batch, loss=plain_loss, batches=None, **options):
    """How far `estimate` is from it: the relative L1 distance."""
    expected = squared(model, batch, loss)
    given = as_batches(batch) if batches is None else batches
    options = {"method": "empirical_fisher", "progress": False, **options}
    return oracle.relative_l1(estimate(model, given, **options), expected)
