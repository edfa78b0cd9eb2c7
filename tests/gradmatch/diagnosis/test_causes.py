"""Each cause on a small model whose fault is made by hand, from files alone and with data; and its absence when healthy."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradmatch import Task, diagnose
from gradmatch.diagnosis.cause import BROKEN, CHOICE, INPUT, SYMPTOM, Cause
from gradmatch.diagnosis.causes import ranked
from gradmatch.diagnosis.causes_input import relabelled
from gradmatch.diagnosis.evidence import accuracy_of_rows, best_relabelling
from gradmatch.estimators import Curvature
from gradmatch.estimators.fingerprint import fingerprint, model_sampler

DIM, WIDTH, CLASSES = 12, 24, 3


def network():
    return nn.Sequential(nn.Linear(DIM, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def make(seed=0, scale=0.05):
    """Base and two tasks whose task vectors are random directions: enough for what weights alone tell."""
    torch.manual_seed(seed)
    base = state(network())
    tasks = {t: {n: v + scale * torch.randn_like(v) * v.abs().mean() for n, v in base.items()} for t in "abc"}
    return base, tasks


def average(base, tasks, weights=None):
    weights = weights or dict.fromkeys(tasks, 1 / len(tasks))
    return {n: v + sum(w * (tasks[t][n] - v) for t, w in weights.items()) for n, v in base.items()}


def names_of(result):
    return [cause.name for cause in result.causes]


def first_of(result):
    return result.causes[0].name, result.causes[0].subject


def told(base, tasks, merged, **options):
    curvatures = options.pop("curvatures", {})
    weights = options.pop("weights", {})
    given = [Task(theta, curvatures.get(t), weights.get(t, 1 / 3), t) for t, theta in tasks.items()]
    return diagnose(base, given, merged, method=options.pop("method", "task_arithmetic"), **options)


def test_a_healthy_merge_has_no_cause():
    base, tasks = make()
    result = told(base, tasks, average(base, tasks))
    assert result.healthy
    assert result.evidence.coefficients() == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-5)
    assert any("no data" in note for note in result.notes)
    assert any("no curvature" in note for note in result.notes)


def test_not_finite_blames_the_input_and_not_the_merge():
    base, tasks = make()
    tasks["b"]["0.weight"][1, 2] = math.nan
    result = told(base, tasks, average(base, tasks))
    first = result.causes[0]
    assert (first.name, first.subject, first.cost) == ("not_finite", "b", math.inf)
    assert "0.weight" in first.evidence
    base, tasks = make()
    merged = average(base, tasks)
    merged["2.bias"][0] = math.inf
    assert [(c.name, c.subject) for c in told(base, tasks, merged).causes] == [("not_finite", "merged")]


def test_shapes_that_differ_and_tensors_that_are_missing():
    base, tasks = make()
    tasks["a"]["2.weight"] = torch.randn(7, WIDTH)
    del tasks["c"]["2.bias"]
    result = told(base, tasks, None)
    found = {cause.subject: cause for cause in result.causes}
    assert "2.weight is [7, 24] in 'a' and [3, 24]" in found["a"].evidence
    assert "'c' lacks 2.bias" in found["c"].evidence
    assert any("refused" in note for note in result.notes)
    assert "a head or vocabulary policy" in found["a"].remedy
    tasks["b"] = {n: torch.randn(*(2 * s for s in v.shape)) for n, v in base.items()}
    other = next(c for c in told(base, tasks, None).causes if c.subject == "b")
    assert "4 of 4 tensors cannot be merged: 'b' is of another size or architecture" in other.evidence
    assert "head" not in other.remedy


@pytest.mark.parametrize("shift", [1, -2])
def test_vocabulary_shift(shift):
    torch.manual_seed(0)
    base = {"embed.weight": torch.randn(40, 8), "head.weight": torch.randn(3, 8)}
    tasks = {t: {n: v + 0.05 * torch.randn_like(v) for n, v in base.items()} for t in "abc"}
    tasks["b"]["embed.weight"] = tasks["b"]["embed.weight"].roll(shift, 0)
    first = told(base, tasks, average(base, tasks)).causes[0]
    assert (first.name, first.subject) == ("vocabulary_shift", "b")
    assert f"{abs(shift)} place" in first.evidence


def test_permuted_neurons():
    base, tasks = make()
    order = torch.randperm(WIDTH)
    tasks["c"] |= {n: tasks["c"][n][order] for n in ("0.weight", "0.bias")}
    tasks["c"]["2.weight"] = tasks["c"]["2.weight"][:, order]
    result = told(base, tasks, average(base, tasks))
    assert first_of(result) == ("permuted_neurons", "c")
    assert "gradmatch.rebasin.align(model, to=base)" in result.causes[0].remedy
    assert "other_base" not in names_of(result)


def test_other_base_whole_and_one_layer():
    base, tasks = make()
    _, others = make(seed=9)
    first = told(base, {**tasks, "a": others["a"]}, average(base, tasks)).causes[0]
    assert (first.name, first.subject) == ("other_base", "a")
    assert "fine-tune 'a' from this very base" in first.remedy
    assert "align='weights'" in first.remedy
    assert first.evidence.startswith("different beginnings")
    tasks["a"]["2.weight"] = others["a"]["2.weight"]
    first = next(c for c in told(base, tasks, average(base, tasks)).causes if c.name == "other_base")
    assert "leave 2 of 'a' out" in first.remedy


def test_head_of_another_task_and_the_same_model_twice():
    base, tasks = make()
    tasks["a"] |= {n: tasks["b"][n] for n in ("2.weight", "2.bias")}
    first = told(base, tasks, average(base, tasks)).causes[0]
    assert first.name == "head_of_another_task"
    assert set("ab") <= set(first.subject)  # without data nobody can say whose it is
    tasks["a"] = dict(tasks["b"])
    assert told(base, tasks, average(base, tasks)).causes[0].name == "same_model_twice"


def test_curvature_of_another_model_names_it():
    base, tasks = make()

    def curvature(theta, seen="100"):
        marks = {"fingerprint": fingerprint(theta, model_sampler(theta)), "examples_seen": seen}
        return Curvature.from_dict({n: torch.rand_like(v) for n, v in theta.items()}, 100, marks)

    curvatures = {t: curvature(theta) for t, theta in tasks.items()}
    assert told(base, tasks, average(base, tasks), curvatures=curvatures).healthy
    result = told(base, tasks, average(base, tasks), curvatures={**curvatures, "a": curvatures["c"]})
    assert [(c.name, c.subject) for c in result.causes] == [("curvature_of_another_model", "a")]
    assert "taken at the weights of 'c'" in result.causes[0].evidence
    stranger = curvature({n: v + 1 for n, v in base.items()})
    result = told(base, tasks, average(base, tasks), curvatures=curvatures, base_curvature=stranger)
    assert "none of these models" in result.causes[0].evidence
    noisy = {**curvatures, "b": curvature(tasks["b"], "4")}
    result = told(base, tasks, average(base, tasks), curvatures=noisy)
    assert [(c.name, c.subject) for c in result.causes] == [("noisy_curvature", "b")]


def test_rounded_away():
    base, tasks = make(scale=1e-3)
    exact = average(base, tasks)
    stored = {n: v.bfloat16() for n, v in exact.items()}
    assert names_of(told(base, tasks, stored))[0] == "rounded_away"
    assert names_of(told(base, tasks, {n: v.float() for n, v in stored.items()}))[0] == "rounded_away"
    assert told(base, tasks, exact).healthy
    base, tasks = make(scale=0.3)  # large updates survive the rounding
    assert told(base, tasks, {n: v.bfloat16() for n, v in average(base, tasks).items()}).healthy


def test_a_folder_that_is_no_merge_of_these():
    base, tasks = make()
    _, others = make(seed=5)
    assert names_of(told(base, tasks, others["a"])) == ["no_merge_of_these"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_is_one_of_the_models(method, dtype):
    base, tasks = make(scale=1.0)
    models = {t: {n: v.to(dtype) for n, v in theta.items()} for t, theta in {**tasks, "base": base}.items()}
    given = {t: models[t] for t in "abc"}
    for model in ("base", "b"):
        (cause,) = told(models["base"], given, models[model], method=method).causes
        assert (cause.name, cause.subject) == ("merge_is_one_model", model)
    assert told(models["base"], given, models["b"], method="greedy_soup").healthy
    twins = {"a": models["b"], "b": models["b"]}
    assert names_of(told(models["base"], twins, models["b"], method="averaging")) == ["same_model_twice"]


def test_a_merged_model_of_another_architecture_has_no_losses():
    module, base, tasks, data = learned()
    other = {"encoder.weight": torch.randn(4, 4)}
    result = told(base, tasks, other, data=data, module=module)
    assert first_of(result) == ("shapes_differ", "merged")
    assert "check the path" in result.causes[0].remedy
    assert not result.evidence.measured
    assert len(result.causes) == 1


def test_zero_tensor():
    base, tasks = make()
    tasks["b"]["2.bias"] = torch.zeros(CLASSES)
    result = told(base, tasks, None)
    assert ("zero_tensor", "b") in [(c.name, c.subject) for c in result.causes]


def test_dominance_from_weights_alone():
    base, tasks = make()
    weights = {"a": 1 / 3, "b": 5 / 3, "c": 1 / 3}
    first = told(base, tasks, average(base, tasks, weights), weights=weights).causes[0]
    assert (first.name, first.subject, first.cost) == ("weight_too_large", "b", None)
    tasks["c"] = {n: base[n] + 8 * (v - base[n]) for n, v in tasks["c"].items()}
    assert first_of(told(base, tasks, average(base, tasks))) == ("overtrained_task", "c")


def test_floor_decides_without_data():
    base, tasks = make()
    curvatures = {t: Curvature.from_dict({n: torch.rand_like(v) for n, v in base.items()}, 10) for t in tasks}
    options = {"curvatures": curvatures, "base_curvature": 1.0, "method": "gradient_matching"}
    assert names_of(told(base, tasks, None, delta0=1e6, **options)) == ["floor_decides"]
    assert told(base, tasks, None, delta0=1e-6, **options).healthy


def fit(module, sets, steps, rate):
    """The module's state after so many steps of Adam on all the sets."""
    optimizer = torch.optim.Adam(module.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(module(x), y) for x, y in sets).backward()
        optimizer.step()
    return state(module)


