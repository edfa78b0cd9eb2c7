"""What a merge does to the losses: tasks below their base, a base that forgets, odd weights, in nats per token and with intervals."""

import math

import pytest
import torch
from torch import nn

from gradmatch import Task, diagnose
from gradmatch.estimators import Curvature
from gradmatch.measure.intervals import mean_interval

VOCABULARY, PAD = 12, -100


class Bigram(nn.Module):
    """A language model of two tokens: the next one from the present one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids, labels=None):
        return {"logits": self.head(self.embed(input_ids))}


def texts(table, count, generator):
    """Sequences of a Markov chain, of 3 to 9 tokens, padded: batches of ids and labels."""
    length = 9
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, 0] = torch.randint(VOCABULARY, (count,), generator=generator)
    for i in range(1, length):
        ids[:, i] = torch.multinomial(table[ids[:, i - 1]], 1, generator=generator)[:, 0]
    stop = torch.randint(3, length + 1, (count, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(length) >= stop, PAD)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids.split(32), labels.split(32), strict=True)]


def token_losses(theta, batches):
    """(sum of nats, number of tokens) of each sequence, by hand: every token after the first is predicted from the one before."""
    module = Bigram()
    module.load_state_dict(theta)
    rows = []
    for batch in batches:
        logits = module(batch["input_ids"])["logits"][:, :-1].double()
        nll = nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=PAD
        )
        rows += zip(nll.sum(1).tolist(), (batch["labels"][:, 1:] != PAD).sum(1).tolist(), strict=True)
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.fixture(scope="module")
def world():
    """Base, two fine-tunes, held-out texts of each ("base": general ones)."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    general = torch.rand(VOCABULARY, VOCABULARY, generator=generator).pow(3)
    tables = {"base": general}
    for name in ("cook", "law"):
        tables[name] = general * torch.rand(VOCABULARY, VOCABULARY, generator=generator).pow(2)
    train, test = ({n: texts(t, 160, generator) for n, t in tables.items()} for _ in range(2))

    def fit(start, batches, steps):
        module = Bigram()
        if start:
            module.load_state_dict(start)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        for _ in range(steps):
            for batch in batches:
                optimizer.zero_grad()
                logits = module(batch["input_ids"])["logits"][:, :-1]
                nn.functional.cross_entropy(
                    logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=PAD
                ).backward()
                optimizer.step()
        return {n: v.detach().clone() for n, v in module.state_dict().items()}

    base = fit(None, train["base"], 40)
    return base, {n: fit(base, train[n], 4) for n in ("cook", "law")}, test


def told(world, weights, **options):
    base, tasks, data = world
    given = [Task(theta, name=n, weight=w) for (n, theta), w in zip(tasks.items(), weights, strict=True)]
    defaults = {"method": "task_arithmetic", "module": Bigram(), "likelihood": "causal_lm", "data": data}
    return diagnose(base, given, **{**defaults, **options})


def merged(world, weights):
    base, tasks, _ = world
    return {
        n: v + sum(w * (t[n] - v) for t, w in zip(tasks.values(), weights, strict=True))
        for n, v in base.items()
    }


def test_weights_far_too_large_are_told_with_what_they_cost_the_tasks_and_the_base(world):
    base, _, data = world
    result = told(world, (4.0, 4.0))
    causes = {cause.name: cause for cause in result.causes}
    assert {"all_weights_too_large", "worse_than_base", "base_forgotten"} <= set(causes)
    assert result.causes[0].name == "all_weights_too_large"
    theta, forgotten = merged(world, (4.0, 4.0)), causes["base_forgotten"]

    def totals(task, *models):
        found = [token_losses(model, data[task]).sum(1).tolist() for model in models]
        return [nats for nats, _ in found], found[0][1]

    for task in ("cook", "law"):
        (after, before), count = totals(task, theta, base)
        rise = pytest.approx((after - before) / count, rel=1e-4)
        assert causes["worse_than_base"].numbers[task] == rise
    (after, before, half), count = totals("base", theta, base, merged(world, (2.0, 2.0)))
    assert forgotten.numbers["rise"] == pytest.approx((after - before) / count, rel=1e-4)
    assert forgotten.cost == pytest.approx(after - half, rel=1e-4)
    assert f"perplexity {math.exp(after / count):.4g}" in forgotten.evidence


