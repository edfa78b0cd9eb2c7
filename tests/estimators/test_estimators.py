"""Every estimator against its definition, and the relations between them."""

import math

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmatch.estimators import Bernoulli, Categorical, Gaussian, estimate
from tests import oracle
from tests.estimators.architectures import (
    ENCODER,
    V,
    as_batches,
    causal_loss,
    error,
    language,
    make,
    mlp,
    plain,
    squared,
)


def logits_of(model, row):
    inputs = {key: value for key, value in row.items() if key not in ("labels", "x")}
    return (model(row["x"]) if "x" in row else model(**inputs).logits)[0]


@pytest.mark.parametrize("name", ["mlp", "grouped cnn", "bert", "vit", "layer used twice", "own parameters"])
@pytest.mark.parametrize("method", ["ggn", "fisher"])
def test_exact_expectation_over_labels_is_the_ggn(name, method):
    model, batch, _ = make(name)
    expected = oracle.expected_squares(model, batch, logits_of, oracle.softmax_covariance)
    found = estimate(model, as_batches(batch, 2), method=method, labels="exact")
    assert found.info["labels"] == "exact expectation over labels"
    assert oracle.relative_l1(found, expected) < 1e-9


def test_two_classes_are_exact_by_default_and_info_says_so():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 2)).double(), plain(4, classes=2)
    expected = oracle.expected_squares(model, batch, logits_of, oracle.softmax_covariance)
    found = estimate(model, as_batches(batch))
    assert oracle.relative_l1(found, expected) < 1e-9
    assert (found.info["labels"], found.info["samples"]) == ("exact expectation over labels", "1")
    assert estimate(model, as_batches(batch), labels="sampled").info["labels"] == "sampled from the model"
    many = estimate(mlp(), [torch.randn(5, 4)])  # three classes need two columns: more than the one draw
    assert many.info["labels"] == "sampled from the model"


def gaussian_covariance(variance):
    return lambda logits: torch.eye(len(logits)).double() / variance


def bernoulli_covariance(logits):
    p = torch.sigmoid(logits)
    return torch.diag(p * (1 - p))


OTHERS = [
    (Gaussian(0.25), gaussian_covariance(0.25)),
    ("regression", gaussian_covariance(1.0)),
    ("bernoulli", bernoulli_covariance),
]


@pytest.mark.parametrize(("likelihood", "covariance"), OTHERS)
def test_ggn_of_other_likelihoods(likelihood, covariance):
    model, batch, _ = make("mlp")
    batch["labels"] = torch.rand(5, 3).round().double()
    expected = oracle.expected_squares(model, batch, logits_of, covariance)
    found = estimate(model, as_batches(batch, 3), method="ggn", likelihood=likelihood)
    assert oracle.relative_l1(found, expected) < 1e-9


# Unbiasedness. Each statistic is a mean over many independent runs, compared at 5 standard errors of the run-to-run
# spread, and only the trace is compared, so one per test; the seeds are fixed.


def trace(curvature):
    return float(sum(curvature[name].sum() for name in curvature))


def unbiased(model, inputs, expected, runs=60, **options):
    """Whether the mean trace over seeds is the expected one, to 5 standard errors."""
    target = float(sum(value.sum() for value in expected.values()))
    options = {"progress": False, **options}
    found = torch.tensor([trace(estimate(model, [inputs], seed=seed, **options)) for seed in range(runs)])
    assert float(found.std()) > 0
    return abs(float(found.mean()) - target) < 5 * float(found.std()) / math.sqrt(runs)


SAMPLED = {
    "classification": ("classification", oracle.softmax_covariance),
    "regression": (Gaussian(0.5), gaussian_covariance(0.5)),
    "bernoulli": ("bernoulli", bernoulli_covariance),
}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"reduction": "batch"}], ids=str)
def test_sampled_labels_are_unbiased(name, options):
    likelihood, covariance = SAMPLED[name]
    model, batch, _ = make("mlp")
    expected = oracle.expected_squares(model, batch, logits_of, covariance)
    assert unbiased(model, batch["x"], expected, labels="sampled", likelihood=likelihood, **options)