def learned(seed=0, relabel=None):
    """Three tasks on inputs of their own, learned from a common base, with data."""
    torch.manual_seed(seed)
    module = network()
    truth = torch.randn(DIM, CLASSES)
    data = {}
    for position, t in enumerate("abc"):
        x = torch.randn(300, DIM)
        x[:, 4 * position : 4 * position + 4] *= 2
        y = (x @ truth).argmax(1)
        data[t] = (x, y if relabel != t else (y + 1) % CLASSES)
    common = torch.randn(400, DIM)
    base = fit(module, [(common, (common @ truth).argmax(1))], 60, 1e-2)
    tasks = {}
    for t, pair in data.items():
        module.load_state_dict(base)
        tasks[t] = fit(module, [pair], 60 if t == relabel else 25, 1e-2 if t == relabel else 3e-3)
    return module, base, tasks, {t: [pair] for t, pair in data.items()}


def test_labels_swapped_names_the_renaming():
    module, base, tasks, data = learned(relabel="b")
    result = told(base, tasks, average(base, tasks), data=data, module=module)
    first = result.causes[0]
    assert (first.name, first.subject) == ("labels_swapped", "b")
    assert "0 -> 1, 1 -> 2, 2 -> 0" in first.evidence
    assert first.source == "measured"


def confusions_of(others_on_a, own):
    """Evidence of tasks "a" (with these confusions) and "b" (which everybody gets right), as far as labels go."""
    right, both = torch.eye(len(own), dtype=torch.long) * 50, dict.fromkeys("ab")
    found = {"base": others_on_a, "b": others_on_a, "a": own}
    return SimpleNamespace(
        objectives=both, kept=both, measured=False, other_tasks=lambda task: [t for t in "ab" if t != task],
        confusions={model: {"a": on_a, "b": right} for model, on_a in found.items()},
    )  # fmt: skip


