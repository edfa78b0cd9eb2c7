"""What a pass keeps is counted, and batches are cut into the parts that fit."""

import pytest
import torch
from torch import nn

from gradmatch.estimators.batches import BatchReader
from gradmatch.estimators.estimation import read_chunk
from gradmatch.estimators.inference import make_likelihood
from gradmatch.estimators.memory import LEAST_BYTES, parse_bytes, parts
from gradmatch.estimators.problem import Problem, prepared, trainable_parameters

MODEL = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10))
KEPT = 4 * (
    256 + 512 + 2 * 10
)  # a row's inputs of both layers (tanh keeps its output, the second input), and twice the output


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 2**30), ("1.5 GiB", 3 * 2**29), ("500m", 500 * 2**20), ("64", 64)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


def batch_and_problem(**options):
    problem = Problem(MODEL, trainable_parameters(MODEL), make_likelihood("classification"), **options)
    return BatchReader(MODEL, torch.device("cpu"))((torch.randn(12, 256), torch.arange(12) % 10)), problem


@pytest.mark.parametrize("rows", [1, 3, 5, 12, 100])
def test_a_budget_is_turned_into_rows(rows):
    batch, problem = batch_and_problem(budget=int((rows + 0.5) * KEPT))
    with prepared(MODEL), problem.hooks:
        sizes = [part.size for part in problem.parts(batch)]
        assert problem.plan.value_bytes * batch.values_per_row() == pytest.approx(KEPT, rel=0.02)
    assert sum(sizes) == 12
    assert max(sizes) <= rows
    assert len(sizes) == -(-12 // rows)


def test_longer_rows_weigh_more():
    batch, problem = batch_and_problem(budget=6 * KEPT)
    with prepared(MODEL), problem.hooks:
        problem.ensure_plan(batch)
        longer = BatchReader(MODEL, torch.device("cpu"))((torch.randn(12, 3 * 256), torch.arange(12) % 10))
        assert problem.plan.rows_within(int(7.2 * KEPT), batch) == 7
        assert problem.plan.rows_within(int(7.2 * KEPT), longer) == 2


def test_parts_are_even_and_keep_their_places():
    batch, _ = batch_and_problem()
    batch.first = 100
    found = list(parts(batch, 5))
    assert [part.size for part in found] == [4, 4, 4]
    assert [part.first for part in found] == [100, 104, 108]
    assert torch.equal(torch.cat([part.args[0] for part in found]), batch.args[0])


def test_what_auto_means():
    _, problem = batch_and_problem()
    assert read_chunk("auto", problem) == (None, LEAST_BYTES)
    assert read_chunk("auto", problem, whole=True) == (None, None)
    assert read_chunk("1KB", problem, whole=True) == (None, 1024)
    problem.parameters = {"large": nn.Parameter(torch.empty(2**28, device="meta"))}
    assert read_chunk("auto", problem) == (None, None)  # on no CPU
