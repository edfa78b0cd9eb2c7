"""Long runs: error of the trace, early stopping, interruption, and several processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from gradmatch.estimators import Curvature, estimate
from gradmatch.estimators.convergence import GROUPS, Convergence, relative_error
from gradmatch.estimators.values import Gaussian
from gradmatch.estimators.wrapped import unwrap
from tests import oracle
from tests.estimators.architectures import as_batches, make, plain

ROOT = Path(__file__).parents[2]


def test_relative_error_by_hand():
    sums = [1.0, 2.0, 4.0]
    mean = 7 / 3
    expected = math.sqrt(3 / 2 * sum((s - mean) ** 2 for s in sums)) / 7
    assert relative_error([1, 1, 1], sums) == pytest.approx(expected)
    assert relative_error([1, 1], [0.0, 0.0]) == 0
    assert relative_error([1, 1], [1.0, -1.0]) == math.inf


def test_groups_are_merged_and_nothing_is_lost():
    found, total = Convergence(), 0.0
    for n in range(1000):
        total += n % 7
        if found.due(2):
            found.add([total, 2 * total])
    assert len(found.sizes) < GROUPS
    assert found.batches_a_group == 16
    assert sum(row[1] for row in found.traces) == 2 * sum(row[0] for row in found.traces)
    assert sum(found.sizes) == 2 * 16 * (1000 // 16)
    assert len(found.relative_errors()) == 2


def rows(count=400):
    torch.manual_seed(0)
    return torch.randn(count, 4).double(), torch.randint(0, 3, (count,))


def pieces(x, y, step=10):
    return [(x[n : n + step], y[n : n + step]) for n in range(0, len(x), step)]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_relative_errors_are_always_in_info_and_right():
    x, y = rows()
    options = {"method": "empirical_fisher", "progress": False}
    found = estimate(net(), pieces(x, y), **options)
    stated = float(found.info["relative_error"])
    singles = torch.tensor([estimate(net(), [one], **options).trace() for one in pieces(x[:100], y[:100], 1)])
    actual = float(singles.std() / singles.mean()) / 400**0.5
    assert 0.5 < stated / actual < 2
    assert set(json.loads(found.info["relative_errors"])) == set(found)
    assert "relative_error" not in estimate(net(), [(x, y)], **options).info  # one batch has no spread


def test_tolerance_stops_early_and_says_so():
    x, y = rows()
    found = estimate(net(), pieces(x, y), tolerance=0.2, progress=False, num_examples=400)
    assert found.info["stopped"] == "relative error of the trace below 0.2"
    assert 80 <= int(found.info["examples_seen"]) < 400
    assert float(found.info["relative_error"]) <= 0.2
    assert found.num_examples == 400
    whole = estimate(net(), pieces(x, y), tolerance=0.001, progress=False)
    assert whole.info["examples_seen"] == "400"
    assert "stopped" not in whole.info


def loader(count=None, **options):
    data = TensorDataset(*rows(400))
    sampler = SubsetRandomSampler(range(count)) if count else None
    return DataLoader(data, batch_size=10, sampler=sampler, **options)


@pytest.mark.parametrize(("count", "expected"), [(None, 400), (300, 300)])
def test_n_of_a_run_that_stopped_early_is_that_of_the_dataset(count, expected, caplog):
    found = estimate(net(), loader(count), tolerance=0.3, progress=False)
    assert int(found.info["examples_seen"]) < expected
    assert found.num_examples == expected
    assert "pass num_examples" not in caplog.text


def test_n_of_a_run_that_stopped_early_is_asked_for(caplog):
    found = estimate(net(), iter(pieces(*rows())), tolerance=0.3, progress=False)
    assert found.num_examples == int(found.info["examples_seen"]) < 400
    assert "does not say how many there are" in caplog.text


def test_kronecker_factors_state_no_error_of_a_trace_that_misses_most():
    info = estimate(net(), pieces(*rows(40)), method="kfac", progress=False).info
    assert "relative_error" not in info
    assert "relative_errors" not in info


def test_advice_is_logged(caplog):
    x, y = rows(40)
    with caplog.at_level("INFO", "gradmatch.estimators"):
        estimate(net(), pieces(x, y), progress=False)
    assert "after 40 examples; 120 more would halve it" in caplog.text
    with caplog.at_level("INFO", "gradmatch.estimators"):
        estimate(net(), [(x, y)], progress=False)
    assert "unknown, it takes two batches" in caplog.text


class Interrupted(Exception):
    pass


def stopping(batches, after):
    for n, batch in enumerate(batches):
        if n == after:
            raise Interrupted
        yield batch


def interrupted(journal, batches, after=4, model=None, **options):
    """A run that leaves a journal; returns it."""
    given = {"checkpoint": journal, "checkpoint_seconds": 0, "progress": False, **options}
    with pytest.raises(Interrupted):
        estimate(net() if model is None else model, stopping(batches, after), **given)
    assert journal.exists()
    return journal


INTERRUPTED = [
    {"gradient": True, "standard_error": True, "labels": "sampled"},
    {"method": "kfac"},
    {"method": "gram"},
    {"method": "hessian"},
]


@pytest.mark.parametrize("options", INTERRUPTED, ids=str)
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, options):
    batches, options = pieces(*rows(60)), {**options, "progress": False}
    whole = estimate(net(), batches, **options)
    journal = interrupted(tmp_path / "run.partial", batches, **options)
    resumed = estimate(net(), batches, checkpoint=journal, checkpoint_seconds=0, **options)
    assert not journal.exists()
    assert dict(resumed.info) == dict(whole.info)
    for key in whole:
        assert torch.equal(resumed[key], whole[key])
        for part in ("standard_error", "gradient", "factor_a", "factor_b"):
            one, other = getattr(resumed, part)(key), getattr(whole, part)(key)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


OTHER = {  # what is given when it goes on, and what is said
    "batch size": (lambda x, y: pieces(x, y, 20), "ended with example 40; here it ends with example 80"),
    "data": (lambda x, y: pieces(x + 1, y), "ends with example 40 and holds other data"),
    "order": (lambda x, y: pieces(x.flip(0), y.flip(0)), "ends with example 40 and holds other data"),
    "fewer": (lambda x, y: pieces(x, y)[:3], "had done 4 batches, here there are 3"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_an_interrupted_run_goes_on_with_the_same_batches_only(tmp_path, kind):
    change, message = OTHER[kind]
    x, y = rows(120)
    journal = interrupted(tmp_path / "run.partial", pieces(x, y))
    with pytest.raises(ValueError, match=message):
        estimate(net(), change(x, y), checkpoint=journal, progress=False)
    assert journal.exists()


def test_a_run_interrupted_after_its_last_batch_is_whole(tmp_path):
    batches = pieces(*rows(20))
    torch.manual_seed(0)
    model = nn.Sequential(tf.pytorch_utils.Conv1D(5, 4), nn.Tanh(), nn.Linear(5, 3)).double()
    options = {"method": "kfac", "progress": False}
    whole = estimate(model, batches, **options)
    journal = interrupted(tmp_path / "run.partial", [*batches, None], 2, model, **options)
    resumed = estimate(model, batches, checkpoint=journal, **options)
    assert dict(resumed.info) == dict(whole.info)
    assert resumed.info["likelihood"] == "classification"
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_journal_of_another_run_is_refused(tmp_path):
    batches = pieces(*rows(60))
    journal = interrupted(tmp_path / "run.partial", batches)
    ggn = interrupted(tmp_path / "ggn.partial", batches, method="ggn")
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    for model, options, text in (
        (net(), {"checkpoint": journal, "seed": 1}, "another run: its seed is 0, here it is 1"),
        (other, {"checkpoint": journal}, "its model fingerprint is"),
        (
            net(),
            {"checkpoint": ggn, "method": "ggn", "backend": "backpack"},
            "its backend is engine, here it is backpack",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            estimate(model, batches, progress=False, **options)
    journal.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds no interrupted estimate"):
        estimate(net(), batches, checkpoint=journal, progress=False)


def test_a_run_with_another_noise_variance_does_not_go_on(tmp_path):
    model = torch.nn.Linear(3, 1)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    journal = interrupted(tmp_path / "run.partial", batches, 2, model, likelihood=Gaussian(1.0))
    said = r"its likelihood is Gaussian variance=1\.0, here it is Gaussian variance=2\.0"
    with pytest.raises(ValueError, match=said):
        estimate(model, batches, likelihood=Gaussian(2.0), checkpoint=journal, progress=False)
    again = estimate(model, batches, likelihood=Gaussian(1.0), checkpoint=journal, progress=False)
    assert len(again) == 2


# Several processes


WORKER = """
import sys, torch
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from gradmatch.estimators import estimate
from tests.estimators.test_runs import net, pieces, rows