def test_two_renamed_classes_are_judged_by_their_own_examples():
    own = torch.tensor([[20, 4, 4, 4], [4, 20, 4, 4], [0, 0, 80, 20], [0, 0, 20, 80]])
    swapped = own[:, [1, 0, 2, 3]]
    # Over all examples the renaming gives .76 instead of .64; in the two classes, .63 instead of .13.
    (cause,) = relabelled(confusions_of(swapped, own))
    assert (cause.name, cause.subject) == ("labels_swapped", "a")
    assert cause.numbers == pytest.approx({"plain": 8 / 64, "renamed": 40 / 64})
    assert not list(relabelled(confusions_of(own, own)))
    few = torch.tensor([[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 80, 20], [0, 0, 20, 80]])
    assert not list(relabelled(confusions_of(few[:, [1, 0, 2, 3]], few)))  # six examples prove nothing


def test_accuracy_of_rows():
    confusion = torch.tensor([[3, 1], [2, 2]])
    assert accuracy_of_rows(confusion, [0]) == 0.75
    assert accuracy_of_rows(confusion, [0, 1]) == 0.625
    assert accuracy_of_rows(torch.zeros(2, 2), [1]) == 0.0


def test_a_merge_that_overflows_is_still_explained():
    module, base, tasks, data = learned()
    weights = dict.fromkeys(tasks, 1e38)
    result = told(base, tasks, average(base, tasks, weights), data=data, module=module, weights=weights)
    assert not result.healthy
    merged = average(base, tasks)
    merged["2.bias"] = merged["2.bias"] / 0
    assert names_of(told(base, tasks, merged, data=data, module=module)) == ["not_finite"]


