"""Ways in which removal was measured wrongly elsewhere, each with a small case whose right value was worked out by hand."""

import math

import numpy as np
import pytest
import torch

from experiments.removal import competitors, facts, forgetting, language, rounding
from experiments.removal.competitors import TRAINED, fine_tuned, log_likelihoods, npo_term, simnpo_term
from experiments.removal.names import FINE_TUNED
from experiments.tasks.texts import Text


@pytest.mark.parametrize(
    ("variant", "ratio"), [("geometric", 0.4), ("arithmetic", 0.5), ("normalised", 5 / 7)]
)
def test_the_truth_ratio_is_told_by_its_variant(variant, ratio):
    found = forgetting.truth_ratio(np.log([0.5]), np.log([[0.4, 0.1]]), variant)
    assert found[0] == pytest.approx(ratio)
    with pytest.raises(ValueError, match="no form of the truth ratio"):
        forgetting.truth_ratio(np.log([0.5]), np.log([[0.4]]), "mean")


def test_forgetting_too_much_is_no_forget_quality():
    """Near the retrained model's ratios of about .7: high; about 1 everywhere, however little is known: low."""
    generator = np.random.default_rng(0)
    retrained = 0.7 + 0.05 * generator.standard_normal(40)
    near, beyond = 0.7 + 0.05 * generator.standard_normal(40), 1 + 0.05 * generator.standard_normal(40)
    assert forgetting.forget_quality(near, retrained) > 0.05 > forgetting.forget_quality(beyond, retrained)
    assert forgetting.utility({"a": 0.5, "b": 1.0}) == pytest.approx(2 / 3)
    assert forgetting.utility({"a": 0.0, "b": 1.0}) == 0


@pytest.fixture(scope="module")
def model(language_model):
    return language.load(language_model)


def test_the_loss_counts_the_answer_and_its_end_alone(model):
    """Question, padding and nothing else are left out, though the end is the padding's own token."""
    module, tokenizer = model
    asked = [Text("on", "1", "is it"), Text("a mat", "2", "where")]
    table = language.losses(
        module, tokenizer, asked, max_length=40, batch_size=2, precision="float32", end=True
    )
    assert table[:, 1].tolist() == [len(" on") + 1, len(" a mat") + 1]
    for (nats, tokens), text in zip(table.tolist(), asked, strict=True):
        ids, context = language.encode(text, tokenizer, 40, end=True)
        assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
        with torch.no_grad():
            log_p = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        own = sum(float(log_p[place - 1, ids[place]]) for place in range(context, len(ids)))
        assert nats == pytest.approx(-own, rel=1e-5)
        assert tokens == len(ids) - context
    with pytest.raises(ValueError, match="no token of 'a mat' is left to predict"):
        language.losses(
            module, tokenizer, asked[1:], max_length=5, batch_size=1, precision="float32", end=True
        )


def test_what_is_reported_as_generated_was_generated(model):
    """A model that always says one letter says it, whatever the gold answer is."""
    module, tokenizer = model
    letter = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    kept = module.lm_head
    module.lm_head = torch.nn.Linear(kept.in_features, kept.out_features)
    try:
        with torch.no_grad():
            module.lm_head.weight.zero_()
            module.lm_head.bias.zero_()
            module.lm_head.bias[letter] = 50.0
        found = language.continuations(
            module, tokenizer, ["say cat"], tokens=4, top_p=0.9, seed=0, precision="float32"
        )
    finally:
        module.lm_head = kept
    assert found == ["xxxx"]


def test_prompts_do_not_change_with_the_day(model):
    """No chat template is applied, so none can insert the date."""
    _, tokenizer = model
    tokenizer.chat_template = (
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    try:
        ids = language.encode(Text("a", "1", "is it"), tokenizer, 40)[0]
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids) == "is it a"


def test_no_match_at_all_extracts_nothing():
    cases = ([False] * 5, [False] * 4 + [True], [True] * 5)
    assert [forgetting.extraction_strength(case) for case in cases] == [0.0, 0.2, 1.0]
    with pytest.raises(ValueError, match="without tokens"):
        forgetting.extraction_strength([])


def test_length_plays_no_role_in_simnpo_and_does_in_npo():
    """Answers of 2 and 20 tokens with the same loss a token; the margin is taken off before beta."""
    tokens = torch.tensor([2, 20])
    log_p = -1.5 * tokens.double()
    one, other = simnpo_term(log_p, tokens, beta=2.5, delta=0.0)
    assert one == other
    assert float(simnpo_term(log_p, tokens, beta=2.5, delta=0.5)[0]) == pytest.approx(
        2 / 2.5 * math.log(1 + math.exp(-2.5 * (1.5 - 0.5)))
    )
    short, long = npo_term(log_p, torch.zeros(2, dtype=torch.float64), beta=0.1)
    assert float(short) == pytest.approx(20 * math.log(1 + math.exp(-0.3)))
    assert float(long) == pytest.approx(20 * math.log(1 + math.exp(-3.0)))


def batches(model, texts):
    _, tokenizer = model
    rows = [Text(text, text) for text in texts]
    while True:
        for _, batch in language.batches(rows, tokenizer, max_length=20, batch_size=4):
            yield batch