dist.init_process_group("gloo")
torch.set_num_threads(1)
x, y = rows(57)
for name, options in {OPTIONS!r}.items():
    model = net()
    if options.pop("wrap", False):
        model = torch.nn.parallel.DistributedDataParallel(model)
    if options.pop("sampler", False):
        data = TensorDataset(x, y)
        given = DataLoader(data, batch_size=5, sampler=DistributedSampler(data, shuffle=False))
    else:
        given = pieces(x, y, options.pop("step", 10))
    found = estimate(model, given, **options)
    if dist.get_rank() == 0:
        found.save(f"{{sys.argv[1]}}/{{name}}.safetensors")
dist.destroy_process_group()
"""
OPTIONS = {
    "fisher": {"labels": "sampled", "gradient": True, "standard_error": True},
    "sampler": {"labels": "sampled", "sampler": True},
    "kfac": {"method": "kfac", "labels": "sampled"},
    "wrapped": {"method": "ggn", "wrap": True},
    "few": {"tolerance": 0.5, "step": 2},
    "nothing for the second": {"labels": "sampled", "standard_error": True, "step": 57},
    "nothing for the second, kfac": {"method": "kfac", "labels": "sampled", "step": 57},
    "nothing for the second, hessian": {"method": "hessian", "step": 57},
}


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Two processes, once for all the options."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER.format(OPTIONS=OPTIONS))
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",  # finds a free port itself
    ]
    command = [sys.executable, *launch, str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_give_the_numbers_of_one(torchrun, name):
    x, y = rows(57)
    options = {key: value for key, value in OPTIONS[name].items() if key not in ("sampler", "wrap", "step")}
    step = OPTIONS[name].get("step", 10)
    alone = estimate(net(), pieces(x, y, step), progress=False, **options)
    found = Curvature.load(torchrun / f"{name}.safetensors")
    assert found.info["processes"] == "2"
    assert found.info["labels"] == alone.info["labels"]
    if name == "few":
        assert found.info["stopped"]
        return
    assert found.num_examples == 57
    assert found.info["examples_seen"] == "57"
    assert oracle.relative_l1(found, alone) < 1e-9
    for key in alone:
        for part in ("standard_error", "gradient", "factor_a", "factor_b"):
            value = getattr(alone, part)(key)
            if value is not None:
                torch.testing.assert_close(getattr(found, part)(key), value, rtol=1e-6, atol=1e-12)


def test_sharded_models_are_refused():
    class FSDPModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"sharded by FSDP.*checkpoint unsharded"):
        estimate(FSDPModule(), [torch.randn(2, 2)])


def test_wrappers_are_taken_off():
    model = net()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(compiled) is model
    found = estimate(compiled, as_batches(plain(4)), progress=False)
    assert set(found) == set(dict(model.named_parameters()))


def test_progress_goes_to_stderr(capsys):
    model, batch, _ = make("mlp")
    estimate(model, as_batches(batch), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fisher: 5 examples" in shown.err