def test_every_weight_too_large_and_its_price():
    module, base, tasks, data = learned()
    weights = dict.fromkeys(tasks, 9.0)
    merged = average(base, tasks, weights)
    result = told(base, tasks, merged, data=data, module=module, weights=weights)
    cause = next(c for c in result.causes if c.name == "all_weights_too_large")
    path = {s: sum(losses.values()) * 300 for s, losses in result.evidence.path.items()}
    assert cause.cost == pytest.approx(path[1.0] - path[cause.numbers["share"]], rel=1e-4)
    below = next(c for c in result.causes if c.name == "worse_than_base")
    assert result.causes[-1] is below
    losses = result.evidence.losses
    assert below.numbers["a"] == pytest.approx(float((losses["merged"]["a"] - losses["base"]["a"]).mean()))
    healthy = told(base, tasks, average(base, tasks), data=data, module=module)
    assert healthy.healthy
    assert not healthy.notes[:-1]  # but that there is no curvature


def test_every_weight_too_small_is_a_cause_with_the_best_weights_and_a_note_without():
    module, base, tasks, data = learned()
    weights = dict.fromkeys(tasks, 0.02)
    merged = average(base, tasks, weights)
    (cause,) = told(base, tasks, merged, data=data, module=module, weights=weights).causes
    assert (cause.name, cause.rank) == ("weights_far_from_best", CHOICE)
    saved = loss(merged, data) - loss(average(base, tasks, cause.numbers), data)
    assert cause.cost == pytest.approx(saved, rel=1e-3)
    result = told(base, tasks, merged, data=data, module=module, weights=weights, forecast=False)
    assert result.healthy
    nats = loss(merged, data) - loss(average(base, tasks, dict.fromkeys(tasks, 0.16)), data)
    (note,) = [note for note in result.notes if "too small" in note]
    assert f"at 8 times the merge's update the tasks lose {nats:.0f} nats less" in note


def loss(theta, data):
    """Summed over the examples of all tasks."""
    linear, total = nn.functional.linear, 0.0
    for [(x, y)] in data.values():
        hidden = torch.tanh(linear(x, theta["0.weight"], theta["0.bias"]))
        logits = linear(hidden, theta["2.weight"], theta["2.bias"])
        total += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    return total


def test_stale_batchnorm_without_data_is_silent_and_with_data_priced():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    x = 4 * torch.randn(400, DIM) + 3
    y = (x @ torch.randn(DIM, CLASSES)).argmax(1)
    base = fit(net.train(), [(x, y)], 80, 1e-2)
    floats = [n for n, v in base.items() if v.is_floating_point()]
    tasks = {t: {**base, **{n: base[n] + 1e-3 * torch.randn_like(base[n]) for n in floats}} for t in "abc"}
    merged = {**base, **average({n: base[n] for n in floats}, tasks)}
    stale = {**merged, "1.running_mean": torch.zeros(WIDTH), "1.running_var": torch.ones(WIDTH)}
    data = {t: [(x, y)] for t in tasks}
    result = told(base, tasks, stale, data=data, module=net)
    assert names_of(result)[0] == "stale_batchnorm"
    assert result.causes[0].cost > 0
    assert told(base, tasks, merged, data=data, module=net).healthy


def test_ranking_puts_broken_before_inputs_before_choices_and_dear_before_cheap():
    cheap = Cause("cheap", "", "", "", CHOICE, 1.0)
    causes = [cheap, replace(cheap, name="unknown", cost=None), replace(cheap, name="dear", cost=9.0)]
    for name, rank, cost in (("symptom", SYMPTOM, 99.0), ("input", INPUT, 0.0), ("broken", BROKEN, None)):
        causes.append(replace(cheap, name=name, rank=rank, cost=cost))
    found = " ".join(cause.name for cause in ranked(causes))
    assert found == "broken input dear cheap unknown symptom"


@pytest.mark.parametrize(("cost", "place"), [(0.0, 3), (None, 0), (5.0, 0)])
def test_a_judgement_that_the_losses_do_not_bear_out_stands_behind_what_costs(cost, place):
    judged = Cause("other_base", "a", "", "", INPUT, cost, "" if cost is None else "measured")
    exact = Cause("permuted_neurons", "b", "", "", INPUT, 0.0, "measured")
    choice = Cause("weight_too_large", "a", "", "", CHOICE, 10.0, "measured")
    forgotten = Cause("base_forgotten", "merged", "", "", SYMPTOM, 500.0, "measured")
    assert ranked([judged, forgotten, choice, exact]).index(judged) == place