def test_losses_are_told_per_token_and_as_perplexity_with_intervals(world):
    base, _, data = world
    result = told(world, (0.5, 0.5), thorough=False)
    losses, count = token_losses(merged(world, (0.5, 0.5)), data["cook"])
    row = next(r for r in result.to_dict()["losses"] if (r["model"], r["task"]) == ("merged", "cook"))
    mean = float(losses.sum() / count.sum())
    assert row["per_prediction"][0] == pytest.approx(mean, rel=1e-5)
    assert row["perplexity"] == pytest.approx([math.exp(value) for value in row["per_prediction"]])
    assert row["predictions"] == pytest.approx(float(count.mean()))
    assert row["nll"] == pytest.approx(float(losses.mean()), rel=1e-5)
    generator = torch.Generator().manual_seed(0)  # against the bootstrap over sequences
    draws = torch.randint(len(losses), (2000, len(losses)), generator=generator)
    ratios = losses[draws].sum(1) / count[draws].sum(1)
    low, high = ratios.quantile(0.025), ratios.quantile(0.975)
    assert row["per_prediction"][1:] == pytest.approx([float(low), float(high)], abs=0.15 * float(high - low))
    of_base = math.exp(float(token_losses(base, data["cook"])[0].sum() / count.sum()))
    for text in (f"perplexity of cook: base {of_base:.4g} (", "(nats per token; forecast", "the base's data"):
        assert text in str(result)


def test_what_a_task_alone_gains_and_the_base_keeps_is_no_cause(world):
    result = told(world, (0.4, 0.4))
    assert result.healthy
    looked_at = ["the base's loss on data of its own", "the losses of cook, law"]
    assert result.to_dict()["looked_at"][1:] == looked_at


def test_the_base_alone_may_have_data(world):
    result = told(world, (4.0, 4.0), data={"base": world[2]["base"]})
    assert [cause.name for cause in result.causes] == ["base_forgotten"]
    assert "what the merge does" not in str(result)


def test_a_task_that_is_taken_away_is_not_told_that_it_is_worse_off(world):
    result = told(world, (-1.0, -1.0), thorough=False)
    assert not {"worse_than_base", "weights_far_from_best"} & {cause.name for cause in result.causes}
    mixed = told(world, (0.5, -2.0), thorough=False)
    below = [cause.subject for cause in mixed.causes if cause.name == "worse_than_base"]
    assert below in ([], ["cook"])
    removing = told(world, (3.0, 3.0), method="negation", data={"base": world[2]["base"]})
    assert "remove less" in removing.causes[0].remedy


def test_nothing_wrong_is_not_said_over_a_table_that_shows_otherwise(world):
    base, tasks, data = world
    few = {n: [{k: v[:2] for k, v in batches[0].items()}] for n, batches in data.items() if n != "base"}
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        given = {n: {k: v + 0.05 * torch.randn_like(v) for k, v in base.items()} for n in tasks}
        result = told((base, given, few), (0.5, 0.5), thorough=False)
        losses = result.evidence.losses
        worse = any(float(losses["merged"][t].mean()) > float(losses["base"][t].mean()) for t in tasks)
        seen.add(worse)
        assert not (worse and "Nothing wrong" in result.to_dict()["verdict"])
        assert not (worse and "Nothing wrong" in str(result))
    assert True in seen


def test_curvatures_in_other_units_come_before_any_weight(world):
    base, tasks, data = world
    small = {"cook": 1.0, "law": 1 / 33_000}
    curvatures = {
        n: Curvature.from_dict(
            {k: small[n] * (0.5 + torch.rand_like(v)) for k, v in base.items()}, 160, {"estimator": kind}
        )
        for n, kind in (("cook", "fisher"), ("law", "adam"))
    }
    given = [Task(theta, curvatures[n], 4.0, n) for n, theta in tasks.items()]
    options = {"base_curvature": curvatures["cook"], "module": Bigram(), "likelihood": "causal_lm"}
    for told_data in (data, None):
        first = diagnose(base, given, data=told_data, **options).causes[0]
        assert (first.name, first.subject) == ("curvature_units", "law")
        assert first.numbers["ratio"] == pytest.approx(33_000, rel=0.5)
    assert "curvature_units" not in [c.name for c in diagnose(base, given, method="averaging").causes]


def test_intervals():
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])
    mean, low, high = mean_interval(x)
    half = 3.182446 * float(x.double().std()) / 2  # Student's t of three degrees of freedom
    assert (mean, low, high) == pytest.approx((4.0, 4.0 - half, 4.0 + half), rel=1e-6)
    assert mean_interval(x, torch.full((4,), 2.0)) == pytest.approx((2.0, low / 2, high / 2))
    assert all(math.isnan(end) for end in mean_interval(x[:1])[1:])
