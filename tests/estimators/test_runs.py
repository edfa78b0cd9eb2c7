"""Long runs: error of the trace, early stopping, interruption, and several processes."""

import json
import math
import sys

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
    found = estimate(net(), pieces(x, y), method="empirical_fisher", progress=False)
    stated = float(found.info["relative_error"])
    singles = torch.tensor(
        [
            sum(
                float(v.sum())
                for v in estimate(
                    net(), [(x[n : n + 1], y[n : n + 1])], method="empirical_fisher", progress=False
                ).values()
            )
            for n in range(100)
        ]
    )
    actual = float(singles.std() / singles.mean()) / 400**0.5
    assert 0.5 < stated / actual < 2
    per_tensor = json.loads(found.info["relative_errors"])
    assert set(per_tensor) == set(found)
    single = estimate(net(), [(x, y)], method="empirical_fisher", progress=False)
    assert "relative_error" not in single.info  # one batch has no spread


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


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": True, "standard_error": True, "labels": "sampled"},
        {"method": "kfac"},
        {"method": "gram"},
        {"method": "hessian"},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, options):
    x, y = rows(60)
    journal = tmp_path / "run.partial"
    options = {**options, "progress": False}
    whole = estimate(net(), pieces(x, y), **options)
    with pytest.raises(Interrupted):
        estimate(net(), stopping(pieces(x, y), 4), checkpoint=journal, checkpoint_seconds=0, **options)
    assert journal.exists()
    resumed = estimate(net(), pieces(x, y), checkpoint=journal, checkpoint_seconds=0, **options)
    assert not journal.exists()
    assert dict(resumed.info) == dict(whole.info)
    for key in whole:
        assert torch.equal(resumed[key], whole[key])
        for part in ("standard_error", "gradient", "factor_a", "factor_b"):
            one, other = getattr(resumed, part)(key), getattr(whole, part)(key)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def other(x, y, kind):
    if kind == "batch size":
        return pieces(x, y, 20)
    if kind == "data":
        return pieces(x + 1, y)
    if kind == "order":
        return pieces(x.flip(0), y.flip(0))
    return pieces(x, y)[:3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch size", "ended with example 40; here it ends with example 80"),
        ("data", "ends with example 40 and holds other data"),
        ("order", "ends with example 40 and holds other data"),
        ("fewer", "had done 4 batches, here there are 3"),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_batches_only(tmp_path, kind, message):
    x, y = rows(120)
    journal = tmp_path / "run.partial"
    with pytest.raises(Interrupted):
        estimate(net(), stopping(pieces(x, y), 4), checkpoint=journal, checkpoint_seconds=0, progress=False)
    with pytest.raises(ValueError, match=message):
        estimate(net(), other(x, y, kind), checkpoint=journal, progress=False)
    assert journal.exists()


def test_a_run_interrupted_after_its_last_batch_is_whole(tmp_path):
    x, y = rows(20)
    torch.manual_seed(0)
    model = nn.Sequential(tf.pytorch_utils.Conv1D(5, 4), nn.Tanh(), nn.Linear(5, 3)).double()
    options = {"method": "kfac", "progress": False}
    whole = estimate(model, pieces(x, y), **options)
    journal = tmp_path / "run.partial"
    with pytest.raises(Interrupted):
        estimate(
            model, stopping([*pieces(x, y), None], 2), checkpoint=journal, checkpoint_seconds=0, **options
        )
    resumed = estimate(model, pieces(x, y), checkpoint=journal, **options)
    assert dict(resumed.info) == dict(whole.info)
    assert resumed.info["likelihood"] == "classification"
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_journal_of_another_run_is_refused(tmp_path):
    x, y = rows(60)
    journal = tmp_path / "run.partial"
    with pytest.raises(Interrupted):
        estimate(net(), stopping(pieces(x, y), 4), checkpoint=journal, checkpoint_seconds=0, progress=False)
    with pytest.raises(ValueError, match="belongs to another run: its seed is 0, here it is 1"):
        estimate(net(), pieces(x, y), checkpoint=journal, seed=1, progress=False)
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="its model fingerprint is"):
        estimate(other, pieces(x, y), checkpoint=journal, progress=False)
    with pytest.raises(ValueError, match="its backend is engine, here it is backpack"):
        estimate(
            net(), pieces(x, y), method="ggn", backend="backpack", checkpoint=of_ggn(tmp_path), progress=False
        )
    journal.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds no interrupted estimate"):
        estimate(net(), pieces(x, y), checkpoint=journal, progress=False)


def of_ggn(folder):
    x, y = rows(60)
    path = folder / "ggn.partial"
    with pytest.raises(Interrupted):
        estimate(
            net(),
            stopping(pieces(x, y), 4),
            method="ggn",
            checkpoint=path,
            checkpoint_seconds=0,
            progress=False,
        )
    return path


def test_a_run_with_another_noise_variance_does_not_go_on(tmp_path):
    model, journal = torch.nn.Linear(3, 1), tmp_path / "run.partial"
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    options = {"checkpoint": journal, "checkpoint_seconds": 0, "progress": False}
    with pytest.raises(Interrupted):
        estimate(model, stopping(batches, 2), likelihood=Gaussian(1.0), **options)
    with pytest.raises(
        ValueError, match=r"its likelihood is Gaussian variance=1\.0, here it is Gaussian variance=2\.0"
    ):
        estimate(model, batches, likelihood=Gaussian(2.0), **options)
    assert len(estimate(model, batches, likelihood=Gaussian(1.0), **options)) == 2


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
    import os
    import socket
    import subprocess

    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER.format(OPTIONS=OPTIONS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        str(script),
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
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
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    batch = plain(4)
    found = estimate(torch.compile(model), as_batches(batch), progress=False)
    assert set(found) == set(dict(model.named_parameters()))


def test_progress_goes_to_stderr(capsys):
    model, batch, _ = make("mlp")
    estimate(model, as_batches(batch))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fisher: 5 examples" in shown.err
