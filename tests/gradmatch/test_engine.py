"""Tensors of many blocks and units come out as the readable rules say in float64; what rounding loses is measured."""

import pytest
import torch

from gradmatch import RULES, Task, merge
from gradmatch.engine import context, fused, rounding, workers
from gradmatch.estimators import Curvature
from gradmatch.rules import gradient_matching
from gradmatch.rules.edits.ties import elect, kept_count, ties, trim

SIZE = 1000  # spans several pieces, blocks and units of the sizes below
WEIGHTS = (0.5, 0.25, 0.5)  # exact, so that what cancels does so in any precision


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setenv("GRADMATCH_KERNEL", "0")  # its chunks are larger; test_fused.py compares it with this
    for module in (context, rounding, fused):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(workers, "UNIT", 48)


def models(dtype):
    """A base and three fine-tunes of it, in `dtype`, and the mean curvatures of all four."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, generator=generator)
    tuned = [base + 0.1 * torch.randn(SIZE, generator=generator) for _ in WEIGHTS]
    known = [torch.rand(SIZE, generator=generator) for _ in range(4)]
    return base.to(dtype), [model.to(dtype) for model in tuned], known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "gradient_matching"])
def test_many_blocks_are_the_readable_rule(method, dtype):
    base, tuned, known = models(dtype)
    alpha = torch.tensor(WEIGHTS, dtype=torch.float64).reshape(3, 1)
    theta0 = base.double()
    tau = torch.stack([model.double() - theta0 for model in tuned])
    tasks = [Task({"w": model}, weight=weight) for model, weight in zip(tuned, WEIGHTS, strict=True)]
    options = {}
    if method == "gradient_matching":
        curvatures = [Curvature.from_dict({"w": f}, num_examples=10 + i) for i, f in enumerate(known)]
        tasks = [
            Task(task.model, curvature, task.weight)
            for task, curvature in zip(tasks, curvatures[1:], strict=True)
        ]
        options = {"base_curvature": curvatures[0], "allow_mismatch": True}
        h = torch.stack([(10 + i) * f.double() for i, f in enumerate(known)])
        expected = gradient_matching(theta0, tau, alpha, h[0] + 1e-6, h[1:])
    elif method == "ties":
        least = tau.abs().topk(kept_count(0.2, SIZE)).values[:, -1:]
        majority = float(elect((alpha * trim(tau, least)).sum(0), 0.0).sum().sign())
        edited = ties(tau, alpha, least, majority)
        expected = theta0 + (alpha * edited).sum(0)
    else:
        expected = theta0 + (alpha * tau).sum(0)
    found = merge({"w": base}, tasks, method=method, dtype="float32", **options)["w"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    rounded = merge({"w": base}, tasks, method=method, dtype=str(dtype).removeprefix("torch."), **options)
    assert torch.equal(rounded["w"], found.to(dtype))


def test_what_rounding_kept_is_told_by_one_block_in_eight():
    base, tuned, _ = models(torch.bfloat16)
    found = merge({"w": base}, [Task({"w": tuned[0]}, weight=0.3)], method="task_arithmetic")
    exact = merge({"w": base}, [Task({"w": tuned[0]}, weight=0.3)], method="task_arithmetic", dtype="float32")
    measured = torch.arange(SIZE)[torch.arange(SIZE) // 16 % rounding.MEASURED == 0]
    assert 0 < len(measured) < SIZE / 4
    lost = (found["w"].double() - exact["w"].double())[measured].square().sum()
    update = (exact["w"].double() - base.double())[measured].square().sum()
    assert found.report.kept_update == pytest.approx(1 - float(lost / update), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")])
def test_finite_bits(dtype, value):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert rounding.finite_bits(values)
    assert rounding.finite_bits(values[:0])
    assert not rounding.finite_bits(torch.cat([values, torch.tensor([value], dtype=dtype)]))


@pytest.mark.parametrize("place", [0, 17, SIZE - 1])
def test_overflow_in_any_block_is_refused(place):
    base, tuned, _ = models(torch.float32)
    tuned[0][place] = 1e6
    with pytest.raises(ValueError, match=r"w: merged values reach 1e\+06, beyond what torch.float16 holds"):
        merge({"w": base}, [Task({"w": tuned[0]})], method="averaging", dtype="float16")
    tuned[0][place] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge({"w": base}, [Task({"w": tuned[0]})], method="averaging", dtype="float16")


@pytest.mark.parametrize(
    "method", [name for name, rule in RULES.items() if not rule.needs & {"gram", "factors"}]
)
def test_another_device_gives_the_same_bytes(method):
    """ "cpu:0" takes the path of a device: larger pieces, no extension, values moved there and back."""
    if RULES[method].options.get("score", 0) is None:
        pytest.skip("it asks for a score")
    base, tuned, known = models(torch.float32)
    shaped = [{"w": x.reshape(20, 50), "few": x[:3]} for x in (base, *tuned)]
    curvatures = [
        Curvature.from_dict(
            {"w": f.reshape(20, 50), "few": f[:3]}, num_examples=9,
            gradient={"w": f.reshape(20, 50) / 9, "few": f[:3] / 9},
        )
        for f in known
    ]  # fmt: skip
    needs, count = RULES[method].needs, int(min(2, RULES[method].models[1]))
    tasks = [
        Task(model, curvature if needs & {"curvature", "gradient"} else None, 0.4, name=str(t))
        for t, (model, curvature) in enumerate(zip(shaped[1 : 1 + count], curvatures[1:], strict=False))
    ]
    options = {"base_curvature": curvatures[0]} if "base_curvature" in needs else {}
    options |= {"anchor": shaped[1]} if method == "anchored" else {}
    options |= {"allow_mismatch": True, "method": method, "dtype": "bfloat16"}
    one, other = (merge(shaped[0], tasks, device=device, **options) for device in ("cpu", "cpu:0"))
    assert all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu0"])
def test_a_device_that_is_not_there_is_refused_before_any_work(device):
    with pytest.raises(
        ValueError, match=rf"device is '{device}', which torch does not know \(.+\); here are: cpu"
    ):
        merge("no-such-model", [Task("none-either")], method="averaging", device=device)
    with pytest.raises(TypeError, match="device"):
        merge("no-such-model", [Task("none-either")], method="averaging", device=3)