def test_a_true_label_batch_square_would_be_biased_and_is_refused():
    """The trap: near an optimum the square of a batch's mean gradient is 1/B of the mean of squares."""
    model, batch, loss = make("mlp")
    gradients = oracle.per_example_gradients(model, batch, loss)
    squares = sum(float(value.sum()) for value in oracle.mean_of_squares(gradients).values())
    centred = {name: value - sum(g[name] for g in gradients) / 5 for name, value in gradients[0].items()}
    assert set(centred) == set(gradients[0])
    found = estimate(model, as_batches(batch, 5), method="empirical_fisher")
    assert trace(found) == pytest.approx(squares, rel=1e-9)
    with pytest.raises(ValueError, match='reduction="batch" is right only for method="fisher"'):
        estimate(model, as_batches(batch), method="empirical_fisher", reduction="batch")


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "grouped cnn", "t5"])
def test_batch_size_does_not_matter(name):
    model, batch, _ = make(name)
    options = {"samples": 2, "seed": 3, "labels": "sampled", "gradient": True}
    whole = estimate(model, as_batches(batch), **options)
    for step in (1, 2, 4):
        pieces = estimate(model, as_batches(batch, step), **options)
        assert oracle.relative_l1(pieces, whole) < 1e-9
        assert pieces.num_examples == whole.num_examples == 5
        for key in whole:
            torch.testing.assert_close(pieces.gradient(key), whole.gradient(key), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk", ["auto", 2, "1 KB", "30KB", "2GB"])
def test_chunks_change_memory_not_the_result(chunk):
    model, batch, _ = make("gpt2")
    whole, pieces = (
        estimate(model, as_batches(batch), chunk=each, gradient=True, labels="sampled", progress=False)
        for each in (None, chunk)
    )
    assert oracle.relative_l1(pieces, whole) < 1e-9
    assert pieces.info["examples_seen"] == "5"


SHAPES = [
    (3, torch.tensor([0, 1, 2, 0]), "classification"),
    (1, torch.tensor([0, 1, 1, 0]), "bernoulli"),
    (3, torch.randn(4, 3), "regression"),
    (1, torch.randn(4), "regression"),
    (3, torch.ones(4, 3, dtype=torch.long), "bernoulli"),
]


@pytest.mark.parametrize(("outputs", "labels", "name"), SHAPES)
def test_likelihood_by_the_shapes_of_plain_modules(outputs, labels, name):
    given = [(torch.randn(4, 4), labels)]
    found = estimate(nn.Linear(4, outputs), given, method="empirical_fisher", progress=False)
    assert found.info["likelihood"] == name


def gemma():
    text = {**GEMMA, "vocab_size": V, "hidden_size": 8, "intermediate_size": 12}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4,
            image_token_index=V - 1, boi_token_index=V - 2, eoi_token_index=V - 3,
        )
    )  # fmt: skip


