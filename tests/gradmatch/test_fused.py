"""The compiled extension gives the bits of the readable rules, and leaves to them what it cannot do."""

import pytest
import torch

from gradmatch import Task, merge
from gradmatch.engine import compiled, context, fused, rounding, workers
from gradmatch.estimators import Curvature, native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE = 5003  # odd, and more than a chunk of the kernels
BUILT = pytest.mark.skipif(
    native.load(compiled.SOURCE) is None, reason="the extension is not built here: pip install -e ."
)


def same_bytes(one, other):
    """Whether two results are the same bit for bit, signs of zeros included."""
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return all(
        torch.equal(*(t[key].view(integers[t[key].element_size()]) for t in (one, other))) for key in one
    )


@pytest.fixture
def compare(monkeypatch):
    """A merge without and with the extension, with pieces and units of many sizes; returns both, and whether each piece was its."""
    if native.load(compiled.SOURCE) is None:
        pytest.skip("the extension is not built here: pip install -e .")
    for module in (context, fused, rounding):
        monkeypatch.setattr(module, "BLOCK", 1000)
    monkeypatch.setattr(workers, "UNIT", 4000)
    done = {"merge": [], "count_bits": []}

    def watched(name):
        plain = getattr(fused, name)

        def call(*args):
            result = plain(*args)
            done[name].append(bool(result))
            return result

        return call

    for name in done:
        monkeypatch.setattr(fused, name, watched(name))

    def both(base, tasks, **options):
        results = []
        for asked in ("0", "1"):
            monkeypatch.setenv("GRADMATCH_KERNEL", asked)
            for calls in done.values():
                calls.clear()
            results.append(merge(base, tasks, allow_mismatch=True, **options))
        assert same_bytes(*results)
        return results, done

    return both


def models(dtype, count=3, seed=0):
    """A base and fine-tunes of it: ties between tasks, untouched and cancelling entries included."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SIZE, generator=generator)
    tuned = [base + 0.1 * torch.randn(SIZE, generator=generator) for _ in range(count)]
    for number, model in enumerate(tuned):
        model[number::7] = base[number::7]
    if count > 1:
        tuned[1][3::11] = base[3::11] + 0.25
        tuned[0][3::11] = base[3::11] - 0.25
    return {"w": base.to(dtype), "few": base[:1].to(dtype)}, [
        {"w": model.to(dtype), "few": model[:1].to(dtype)} for model in tuned
    ]


def reports_agree(results):
    one, other = (result.report.to_dict() for result in results)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert other[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("weights", [(0.4, 0.4, 0.4), (0.3, -0.7, 1.1), (1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "averaging", "ties"])
def test_same_bits(compare, method, weights, out, dtype):
    base, tuned = models(DTYPES[dtype])
    tasks = [Task(model, weight=weight) for model, weight in zip(tuned, weights, strict=True)]
    results, done = compare(base, tasks, method=method, dtype=out)
    assert done["merge"]
    assert all(done["merge"])
    assert all(done["count_bits"])
    assert bool(done["count_bits"]) == (method == "ties")
    reports_agree(results)


def known(seed, num_examples, names=("w", "few"), dtype=torch.float32):
    """A mean curvature with much that is next to nothing, and exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    mean = {
        "w": torch.rand(SIZE, generator=generator).pow(8),
        "few": torch.rand(1, generator=generator),
    }
    mean["w"][::3] = 0
    return Curvature.from_dict({name: mean[name].to(dtype) for name in names}, num_examples=num_examples)


EQ12 = {
    "plain": {},
    "weights below 0": {"weights": (1.0, -0.01, 0.5), "base_curvature": 5.0},
    "one flat": {"flat": 1, "missing_curvature": "zero"},
    "number": {"base_curvature": 0.3, "base_weight": 0.7},
    "base flat": {"base_names": ("few",), "missing_curvature": "zero"},
    "no floor": {"base_curvature": 0.3, "delta0": 0.0},
    "half": {"curvature_dtype": torch.bfloat16},
    "fisher": {"method": "fisher", "base_curvature": None},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EQ12)
def test_same_bits_of_eq12(compare, case, dtype):
    options = {"method": "gradient_matching", **EQ12[case]}
    weights, flat = options.pop("weights", (1.0, 0.4, 0.7)), options.pop("flat", None)
    held, names = options.pop("curvature_dtype", torch.float32), options.pop("base_names", ("w", "few"))
    options.setdefault("base_curvature", known(9, 50, names))
    base, tuned = models(DTYPES[dtype])
    tasks = [
        Task(model, known(t, 10 + t, ("few",) if t == flat else ("w", "few"), held), weight)
        for t, (model, weight) in enumerate(zip(tuned, weights, strict=True))
    ]
    results, done = compare(base, tasks, **options)
    assert done["merge"]
    assert all(done["merge"])
    reports_agree(results)


def test_same_bits_from_and_to_files(compare, tmp_path):
    """Two shards, read by descriptor; one of the models lies in memory."""
    base, tuned = models(torch.bfloat16)
    for name, tensors in (("base", base), ("one", tuned[0])):
        merge(tensors, [Task(tensors)], method="averaging", out=tmp_path / name, shard_bytes=9000)
    tasks = [Task(tmp_path / "one", weight=0.3), Task(tuned[1], weight=0.9)]
    for method in ("ties", "task_arithmetic"):
        results, done = compare(tmp_path / "base", tasks, method=method)
        assert all(done["merge"])
        monolithic = merge(base, [Task(tuned[0], weight=0.3), tasks[1]], method=method)
        assert all(torch.equal(results[1][key], monolithic[key]) for key in base)