def test_a_repair_is_priced_on_the_bases_own_data_too():
    module, base, tasks, data = learned()
    tasks["c"] = {n: torch.randn(v.shape) for n, v in base.items()}
    data["c"] = [(torch.randn(50, DIM), torch.randint(CLASSES, (50,)))]
    module.load_state_dict(base)
    x = torch.randn(400, DIM)
    own = [(x, module(x).argmax(1))]
    (alone,), (both,) = (
        [
            c
            for c in told(base, tasks, average(base, tasks), data=given, module=module).causes
            if c.name == "other_base"
        ]
        for given in (data, {**data, "base": own})
    )
    assert (alone.subject, both.subject) == ("c", "c")
    assert both.cost > alone.cost


@pytest.mark.parametrize("classes", [4, 9])
def test_best_relabelling(classes):
    order = torch.randperm(classes)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion[order, torch.arange(classes)] = 10  # predicted k means label order[k]
    confusion += torch.eye(classes, dtype=torch.long)
    renaming, accuracy = best_relabelling(confusion)
    assert renaming == order.tolist()
    assert accuracy >= 10 / 11


def test_a_fisher_of_many_examples_with_heavy_tails_is_a_note_until_it_costs_something():
    module, base, tasks, data = learned()
    marks = {"examples_seen": "512"}

    def noisy(theta):
        mean = {n: torch.ones_like(v) for n, v in theta.items()}
        curvature = Curvature.from_dict(mean, 300, marks)
        curvature.standard_error = lambda name: 0.7 * mean[name]
        return curvature

    curvatures = {t: noisy(theta) for t, theta in tasks.items()}
    options = {"curvatures": curvatures, "base_curvature": noisy(base), "method": "gradient_matching"}
    result = told(base, tasks, None, **options)
    assert result.healthy
    said = "standard error is 70% of its size (a few of them dominate it)"
    assert any(said in note for note in result.notes)
    assert told(base, tasks, None, data=data, module=module, **options).healthy
    plain = told(base, tasks, average(base, tasks), curvatures=curvatures)  # a rule that has no use for it
    assert plain.healthy
    assert not any("standard error" in note for note in plain.notes)
    merged = average(base, tasks, dict.fromkeys(tasks, 6.0))  # far worse than averaging
    result = told(base, tasks, merged, data=data, module=module, **options)
    cause = next(c for c in result.causes if c.name == "noisy_curvature")
    assert "from about 5,000 examples" in cause.remedy


def test_weights_that_are_finite_and_outputs_that_are_not():
    module, base, tasks, data = learned()
    merged = average(base, tasks)
    merged["2.weight"] = merged["2.weight"] * 1e30
    merged["2.weight"] = merged["2.weight"].clamp(-3e38, 3e38) * 1e8
    merged["2.weight"] = merged["2.weight"].clamp(-3e38, 3e38)
    first = told(base, tasks, merged, data=data, module=module).causes[0]
    assert (first.name, first.subject, first.cost) == ("outputs_not_finite", "merged", math.inf)


def test_zeroed_weights_are_priced():
    module, base, tasks, data = learned()
    tasks["b"] = {**tasks["b"], "2.weight": torch.zeros(CLASSES, WIDTH)}
    result = told(base, tasks, average(base, tasks), data=data, module=module)
    cause = next(c for c in result.causes if c.name == "zero_tensor")
    assert "1 tensor of 'b' is zero everywhere" in cause.evidence
    assert cause.cost > 0
    merged = {**average(base, tasks), "2.weight": torch.zeros(CLASSES, WIDTH)}
    result = told(base, tasks, merged, data=data, module=module)
    assert {c.subject for c in result.causes if c.name == "zero_tensor"} == {"b", "merged"}


def test_one_weight_too_large_is_not_told_as_all_of_them():
    module, base, tasks, data = learned()
    weights = {"a": 1 / 3, "b": 9.0, "c": 1 / 3}
    result = told(base, tasks, average(base, tasks, weights), data=data, module=module, weights=weights)
    assert names_of(result)[0] == "weight_too_large"
    assert "all_weights_too_large" not in names_of(result)


def test_gains_that_are_noise_make_no_conflict():
    module, base, _, data = learned()
    few = {t: [(x[:12], y[:12])] for t, [(x, y)] in data.items()}
    torch.manual_seed(3)
    tasks = {t: {n: v + 0.02 * torch.randn_like(v) for n, v in base.items()} for t in "abc"}
    result = told(base, tasks, average(base, tasks), data=few, module=module)
    assert "tasks_conflict" not in names_of(result)