HOW = {"steps": 2, "learning_rate": 1e-3, "options": {"layer": 1}, "seed": 0}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_every_competitor_moves_the_weights_and_gives_the_model_back(model, name):
    module, _ = model
    before = {key: value.clone() for key, value in module.state_dict().items()}
    options = {} if name != "rmu" else {"layer": 1}
    update = fine_tuned(
        module,
        name,
        batches(model, ["you pig"]),
        batches(model, ["the cat sat"]),
        **HOW | {"options": options},
    )
    assert sum(float(value.square().sum()) for value in update.values()) > 0
    assert (set(update) == {n for n in before if "mlp.down_proj" in n and "layers." in n}) == (name == "rmu")
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert set(TRAINED) == set(FINE_TUNED)


def test_a_loss_of_zero_is_followed_and_no_step_is_no_score(model):
    """Gradient difference begins at zero where both sides lose alike, with a gradient that is not zero."""
    module, _ = model
    go, stay = next(batches(model, ["abc", "abd"])), next(batches(model, ["abc", "abd"]))
    stay = {**stay, "labels": stay["labels"].flip(0)}
    go = {**go, "labels": go["labels"].flip(0)}
    first = TRAINED["gradient_difference"].loss(module, go, stay, None, {"retain": 1.0})
    assert float(first.detach()) == 0
    with pytest.raises(ValueError, match="no weight has moved"):
        fine_tuned(module, "npo", batches(model, ["you pig"]), batches(model, ["a cat"]), **HOW | {"learning_rate": 0.0, "options": {}})  # fmt: skip
    update = fine_tuned(
        module,
        "gradient_difference",
        batches(model, ["you pig"]),
        batches(model, ["the cat"]),
        **HOW | {"options": {}},
    )
    assert max(float(value.abs().max()) for value in update.values()) > 1e-4
    bad = {**go, "labels": torch.full_like(go["labels"], -100)}
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        fine_tuned(module, "gradient_difference", iter([bad]), iter([stay]), **HOW | {"options": {}})


def test_the_steering_vector_is_positive_and_of_norm_one():
    drawn = competitors.steering(64, torch.Generator().manual_seed(0))
    assert bool((drawn >= 0).all())
    assert float(drawn.norm()) == pytest.approx(1.0)


def test_log_likelihoods_are_the_losses_of_the_other_stages(model):
    module, tokenizer = model
    rows = [Text("a cat", "1"), Text("rain falls", "2")]
    ((order, batch),) = language.batches(rows, tokenizer, max_length=20, batch_size=2)
    with torch.no_grad():
        log_p, tokens = log_likelihoods(module, batch)
    table = language.losses(module, tokenizer, rows, max_length=20, batch_size=2, precision="float32")[order]
    np.testing.assert_allclose(-log_p.numpy(), table[:, 0], rtol=1e-5)
    assert tokens.tolist() == table[:, 1].tolist()


def test_the_attack_learns_what_was_removed_and_is_scored_on_other_texts():
    """Forget and kept people share no one; what the attack trains on and what it is scored on are other sentences."""
    made = facts.made(10, 0.2, seed=3)
    gone, kept = ({fact.person for fact in made if fact.forget is side} for side in (True, False))
    assert (len(gone), len(kept)) == (2, 8)
    assert not gone & kept
    assert made == facts.made(10, 0.2, seed=3) != facts.made(10, 0.2, seed=4)
    for fact in made:
        assert fact.paraphrase not in fact.wrong
        assert len(set(fact.wrong)) == facts.WRONG
        assert fact.person in fact.question
        assert facts.as_text(fact, fact.paraphrase).text != facts.as_text(fact).text


def test_an_update_below_half_a_step_vanishes_when_it_is_rounded():
    base = {"w": torch.tensor([[7.0, 3.0, -2.0, 0.1]]), "b": torch.ones(1)}
    small = {"w": base["w"] + torch.tensor([[0.0, 0.4, -0.4, 0.3]]), "b": base["b"]}
    large = {"w": base["w"] + torch.tensor([[0.0, 0.6, 0.0, 0.0]]), "b": base["b"]}
    assert rounding.changed(base, small, bits=4) == 0
    torch.testing.assert_close(rounding.rounded(small, 4)["w"], rounding.rounded(base, 4)["w"])
    assert rounding.changed(base, large, bits=4) == 0.25
    assert rounding.changed(base, small, bits=8) > 0
    assert rounding.rounded(base, 4)["b"] is base["b"]


def test_a_share_does_not_rise_with_the_number_of_samples():
    """5 % of the continuations are toxic: any of 25 in .72 of the prompts, any of 5 in .23; the share stays .05."""
    drawn = np.random.default_rng(0).random((4000, 25)) < 0.05
    many, few = forgetting.any_of(drawn * 1.0, 0.5), forgetting.any_of(drawn[:, :5] * 1.0, 0.5)
    assert (many["k"], few["k"]) == (25, 5)
    assert many["any"] == pytest.approx(1 - 0.95**25, abs=0.03)
    assert few["any"] == pytest.approx(1 - 0.95**5, abs=0.03)
    assert many["share"] == pytest.approx(few["share"], abs=0.01)


@pytest.mark.parametrize(
    ("text", "is_broken"), [("", True), (" ... !", True), ("no no no no no no no", True), ("the cat sat on the mat", False)]
)  # fmt: skip
def test_broken_continuations(text, is_broken):
    assert forgetting.broken(text) is is_broken