SERVED = {
    "no normalize": {"method": "ties", "normalize": False},
    "trim by tensor": {"method": "ties", "trim": "tensor", "scale": 0.7},
    "nothing trimmed": {"method": "ties", "density": 1.0},
    "slerp": {"method": "slerp"},
    "twenty tasks": {"method": "ties"},
    "twenty curvatures": {"method": "gradient_matching", "base_curvature": 0.3},
}
LEFT = {
    "another edit": {"method": "task_arithmetic", "transforms": [{"dare": {"density": 0.5}}, "ties"]},
    "removal": {"method": "removal", "base_curvature": 0.3},
    "hbar_weight": {"method": "gradient_matching", "base_curvature": 0.3, "hbar_weight": 1.0},
    "double": {"method": "averaging"},
}


@pytest.mark.parametrize("case", SERVED | LEFT)
def test_what_is_served_and_what_is_left_to_torch(compare, case):
    base, tuned = models(
        torch.float64 if case == "double" else torch.float32, 20 if case.startswith("twenty") else 2
    )
    tasks = [Task(model, known(t, 10), 0.1 + 0.1 * t) for t, model in enumerate(tuned)]
    _, done = compare(base, tasks, **(SERVED | LEFT)[case])
    assert done["merge"]
    assert all(done["merge"]) if case in SERVED else not any(done["merge"])


def test_every_half_is_widened_and_narrowed_as_torch_does(compare):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    exact = every.float()
    between = torch.cat(
        [exact, exact * (1 + 2**-12), exact * (1 + 2**-12) * (1 + 2**-20), exact + 2**-25, exact / 3]
    )
    for values, dtype in ((every, "float32"), (between[between.abs() < 65520], "float16")):
        results, done = compare({"w": values}, [Task({"w": values})], method="averaging", dtype=dtype)
        assert all(done["merge"])
        assert torch.equal(results[1]["w"], values.to(DTYPES[dtype]))


def test_infinite_values_that_all_share_stay(compare):
    base, tuned = models(torch.bfloat16)
    for model in (base, *tuned):
        model["w"][4321] = -float("inf")
    results, done = compare(base, [Task(model, weight=0.3) for model in tuned], method="task_arithmetic")
    assert results[1]["w"][4321] == -float("inf")
    assert False in done["merge"]  # that piece was torch's
    assert True in done["merge"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "gradient_matching"])
def test_errors_are_the_same(monkeypatch, method, value, dtype):
    base, tuned = models(DTYPES[dtype])
    tuned[1]["w"][2000] = value
    tasks = [Task(model, known(t, 10), 0.3) for t, model in enumerate(tuned)]
    said = []
    for asked in ("0", "1"):
        monkeypatch.setenv("GRADMATCH_KERNEL", asked)
        with pytest.raises(ValueError, match="holds 1 NaN or infinite values in task 2") as error:
            merge(base, tasks, method=method, base_curvature=known(9, 50), allow_mismatch=True)
        said.append(str(error.value).split("(")[0])  # the blocks that are named differ
    assert said[0] == said[1]


@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_curvature_that_is_not_positive_is_refused(monkeypatch, asked):
    monkeypatch.setenv("GRADMATCH_KERNEL", asked)
    base, tuned = models(torch.float32, 1)
    with pytest.raises(ValueError, match=r"H0 \+ sum alpha_t H_t is not positive"):
        merge(base, [Task(tuned[0], known(0, 100), -1.0)], base_curvature=known(0, 10), allow_mismatch=True)


@pytest.mark.parametrize("asked", ["0", "1"])
def test_overflow_is_refused(monkeypatch, asked):
    monkeypatch.setenv("GRADMATCH_KERNEL", asked)
    base, tuned = models(torch.float32, 1)
    tuned[0]["w"][7] = 1e6
    with pytest.raises(ValueError, match=r"merged values reach 1e\+06, beyond what torch.float16 holds"):
        merge(base, [Task(tuned[0])], method="averaging", dtype="float16")


@BUILT
def test_a_file_that_shrinks_while_it_is_merged_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADMATCH_KERNEL", "1")
    base, tuned = models(torch.float32, 1)
    merge(tuned[0], [Task(tuned[0])], method="averaging", out=tmp_path / "one")
    plain = fused.merge

    def cut(*args):
        file = tmp_path / "one" / "model.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(5000)
        return plain(*args)

    monkeypatch.setattr(fused, "merge", cut)
    with pytest.raises(ValueError, match="the file changed since it was opened"):
        merge(base, [Task(tmp_path / "one")], method="task_arithmetic")


@BUILT
def test_it_is_used_unless_it_is_switched_off(monkeypatch):
    for asked, used in (("", True), ("1", True), ("0", False)):
        monkeypatch.setenv("GRADMATCH_KERNEL", asked)
        assert (compiled.kernels() is not None) == used


@BUILT
@pytest.mark.parametrize("spoilt", ["another source", "no library"])
def test_a_library_of_another_source_is_not_used(monkeypatch, tmp_path, caplog, spoilt):
    source = tmp_path / "blocks.c"
    source.write_bytes(compiled.SOURCE.read_bytes() + b"/* newer */")
    if spoilt == "no library":
        spec = native.importlib.util.find_spec(native.NAME)
        spec.origin = str(source)
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    for _ in range(2):
        assert native.load(source) is None
    assert sum("torch does the work" in line for line in caplog.messages) == 1
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.load(tmp_path / "squares.c") is None  # nothing built: not a word
    assert len(caplog.messages) == 1