GEMMA = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
MARIAN = {
    "vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip


def test_generators_without_an_encoder_predict_the_next_token():
    model, ids = gemma().double().eval(), torch.randint(0, V - 3, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = estimate(model, [batch], method="empirical_fisher", gradient=True, progress=False)
    assert found.info["likelihood"] == "causal_lm"
    name = "model.language_model.norm.weight"
    summed = model(**batch).loss * 4 * 5  # its own loss is a mean over the tokens
    expected = torch.autograd.grad(summed, model.get_parameter(name))[0]
    assert float((found.gradient(name) - expected).norm() / expected.norm()) < 1e-6


def test_encoder_decoders_of_any_name_are_seq2seq():
    model = tf.MarianMTModel(tf.MarianConfig(**MARIAN)).double()
    batch = {"input_ids": torch.randint(3, V, (3, 5)), "labels": torch.randint(3, V, (3, 5))}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    found = estimate(model, [batch], method="empirical_fisher", progress=False)
    assert found.info["likelihood"] == "seq2seq"
    assert found.info["predictions_seen"] == "15"  # the encoder's padding says nothing about the targets


def test_span_models_need_ones_own_likelihood():
    model = tf.BertForQuestionAnswering(tf.BertConfig(**{**ENCODER, "num_labels": 2}))
    with pytest.raises(ValueError, match="BertForQuestionAnswering predicts where an answer starts"):
        estimate(model, [{"input_ids": torch.randint(3, V, (4, 6))}], progress=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_draws_do_not_depend_on_padding(side):
    model = make("gpt2")[0]
    lengths = (6, 3, 5, 2, 4)
    wide = torch.randint(3, V, (5, 9))

    def padded(rows, width):
        ids, mask = torch.ones(len(rows), width).long(), torch.zeros(len(rows), width).long()
        for place, row in enumerate(rows):
            real = slice(width - lengths[row], width) if side == "left" else slice(0, lengths[row])
            ids[place, real], mask[place, real] = wide[row, : lengths[row]], 1
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    together = estimate(model, [padded(range(5), 9)], progress=False)
    alone = estimate(model, [padded([row], lengths[row]) for row in range(5)], progress=False)
    assert together.info["labels"] == "sampled from the model"
    assert oracle.relative_l1(alone, together) < 1e-9


def test_token_ids_are_their_own_labels_for_a_language_model():
    model, batch, _ = make("nano gpt")
    options = {"method": "empirical_fisher", "likelihood": "causal_lm", "progress": False}
    bare, pair = (estimate(model, [given], **options) for given in (batch["x"], (batch["x"], batch["x"])))
    assert oracle.relative_l1(bare, pair) == 0
    assert bare.info["predictions_seen"] == "30"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_more_padding_changes_nothing(name):
    model, batch, _ = make(name)
    longer = {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "labels": batch["labels"] if name == "bert" else F.pad(batch["labels"], (0, 3), value=-100),
    }
    for method in ("fisher", "empirical_fisher"):
        one, other = (estimate(model, [each], method=method) for each in (batch, longer))
        assert oracle.relative_l1(one, other) < 1e-9
    gram, padded = (estimate(model, [each], method="gram") for each in (batch, longer))
    for key in gram:
        if "pooler" not in key and "classifier" not in key:
            torch.testing.assert_close(gram.factor_a(key), padded.factor_a(key))


def test_a_language_model_fisher_sums_tokens_of_a_sequence_before_squaring():
    model, batch, _ = make("gpt2")
    found = estimate(model, as_batches(batch), seed=1)
    assert found.info["likelihood"] == "causal_lm"
    counted = batch["attention_mask"][:, 1:].sum()
    assert found.info["predictions_seen"] == str(int(counted))
    # labels left out: the same tokens are predicted, from the mask alone
    without = estimate(model, [{key: batch[key] for key in ("input_ids", "attention_mask")}], seed=1)
    assert oracle.relative_l1(without, found) < 1e-12


def test_standard_errors_of_several_draws_are_those_of_examples():
    """With the expectation over labels exact, s_n = sum_k g_nk^2: compared with the loop."""
    model, batch, _ = make("mlp")
    found = estimate(model, as_batches(batch, 2), method="ggn", standard_error=True)
    covariance = oracle.softmax_covariance
    rows = [oracle.expected_squares(model, oracle.cut(batch, n), logits_of, covariance) for n in range(5)]
    for key in found:
        stacked = torch.stack([row[key] for row in rows])
        torch.testing.assert_close(found.standard_error(key), stacked.std(0) / 5**0.5, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found[key], stacked.mean(0))


def test_standard_error_of_the_batch_form_is_that_of_batches():
    model, batch, _ = make("mlp")
    found = estimate(model, as_batches(batch, 1), reduction="batch", standard_error=True, labels="sampled")
    each = estimate(model, as_batches(batch, 1), standard_error=True, labels="sampled")
    for key in found:  # batches of one example: both forms are the same
        torch.testing.assert_close(found[key], each[key])
        torch.testing.assert_close(found.standard_error(key), each.standard_error(key))


# Hessian


def hessian_diagonal(model, batch, loss):
    """By differentiating twice, one coordinate at a time."""
    total = sum(loss(model, oracle.cut(batch, n)) for n in range(oracle.size(batch)))
    parameters = oracle.trainable(model)
    first = torch.autograd.grad(total, list(parameters.values()), create_graph=True)
    found = {}
    for name, g in zip(parameters, first, strict=True):
        rows = [
            torch.autograd.grad(value, parameters[name], retain_graph=True)[0].flatten()[i]
            for i, value in enumerate(g.flatten())
        ]
        found[name] = torch.stack(rows).view(g.shape)
    return found


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4).double())

    def forward(self, x):
        return self.w * x


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    """loss = sum_i w_i^2 x_i^2 / 2 has a diagonal Hessian, which every probe gives exactly."""
    model, x, y = Scale(), torch.randn(6, 4).double(), torch.randn(6, 4).double()
    options = {"method": "hessian", "likelihood": "regression", "samples": 2, "standard_error": True}
    found = estimate(model, [(x, y)], **options)
    torch.testing.assert_close(found["w"], (x**2).mean(0))
    assert float(found.standard_error("w").max()) < 1e-7
    assert found.info["product"] == "forward over reverse"


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_hutchinson_is_unbiased(name):
    model, batch, loss = make(name)
    if name == "gpt2":  # a part of it, to keep the oracle quick
        for key, value in model.named_parameters():
            value.requires_grad_("h.1.ln" in key or "ln_f" in key)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
        exact = hessian_diagonal(model, batch, loss)
    options = {"method": "hessian", "samples": 150, "standard_error": True, "gradient": True}
    found = estimate(model, as_batches(batch), **options)
    for key, value in exact.items():
        error = found.standard_error(key)
        assert float(((found[key] * 5 - value) / (5 * error + 1e-12)).abs().max()) < 5.5
    gradient = oracle.sum_of(oracle.per_example_gradients(model, batch, loss))
    assert oracle.relative_l1({key: found.gradient(key) for key in found}, gradient) < 1e-9


# Kronecker factors


def test_kfac_is_exact_for_a_linear_model_of_one_output():
    """One linear layer, Gaussian likelihood: B is constant, so A (x) B is the Fisher, and its diagonal the diagonal."""
    model, x, y = (
        nn.Sequential(nn.Linear(4, 3)).double(),
        torch.randn(7, 4).double(),
        torch.zeros(7, 3).double(),
    )
    found = estimate(model, [(x, y)], method="kfac", likelihood="regression", samples=3)
    exact = estimate(model, [(x, y)], method="ggn", likelihood="regression")
    torch.testing.assert_close(found.factor_a("0.weight"), x.T @ x / 7)
    torch.testing.assert_close(found.factor_b("0.weight"), torch.eye(3).double())
    for key in exact:
        torch.testing.assert_close(found[key], exact[key])


def test_kfac_forms_on_shared_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 7, 4).double(), torch.randn(5, 7, 3).double()
    options = {"method": "kfac", "likelihood": "regression", "labels": "exact"}
    expand = estimate(model, [(x, y)], **options)
    reduce = estimate(model, [(x[:3], y[:3]), (x[3:], y[3:])], kfac_form="reduce", **options)
    hidden = model[1](model[0](x)).detach()
    every, mean = hidden.flatten(0, 1), hidden.mean(1)
    torch.testing.assert_close(expand.factor_a("2.weight"), every.T @ every / 35)
    torch.testing.assert_close(reduce.factor_a("2.weight"), mean.T @ mean / 5)
    for found in (expand, reduce):
        torch.testing.assert_close(found.factor_b("2.weight"), 7 * torch.eye(3).double())


