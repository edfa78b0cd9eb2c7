"""Causes in weights that are the base's in another place or at another scale, in tasks that are no fine-tunes, in a wrong base."""

import pytest
import torch

from gradmatch import Task, diagnose

WIDTH = 24


def make(seed=0, scale=0.05):
    """A base of two square layers and a head, and three tasks near it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"layers.{i}.weight": (WIDTH, WIDTH) for i in range(2)} | {
        "layers.0.bias": (WIDTH,),
        "head.weight": (3, WIDTH),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tasks = {
        t: {n: v + scale * torch.randn(v.shape, generator=generator) for n, v in base.items()} for t in "abc"
    }
    return base, tasks


def average(base, tasks):
    return {n: v + sum(theta[n] - v for theta in tasks.values()) / len(tasks) for n, v in base.items()}


def found(base, tasks, merged=None, **options):
    merged = average(base, tasks) if merged is None else merged
    given = [Task(theta, name=t) for t, theta in tasks.items()]
    return diagnose(base, given, merged, method="averaging", **options).causes


def test_a_transposed_matrix_is_called_one():
    base, tasks = make()
    tasks["b"]["layers.1.weight"] = tasks["b"]["layers.1.weight"].T
    causes = found(base, tasks)
    assert (causes[0].name, causes[0].subject) == ("transposed_weight", "b")
    assert "other_base" not in [c.name for c in causes]
    assert "1 matrix of 'b' is nearer" in causes[0].evidence
    assert "layers.1.weight" in causes[0].evidence


def test_a_transposed_shape_is_called_one():
    base, tasks = make()
    tasks["b"]["head.weight"] = tasks["b"]["head.weight"].T
    first = found(base, tasks, base)[0]
    assert first.name == "shapes_differ"
    assert "(it is transposed)" in first.evidence


def test_exchanged_layers_are_found_where_they_went():
    base, tasks = make()
    c = tasks["c"]
    c["layers.0.weight"], c["layers.1.weight"] = c["layers.1.weight"], c["layers.0.weight"]
    causes = found(base, tasks)
    assert (causes[0].name, causes[0].subject) == ("layers_swapped", "c")
    assert "other_base" not in [c.name for c in causes]
    assert "layers.0.weight is its layers.1.weight" in causes[0].evidence


@pytest.mark.parametrize(
    ("name", "cause"), [("embed.weight", "vocabulary_order"), ("token.weight", "permuted_neurons")]
)
def test_rows_in_another_order_are_tokens_or_neurons(name, cause):
    base, tasks = make()
    rows = torch.randn(40, WIDTH)
    base[name] = rows
    for theta in tasks.values():
        theta[name] = rows + 0.05 * torch.randn_like(rows)
    tasks["a"][name] = tasks["a"][name][torch.randperm(40)]
    first = found(base, tasks)[0]
    assert (first.name, first.subject) == (cause, "a")


def test_rows_that_a_long_update_bent_one_way_are_no_other_order():
    base, tasks = make()
    direction = base["layers.0.weight"][3]
    for theta in tasks.values():
        theta["layers.0.weight"] = base["layers.0.weight"] + 0.05 * torch.randn(WIDTH, WIDTH)
    tasks["a"]["layers.0.weight"] = base["layers.0.weight"] + 3 * direction  # all resemble row 3 now
    assert "permuted_neurons" not in [c.name for c in found(base, tasks)]


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_rescaled_model_and_its_factor(factor):
    base, tasks = make()
    tasks["b"] = {n: factor * v for n, v in tasks["b"].items()}
    first = found(base, tasks)[0]
    assert (first.name, first.subject) == ("rescaled_model", "b")
    assert first.numbers["factor"] == pytest.approx(factor, rel=0.02)
    base, tasks = make()
    tasks["b"]["layers.0.weight"] = factor * tasks["b"]["layers.0.weight"]
    assert found(base, tasks)[0].name == "rescaled_layer"


def test_a_base_that_no_task_came_from_is_blamed_itself():
    _, tasks = make()
    other, _ = make(seed=7)
    merged = average(tasks["a"], tasks)
    first = found(other, tasks, merged)[0]
    assert (first.name, first.subject) == ("other_base", "base")


def test_a_long_task_vector_is_no_other_base():
    base, tasks = make()
    tasks["a"] = {
        n: v + 3 * torch.randn_like(v) for n, v in base.items()
    }  # cosine .3, but the base is in it whole
    names = [c.name for c in found(base, tasks)]
    assert "other_base" not in names
    assert "overtrained_task" in names


def test_a_task_that_is_the_base_itself():
    base, tasks = make()
    tasks["c"] = {n: v.clone() for n, v in base.items()}
    assert [(c.name, c.subject) for c in found(base, tasks)] == [("task_is_base", "c")]
    assert found(base, dict.fromkeys("ab", base)) == []  # nothing was trained anywhere
