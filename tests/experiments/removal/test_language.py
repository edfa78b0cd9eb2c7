"""The language model's part: batches, losses, perplexity, continuations."""

import math

import numpy as np
import pytest
import torch

from experiments.removal import language
from experiments.tasks.texts import Text

TEXTS = [Text("the cat", "1"), Text("b c d e", "2", context="say:"), Text("a longer text than these", "3")]


@pytest.fixture
def loaded(language_model):
    return language.load(language_model)


def test_losses_are_those_of_single_texts_and_leave_contexts_out(loaded):
    model, tokenizer = loaded
    table = language.losses(model, tokenizer, TEXTS, max_length=32, batch_size=3, precision="float32")
    for text, (nats, tokens) in zip(TEXTS, table, strict=True):
        ids, context = language.encode(text, tokenizer, 32)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = -sum(float(log_probs[i - 1, ids[i]]) for i in range(max(1, context), len(ids)))
        assert tokens == len(ids) - max(1, context)
        assert nats == pytest.approx(expected, rel=1e-4)
    assert language.perplexity(table) == pytest.approx(math.exp(table[:, 0].sum() / table[:, 1].sum()))
    assert language.perplexity(np.array([[1e6, 1.0]])) == math.inf


def test_labels_hide_padding_and_context(loaded):
    _, tokenizer = loaded
    ((indices, batch),) = language.batches(TEXTS[:2], tokenizer, max_length=32, batch_size=2)
    assert indices == [1, 0]  # the longest first
    assert (batch["labels"][0, :4] == language.IGNORED).all()
    assert batch["labels"][0, 4] != language.IGNORED
    assert (batch["labels"][1][batch["attention_mask"][1] == 0] == language.IGNORED).all()


def test_continuations_are_seeded_and_keep_their_order(loaded):
    model, tokenizer = loaded
    prompts = ["a", "a much longer prompt", "mid size"]
    shared = {"tokens": 6, "top_p": 0.9, "precision": "float32", "batch_size": 2}
    found = language.continuations(model, tokenizer, prompts, seed=1, **shared)
    assert found == language.continuations(model, tokenizer, prompts, seed=1, **shared)
    assert found != language.continuations(model, tokenizer, prompts, seed=2, **shared)
    assert all(text is not None and not text.startswith("a much") for text in found)


def test_nan_weights_are_a_recorded_refusal(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    shared = {"tokens": 3, "top_p": 0.9, "precision": "float32"}
    assert language.continuations(model, tokenizer, ["a", "bc"], seed=0, **shared) == [None, None]


def test_logits_that_break_on_the_way_are_refused_too(loaded, monkeypatch):
    model, tokenizer = loaded
    given, plain = [], model.forward

    def forward(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        given.append(outputs)
        if len(given) == 2:
            outputs.logits.fill_(float("nan"))
        return outputs

    monkeypatch.setattr(model, "forward", forward)
    shared = {"tokens": 3, "top_p": 0.9, "precision": "float32"}
    assert language.continuations(model, tokenizer, ["a"], seed=0, **shared) == [None]
    assert len(given) == 2


def test_an_error_of_generation_that_is_no_refusal_is_raised(loaded, monkeypatch):
    model, tokenizer = loaded

    def generate(**ignored):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        language.continuations(model, tokenizer, ["a"], seed=0, tokens=3, top_p=0.9, precision="float32")


def test_a_prompt_longer_than_the_context(loaded):
    model, tokenizer = loaded
    with pytest.raises(
        ValueError, match=r"has 45 tokens; with 10 new ones the context of 48 leaves room for 38"
    ):
        language.continuations(
            model, tokenizer, ["x" * 45], tokens=10, top_p=0.9, seed=0, precision="float32"
        )


def test_texts_that_leave_nothing_to_predict(loaded):
    _, tokenizer = loaded
    with pytest.raises(ValueError, match="the set is empty"):
        list(language.batches([], tokenizer, max_length=8, batch_size=2))
    with pytest.raises(ValueError, match=r"within 4 tokens no token of 'b c' is left"):
        list(
            language.batches(
                [Text("b c", "1", context="a long context")], tokenizer, max_length=4, batch_size=2
            )
        )


def test_no_model_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with a model, and no hub within reach"):
        language.save_base(tmp_path / "out", source=str(tmp_path / "absent"))