class TwiceOnTokens(nn.Module):
    """One layer applied twice to padded sequences, and another once."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice, self.once = nn.Embedding(V, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        h = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(input_ids)))))
        real = attention_mask[..., None].to(h)
        return (self.once(h) * real).sum(1) / real.sum(1)


def test_kfac_of_a_layer_used_twice_is_the_diagonal_whatever_the_padding():
    model = TwiceOnTokens().double()
    ids, mask = torch.randint(0, V, (4, 5)), torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    options = {"likelihood": "classification", "labels": "exact", "progress": False}
    padded, cut = ({"input_ids": ids[:, :n], "attention_mask": mask[:, :n]} for n in (5, 3))
    found = estimate(model, [padded], method="kfac", **options)
    exact = estimate(model, [cut], method="fisher", **options)
    assert found.factor_a("twice.weight") is None
    assert found.factor_a("once.weight") is not None
    torch.testing.assert_close(found["twice.weight"], exact["twice.weight"])


def test_kfac_has_the_diagonal_for_everything_else():
    model, batch, _ = make("bert")
    found = estimate(model, as_batches(batch), method="kfac", labels="exact")
    exact = estimate(model, as_batches(batch), method="ggn")
    plain_ones = [key for key in exact if found.factor_a(key) is None]
    assert any("LayerNorm" in key for key in plain_ones)
    assert "bert.embeddings.word_embeddings.weight" in plain_ones
    for key in plain_ones:
        torch.testing.assert_close(found[key], exact[key])
    ratio = trace(found) / trace(exact)
    assert 0.2 < ratio < 5  # the same scale


def test_gram_is_the_second_moment_of_the_inputs_of_real_tokens():
    model, batch, _ = make("bert")
    seen = {}
    layer = model.bert.encoder.layer[1].intermediate.dense
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0].detach()))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    x = seen["x"][batch["attention_mask"].bool()]
    found = estimate(model, as_batches(batch, 2), method="gram")
    torch.testing.assert_close(found.factor_a("bert.encoder.layer.1.intermediate.dense.weight"), x.T @ x / 5)
    assert found.factor_b("bert.encoder.layer.1.intermediate.dense.weight") is None
    diagonal = found["bert.encoder.layer.1.intermediate.dense.weight"]
    torch.testing.assert_close(diagonal, (x.T @ x / 5).diagonal().expand(12, 8))
    assert found.info["labels"] == "none"


@pytest.mark.parametrize("name", ["gpt2", "grouped cnn", "conv1d", "t5"])
def test_gram_of_other_layers_has_one_factor_per_input(name):
    model, batch, _ = make(name)
    found = estimate(model, as_batches(batch, 2), method="gram")
    for key in found:
        a = found.factor_a(key)
        assert a.shape[0] == a.shape[1]
        assert float(torch.linalg.eigvalsh(a).min()) > -1e-9
        assert found[key].shape == model.get_parameter(key).shape
    if name == "gpt2":  # transformers' Conv1D keeps (in, out)
        assert found.factor_a("transformer.h.0.mlp.c_fc.weight").shape == (8, 8)


def test_convolutional_gram_is_that_of_patches():
    model, x = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1)).double(), torch.randn(4, 2, 3, 3).double()
    patches = F.unfold(x, 2, padding=1).transpose(1, 2).reshape(-1, 8)
    found = estimate(model, [x], method="gram")
    torch.testing.assert_close(found.factor_a("0.weight"), patches.T @ patches / 4)


# A user's own likelihood


class Poisson:
    """Counts with log-rate f."""

    name = "poisson"

    def sample(self, output, generator):
        return torch.poisson(output.detach().exp(), generator=generator)

    def log_prob(self, output, labels):
        return (labels * output - output.exp()).sum(1)


def test_own_likelihood():
    model, batch, _ = make("mlp")
    batch["labels"] = torch.poisson(torch.ones(5, 3)).double()
    options = {"method": "empirical_fisher", "likelihood": Poisson(), "gradient": True}
    found = estimate(model, as_batches(batch), **options)
    loss = lambda m, row: -Poisson().log_prob(m(row["x"]), row["labels"]).sum()  # noqa: E731
    assert oracle.relative_l1(found, squared(model, batch, loss)) < 1e-9
    assert found.info["likelihood"] == "poisson"
    expected = oracle.expected_squares(model, batch, logits_of, lambda f: torch.diag(f.exp()))
    assert unbiased(model, batch["x"], expected, likelihood=Poisson())


class Named(Poisson):
    """The same with labels that are no tensor."""

    def log_prob(self, output, labels):
        counts = labels["counts"] if isinstance(labels, dict) else labels
        return super().log_prob(output, counts)


@pytest.mark.parametrize("method", ["fisher", "empirical_fisher"])
def test_own_likelihoods_take_labels_of_any_kind(method):
    model, batch, _ = make("mlp")
    labels = torch.poisson(torch.ones(5, 3)).double()
    options = {"method": method, "likelihood": Named(), "progress": False}
    expected = estimate(model, [(batch["x"], labels)], **options)
    found = estimate(model, [(batch["x"], {"counts": labels})], **options)
    assert oracle.relative_l1(found, expected) == 0


def test_likelihoods_can_be_built_with_options():
    model, batch, _ = make("mlp on positions")
    ignoring = Categorical("token_classification", ignore_index=7)
    found = []
    for label, options in ((7, {"likelihood": ignoring}), (-100, {})):
        batch["labels"][:, 2] = label
        found.append(estimate(model, as_batches(batch), method="empirical_fisher", **options))
    assert oracle.relative_l1(*found) < 1e-12
    assert Bernoulli().name == "bernoulli"


def test_images_of_labels_have_their_classes_in_dimension_one():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1)).double(), torch.randn(4, 2, 3, 3).double()
    batch = {"x": x, "labels": torch.randint(0, 3, (4, 3, 3))}
    assert error(model, batch) < 1e-9


def test_model_with_a_vocabulary_that_is_no_square_draws_every_token():
    """A sanity check of the labels a language model is given: the score has mean zero at every logit."""
    model, batch, _ = make("gpt2")
    assert model.config.vocab_size == V
    assert causal_loss(model, oracle.cut(batch, 0)) > 0
    assert set(language()) == set(batch)


@pytest.mark.parametrize("method", ["empirical_fisher", "hessian", "fisher"])
def test_probabilities_as_labels_of_a_classification(method):
    """Soft labels are those of torch's cross_entropy; where labels are drawn from the model they do not matter."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = {"x": torch.randn(5, 4).double(), "labels": torch.randn(5, 3).double().softmax(1)}
    options = {"likelihood": "classification", "progress": False, "method": method}
    found = estimate(model, [(batch["x"], batch["labels"])], **options)
    if method == "empirical_fisher":
        expected = squared(model, batch)
    else:
        expected = estimate(model, [(batch["x"], torch.arange(5) % 3)], **options)
    assert oracle.relative_l1(found, expected) < 1e-12
