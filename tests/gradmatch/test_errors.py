"""Every way to ask for something that cannot be done, and what is said: all before a value is merged."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Task, merge, open_checkpoint
from gradmatch.common.settings import value_at
from gradmatch.estimators import Curvature
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.merging import prepare
from gradmatch.models.slices import Slice, stack
from gradmatch.rules.linear import weighted
from tests.gradmatch.cases import problem, state

BASE, H0, MODELS, CURVATURES = problem(2)
PLAIN = [Task(m) for m in MODELS]
KNOWN = [Task(m, c) for m, c in zip(MODELS, CURVATURES, strict=True)]

REQUESTS = [  # keyword arguments of merge(BASE, PLAIN, ...), and what the error must say
    ({"method": "tis"}, r"unknown method 'tis' \(did you mean 'ties'\?\)"),
    ({"method": "ties", "densty": 0.1}, r"ties has no option 'densty' \(did you mean 'density'\?\); it takes density"),
    ({"method": "ties", "density": 0.0}, r"density is 0.0; it is the share kept and must lie in \(0, 1\]"),
    ({"method": "ties", "density": 1.5}, r"density is 1.5"),
    ({"method": "ties", "density": {"*mlp*": 2.0, "*": 0.1}}, r"density is 2.0"),
    ({"method": "ties", "trim": "globl"}, r"trim is 'globl' \(did you mean 'global'\?\); choose one of global, tensor"),
    ({"method": "dare", "rescale": "l2"}, r"rescale is 'l2'"),
    ({"method": "della", "density": 0.9, "epsilon": 0.4}, r"density 0.9 with epsilon 0.4 gives probabilities from 0.7 to 1.1"),
    ({"method": "breadcrumbs", "gamma": 1.0}, r"gamma is 1.0"),
    ({"method": "slerp", "t": 1.5}, r"t is 1.5, it must lie in \[0, 1\]"),
    ({"method": "slerp", "t": [0.0, 2.0]}, r"t is 2, it must"),
    ({"method": "regmean", "ridge": -1.0}, r"ridge is -1"),
    ({"method": "nuslerp", "along": "row"}, r"along is 'row' \(did you mean 'rows'\?\); choose one of tensor, rows, columns"),
    ({"method": "slerp", "along": {"*w": "rows", "*": "colums"}}, r"along is 'colums' \(did you mean 'columns'"),
    ({"method": "task_arithmetic", "scale": math.inf}, r"scale is inf"),
    ({"method": "task_arithmetic", "transforms": ["tis"]}, r"unknown transform 'tis' \(did you mean 'ties'\?\)"),
    ({"method": "task_arithmetic", "transforms": [{"ties": {"densty": 1}}]}, r"ties has no option 'densty'"),
    ({"dtype": "flot32"}, r"dtype is 'flot32' \(did you mean 'float32'\?\)"),
    ({"dtype": "int64"}, r"dtype is 'int64'"),
    ({"dtype": "float8_e4m3fn"}, r"dtype is 'float8_e4m3fn'.*; choose one of float64, float32, float16, bfloat16"),
    ({"delta0": -1.0}, r"delta0 is -1.0; it must be a finite number of at least 0"),
    ({"delta0": math.nan}, r"delta0 is nan"),
    ({"base_weight": math.inf}, r"base_weight is inf"),
    ({"heads": "bse"}, r"heads is 'bse' \(did you mean 'base'\?\)"),
    ({"shard_bytes": 0}, r"shard_bytes is 0"),
    ({"method": "gradient_matching", "base_curvature": 1.0}, r"gradient_matching needs a curvature .* for every task, task 1 has none"),
    ({"method": "regmean"}, r"regmean needs gram matrices"),
    ({"method": "passthrough"}, r"passthrough takes 1 task, got 2"),
    ({"method": "averaging", "batchnorm": "recalibrate"}, r"as a module"),
]  # fmt: skip


KINDS = [  # options of another kind than their default's
    ({"method": "task_arithmetic", "scale": "much"}, TypeError, r"scale is 'much'; it must be a number, as its default 1.0"),
    ({"method": "task_arithmetic", "scale": [0, "1"]}, TypeError, r"scale is '1'"),
    ({"method": "task_arithmetic", "normalize": "no"}, TypeError, r"normalize is 'no'; it must be true or false"),
    ({"method": "removal", "keep": "0.1", "base_curvature": 1.0}, TypeError, r"keep is '0.1'"),
    ({"method": "ties", "density": True}, TypeError, r"ties: density is True; it must be a number"),
    ({"method": "ties", "trim": 1}, ValueError, r"trim is 1; choose one of global, tensor"),
    ({"method": "dare", "seed": 1.7}, ValueError, r"seed is 1.7, it must be a whole number"),
    ({"method": "dare", "shard_bytes": "5"}, TypeError, r"shard_bytes is '5'"),
    ({"method": "della", "epsilon": math.nan}, ValueError, r"epsilon is nan, it must be a finite number"),
    ({"method": "karcher", "iterations": -1}, ValueError, r"iterations is -1, it must lie in \[1, inf\]"),
    ({"method": "karcher", "iterations": 1.5}, ValueError, r"iterations is 1.5, it must be a whole number"),
    ({"method": "karcher", "tolerance": math.nan}, ValueError, r"tolerance is nan"),
    ({"method": "ties", "density": [{"filter": 3, "value": 1}]}, TypeError, r"the filter 3 is no text"),
    ({"delta0": "1"}, ValueError, r"delta0 is '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), KINDS, ids=lambda value: str(value)[:60])
def test_options_of_another_kind_are_refused_before_an_output_is_begun(options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        merge(BASE, PLAIN, **options, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="the filter 3 is no text"):
        Task(BASE, weight=[{"filter": 3, "value": 1}])


def test_numbers_of_other_libraries():
    import numpy as np

    wanted = merge(BASE, [Task(MODELS[0], weight=0.5)], method="task_arithmetic", scale=0.25)
    for half, quarter in ((np.float32(0.5), np.float64(0.25)), (torch.tensor(0.5), np.array(0.25))):
        found = merge(BASE, [Task(MODELS[0], weight=half)], method="task_arithmetic", scale=quarter)
        assert all(torch.equal(found[name], wanted[name]) for name in BASE)
    assert Task(BASE, weight=np.array([0, 1])).weight == [0, 1]
    merge(BASE, KNOWN, base_curvature=np.float32(1), delta0=np.float32(1e-6))


def test_large_seeds_keep_their_digits():
    one, two = (merge(BASE, [Task(MODELS[0], name="a")], method="dare", seed=2**60 + i) for i in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in BASE)


@pytest.mark.parametrize(("options", "text"), REQUESTS, ids=lambda value: str(value)[:60])
def test_requests(options, text):
    with pytest.raises(ValueError, match=text):
        merge(BASE, PLAIN, **options)


@pytest.mark.parametrize(
    ("tasks", "options", "text"),
    [
        ([], {}, "no tasks to merge"),
        (KNOWN, {}, r"gradient_matching needs the base's curvature; pass base_curvature"),
        (KNOWN, {"base_curvature": -1.0}, r"base_curvature is -1.0"),
        (KNOWN, {"base_curvature": H0, "keep": 0.0, "method": "removal"}, r"keep is 0, it must lie in \(0, 1\]"),
        (KNOWN, {"base_curvature": H0, "guard": "flor", "method": "removal"}, r"guard is 'flor' \(did you mean 'floor'\?\); choose one of floor, scale"),
        ([Task(MODELS[0], name="a"), Task(MODELS[1], name="a")], {"method": "averaging"}, r"two tasks are called 'a'"),
        ([Task(MODELS[0], weight=math.nan)], {"method": "task_arithmetic"}, r"the weight of task 1 is nan; it must be finite"),
        ([Task(m, weight=w) for m, w in zip(MODELS, (1, -1), strict=True)], {"method": "weighted"}, r"sum to zero and cannot be normalised"),
        ([Task(m, weight=w) for m, w in zip([*MODELS, BASE], (0.1, 0.2, -0.3), strict=True)], {"method": "linear"}, r"sum to zero and cannot be normalised"),
        ([Task(m, weight=w) for m, w in zip([*MODELS, BASE], (0.1, 0.2, -0.3), strict=True)], {"method": "dare", "normalize": True}, r"sum to zero and cannot be normalised"),
        ([Task(m, name=n) for m, n in zip(MODELS, ("a", "../../b"), strict=True)], {"method": "averaging", "heads": "keep-per-task"}, r"'../../b' is no plain file name"),
        ([Task(m, name=n) for m, n in zip(MODELS, ("a\\b", "b"), strict=True)], {"method": "averaging", "heads": "keep-per-task"}, r"is no plain file name"),
        ([Task(MODELS[0], name=".a")], {"method": "averaging", "heads": "keep-per-task"}, r"'.a' is no plain file name"),
        ([Task(MODELS[0], weight={"*mlp*": 1.0})], {"method": "task_arithmetic"}, r"no pattern of \['\*mlp\*'\] matches tensor 'embed.weight'"),
        ([Task(MODELS[0], options={"densty": 1})], {"method": "ties"}, r"task 1 has no option 'densty' of its own \(did you mean 'density'"),
        ([Task(MODELS[0], options={"density": 1})], {"method": "averaging"}, r"no option 'density' of its own; the method has none"),
        ([Task(MODELS[0], options={"density": 2})], {"method": "ties"}, r"density is 2"),
        ([Task({"layers.0.w": torch.ones(2, 2)})], {"method": "averaging", "missing": "base"}, r"head|shape"),
        (PLAIN[:1], {"method": "slerp"}, r"slerp takes 2 tasks, got 1"),
        ([Task(MODELS[0], Curvature.from_dict({n: torch.ones_like(t) for n, t in BASE.items()}, 1))], {"method": "measured", "base_curvature": 1.0}, r"needs the measured gradient"),
        (KNOWN, {"method": "regmean"}, r"holds no gram matrices"),
        ([Task(MODELS[0], Curvature.from_dict({n: torch.ones(3) for n in BASE}, 1))], {"base_curvature": 1.0}, r"has shape \[3\] for 'embed.weight', the model has \[11, 4\]"),
    ],
)  # fmt: skip
def test_tasks(tasks, options, text):
    with pytest.raises(ValueError, match=text):
        merge(BASE, tasks, **options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: merge(BASE, MODELS, method="averaging"), "tasks must be Task objects"),
        (lambda: merge(3, PLAIN, method="averaging"), "a model is a path"),
        (lambda: Task(3), r"Task\(\.\.\.\): a model is a path"),
        (
            lambda: merge(BASE, [Task(MODELS[0], 3)], base_curvature=1.0),
            "a curvature is a Curvature or the path",
        ),
        (lambda: merge({"w": 3}, PLAIN, method="averaging"), r"'w' is a int, not a tensor"),
        (
            lambda: merge(BASE, [Task(MODELS[0], weight="x")], method="task_arithmetic"),
            r"weight of task 1 is 'x'",
        ),
        (lambda: merge(BASE, [Task(MODELS[0], weight=[])], method="task_arithmetic"), r"is no number, list"),
        (lambda: merge(BASE, PLAIN, method="averaging", transforms=[3]), r"a transform is a name or"),
    ],
)
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text):
        call()


def known(model, value, n=1):
    return Curvature.from_dict({"w": torch.tensor(value, dtype=model["w"].dtype)}, n)


NOT_POSITIVE = [  # H0 (a tensor), curvatures, weights, delta0, method, and at how many of three weights
    ([1.0, 1.0, 1.0], [[2.0, 0.5, 0.0]], [-1.0], 1e-6, "gradient_matching", 1),  # below zero
    ([1.0, 1.0, 1.0], [[1.0, 0.5, 1.0]], [-1.0], 1e-6, "gradient_matching", 2),  # cancelled down to delta0
    ([1.0, 1.0, 1.0], [[1.0, 0.5, 1.0]], [-1.0], 0.0, "gradient_matching", 2),  # cancelled to 0
    ([1.0, 0.1, 1.0], [[0.7, 0.07, 0.0]], [-10.0 / 7], 1e-12, "gradient_matching", 2),  # to its rounding error
    ([0.0, 0.0, 1.0], [[-1.0, 2.0, 2.0]], [1.0], 1e-6, "gradient_matching", 1),  # a Hessian
    ([1.0, 1.0, 1.0], [[3.0, 1.0, 1.0], [3.0, 0.5, 0.5]], [1.0, -1.0], 1e-6, "fisher", 1),
    ([1.0, 1.0, 1.0], [[2.0, 0.5, 0.0]], [-1.0], 1e-6, "fisher_base", 1),
    ([1.0, 1.0, 1.0], [[2.0, 0.5, 0.0]], [-1.0], 1e-6, "ewr", 1),
    ([-1.0, 1.0, 1.0], [[0.1, 0.1, 0.1]], [0.5], 1e-6, "removal", 1),
]  # fmt: skip


@pytest.mark.parametrize("transforms", [(), ({"dare": {"density": 1.0}},)], ids=["kernel", "readable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("h0", "h", "weights", "delta0", "method", "count"), NOT_POSITIVE)
def test_curvature_that_is_not_positive(h0, h, weights, delta0, method, count, dtype, transforms):
    base, model = {"w": torch.zeros(3, dtype=dtype)}, {"w": torch.ones(3, dtype=dtype)}
    tasks = [Task(model, known(base, each), weight) for each, weight in zip(h, weights, strict=True)]
    options = {} if method == "fisher" else {"base_curvature": known(base, h0)}
    with pytest.raises(ValueError, match=rf"'w': at {count} weights .* is not positive: .*method='removal'"):
        merge(base, tasks, method=method, delta0=delta0, transforms=transforms, **options)


@pytest.mark.parametrize("transforms", [(), ({"dare": {"density": 1.0}},)], ids=["kernel", "readable"])
def test_negative_weights_that_leave_a_positive_curvature_are_merged(transforms):
    base, model = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    tasks = [Task(model, known(base, [0.5, 0.0, 0.25]), -1.0)]
    merged = merge(base, tasks, base_curvature=known(base, [1.0, 0.0, 1.0]), transforms=transforms)["w"]
    torch.testing.assert_close(merged, torch.tensor([-3.0, -1.0, -1.25 / 0.75]), rtol=1e-5, atol=0)


def test_shapes_and_kinds_that_differ():
    other = {**MODELS[0], "layers.0.w": torch.ones(4, 7, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"'layers.0.w' has shape \[4, 6\] in the base and \[4, 7\] in task 1"
    ):
        merge(BASE, [Task(other)], method="averaging")
    integer = {**MODELS[0], "layers.0.w": torch.ones(4, 6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"is F64 in the base and I64 in task 1"):
        merge(BASE, [Task(integer)], method="averaging")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["gradient_matching", "averaging", "ties", "measured", "slerp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_are_not_finite_are_named(value, method):
    broken = {**MODELS[0], "layers.1.w": MODELS[0]["layers.1.w"].clone()}
    broken["layers.1.w"][2, 1] = value
    tasks = [Task(broken, CURVATURES[0]), Task(MODELS[1], CURVATURES[1])]
    options = {"base_curvature": H0} if method in ("gradient_matching", "measured") else {}
    with pytest.raises(ValueError, match=r"'layers.1.w' holds 1 NaN or infinite values in task 1"):
        merge(BASE, tasks, method=method, **options)


def test_values_of_curvatures_and_of_the_base(tmp_path):
    mean = {f"mean/{name}": CURVATURES[0].mean(name).float() for name in BASE}
    mean["mean/norm.bias"][1] = math.nan
    save_file(mean, tmp_path / "c.safetensors", metadata={"format_version": "1", "num_examples": "3"})
    with pytest.raises(
        ValueError, match=r"'norm.bias' holds 1 NaN or infinite values in the curvature of task 1"
    ):
        merge(BASE, [Task(MODELS[0], tmp_path / "c.safetensors")], base_curvature=H0)
    with pytest.raises(ValueError, match=r"in the curvature of the base"):
        merge(BASE, KNOWN, base_curvature=tmp_path / "c.safetensors")
    base = {**BASE, "norm.bias": torch.full((4,), math.inf, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"'norm.bias' holds 4 NaN or infinite values in the base"):
        merge(base, PLAIN, method="task_arithmetic")


def test_overflow_is_told_from_bad_input():
    huge = {name: torch.full_like(t, 1e308) for name, t in BASE.items()}
    with pytest.raises(ValueError, match="though every input is finite"):
        merge(BASE, [Task(huge)], method="task_arithmetic", scale=1e10)
    with pytest.raises(ValueError, match=r"beyond what torch.float16 holds"):
        merge(
            BASE,
            [Task({n: torch.full_like(t, 1e6) for n, t in BASE.items()})],
            method="averaging",
            dtype="float16",
        )
    narrow = {"w": torch.ones(3).to(torch.float8_e5m2)}
    with pytest.raises(ValueError, match=r"reach 1e\+06, beyond what torch.float8_e5m2 holds"):
        merge(narrow, [Task({"w": torch.full((3,), 1e6)})], method="averaging")


def test_curvature_of_another_model(tmp_path):
    from gradmatch.estimators.fingerprint import fingerprint, model_sampler

    mean = {name: torch.ones_like(t) for name, t in BASE.items()}
    own = Curvature.from_dict(mean, 5, {"fingerprint": fingerprint(mean, model_sampler(MODELS[0]))})
    merge(BASE, [Task(MODELS[0], own)], base_curvature=1.0)
    with pytest.raises(ValueError, match="taken at other weights than task 1"):
        merge(BASE, [Task(MODELS[1], own)], base_curvature=1.0)
    merge(BASE, [Task(MODELS[1], own)], base_curvature=1.0, allow_mismatch=True)
    with pytest.raises(ValueError, match="taken at other weights than the base"):
        merge(BASE, KNOWN, base_curvature=own)


def write_folder(folder, tensors=None, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors or {"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_checkpoint_folders_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_checkpoint(tmp_path / "absent" / "deep" / "path")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no hub repository of that name could be fetched"):
        open_checkpoint("someone/no-such-model")
    quantised = write_folder(tmp_path / "q", quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="is quantised"):
        open_checkpoint(quantised)
    two = write_folder(tmp_path / "two")
    (two / "model.safetensors").rename(two / "a.safetensors")
    save_file({"v": torch.ones(2)}, two / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 safetensors files and no model.safetensors.index.json"):
        open_checkpoint(two)
    bad = write_folder(tmp_path / "bad")
    (bad / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        open_checkpoint(bad)
    (bad / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not a table"):
        open_checkpoint(bad)


INDEXES = [
    ({"w": "../other/model.safetensors"}, "points outside its folder"),
    ({"w": "/etc/model.safetensors"}, "points outside its folder"),
    ({}, "has no weight_map"),
    (
        {"w": "model.safetensors", "v": "model.safetensors"},
        r"says that model.safetensors holds 'v', but it does not",
    ),
    (
        {"w": "model.safetensors", "u": "second.safetensors"},
        r"holds 'x', which the index does not place there",
    ),
]


@pytest.mark.parametrize(("weight_map", "text"), INDEXES)
def test_indexes_that_lie(tmp_path, weight_map, text):
    folder = write_folder(tmp_path / "m")
    save_file({"u": torch.ones(2), "x": torch.ones(2)}, folder / "second.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=text):
        open_checkpoint(folder)


def test_one_name_in_two_shards(tmp_path):
    from gradmatch.estimators.tensorfile import TensorFile
    from gradmatch.models.stores import FileStore

    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'w' is in .*a.safetensors and in .*b.safetensors"):
        FileStore([TensorFile(tmp_path / "a.safetensors"), TensorFile(tmp_path / "b.safetensors")])


def test_truncated_shard_and_shrunk_file(tmp_path):
    folder = write_folder(tmp_path / "m", {"w": torch.ones(1000)})
    whole = (folder / "model.safetensors").read_bytes()
    unread, opened = open_checkpoint(folder), TensorFile(folder / "model.safetensors")
    opened.fileno()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut short"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="changed since its header was read"):
        unread["w"]
    with pytest.raises(ValueError, match="has shrunk"):
        opened.block("w")


def test_pickles_are_refused_unless_asked(tmp_path):
    torch.save(MODELS[0], tmp_path / "m.pt")
    (tmp_path / "folder").mkdir()
    torch.save(MODELS[0], tmp_path / "folder" / "pytorch_model.bin")
    for path in (tmp_path / "m.pt", tmp_path / "folder"):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            open_checkpoint(path)
        merged = merge(BASE, [Task(path)], method="averaging", allow_pickle=True)
        assert torch.equal(merged["layers.0.w"], MODELS[0]["layers.0.w"])
    torch.save({"w": print}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        open_checkpoint(tmp_path / "evil.pt", allow_pickle=True)
    torch.save(MODELS[0], tmp_path / "folder" / "pytorch_model-2.bin")
    with pytest.raises(ValueError, match="2 pickled shards"):
        open_checkpoint(tmp_path / "folder", allow_pickle=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(torch.empty(2, device="meta"), "on the meta device"), (torch.ones(2, dtype=torch.complex64), "cannot be merged"), (torch.eye(2).to_sparse(), "cannot be merged")],
)  # fmt: skip
def test_tensors_that_cannot_be_read(value, text):
    with pytest.raises(ValueError, match=text):
        open_checkpoint({"w": value})


IDLE = [  # a weight, and what the plan says of it
    ({"*layrs*": 0.7, "*": 0.3}, r"the weight of one: '\*layrs\*' matches no tensor \(did you mean 'layers'\?\)"),
    ({"layers.0.v": 0.7, "*": 0.3}, r"'layers.0.v' matches no tensor \(did you mean 'layers.0.w'\?\)"),
    ({"*zzz*": 0.7, "*": 0.3}, r"'\*zzz\*' matches no tensor; names are such as '"),
    ([{"filter": "normm", "value": 0.7}, {"value": 0.3}], r"'normm' matches no tensor \(did you mean 'norm'\?\)"),
    ({"*": 0.3, "*norm*": 0.7}, r"'\*norm\*' is never used, patterns before it match all of its tensors; put it first"),
    ([{"value": 0.3}, {"filter": "norm", "value": 0.7}], r"'norm' is never used"),
    ({"*": {"*layrs*": 1.0, "*": 0.5}}, r"'\*layrs\*' matches no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "text"), IDLE, ids=lambda value: str(value)[:50])
def test_patterns_that_settle_nothing_are_named(weight, text):
    with pytest.warns(UserWarning, match=text):
        made = prepare(BASE, [Task(MODELS[0], weight=weight, name="one")], method="task_arithmetic")
    assert len(made.notes) == 1


def test_patterns_of_options_and_heads_that_settle_nothing():
    tasks = [Task(MODELS[0], options={"density": {"*norn*": 0.5, "*": 1.0}}, name="one")]
    with pytest.warns(UserWarning, match="matches no tensor") as found:
        prepare(
            BASE,
            tasks,
            method="ties",
            scale={"*layrs*": 1.0, "*": 2.0},
            trim="tensor",
            heads="base",
            head_names=["clasifier*"],
        )
    said = "\n".join(str(one.message) for one in found)
    for text in ("option density of one: '*norn*'", "scale: '*layrs*'", "head_names: 'clasifier*'"):
        assert text in said


def test_patterns_that_all_settle_something_are_not_remarked(recwarn):
    weight = {"*norm*": 0.5, "layers.0.*": [0, 1], "layers.*": 0.1, "*": 1.0}
    assert prepare(BASE, [Task(MODELS[0], weight=weight)], method="task_arithmetic").notes == []
    assert not recwarn.list


def test_settings_errors():
    with pytest.raises(
        ValueError, match=r"no filter matches tensor 'a.b'; add a last entry without a filter"
    ):
        value_at([{"filter": "mlp", "value": 1}], "a.b", 0.0, "density")
    with pytest.raises(TypeError, match=r"density: .* is no number"):
        value_at([1, "x"], "a.b", 0.0, "density")
    with pytest.raises(
        ValueError,
        match=r"weight of task 1 is a list over the depth, \[0, 1\], but names such as 'w' hold no layers",
    ):
        merge({"w": torch.zeros(2)}, [Task({"w": torch.ones(2)}, weight=[0, 1])], method="task_arithmetic")
    assert value_at([0.3], "w", None) == 0.3


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.1 - 0.2)])
@pytest.mark.parametrize("method", ["nuslerp", "karcher", "matena_raffel"])
def test_weights_that_cancel_are_found_before_anything_is_read(method, weights):
    tasks = [Task(m, c, w) for m, c, w in zip(MODELS, CURVATURES, weights, strict=True)]
    with pytest.raises(ValueError, match="sum to zero and cannot be normalised"):
        prepare(BASE, tasks, method=method)


def test_weighted_names_the_weights():
    with pytest.raises(ValueError, match=r"\[1.0, -1.0\] sum to zero"):
        weighted([1.0, -1.0])


@pytest.mark.parametrize("bounds", [(0, 3), (1, 1), (-1, 1)])
def test_slices_out_of_range(bounds):
    with pytest.raises(ValueError, match=r"it has 2, a range needs 0 <= first < last <= 2"):
        stack([Slice(BASE, *bounds)])


def test_no_slices():
    with pytest.raises(ValueError, match="no slices"):
        stack([])


def test_quantised_weights_in_a_state_dict():
    base = {"w": torch.ones(4, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"'w' is I8 in the base and F32 in task 1; quantised weights"):
        merge(base, [Task({"w": torch.ones(4)})], method="averaging")


def test_models_of_two_architectures():
    with pytest.raises(
        ValueError, match="share no tensor at all: they are models of different architectures"
    ):
        merge(BASE, [Task({"other": torch.ones(2)})], method="averaging")


def test_a_path_that_is_not_there_names_its_neighbour(tmp_path):
    (tmp_path / "movies").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*movie \(did you mean 'movies'\?\)"):
        open_checkpoint(tmp_path / "movie")


def test_names_that_differ_by_a_prefix():
    bare = {"embed.w": torch.ones(2), "norm.w": torch.ones(2)}
    headed = {f"bert.{name}": value for name, value in bare.items()} | {"head.w": torch.ones(2)}
    for base, task, owner in ((bare, headed, "the task"), (headed, bare, "the base")):
        with pytest.raises(ValueError, match=rf"names of {owner} begin with 'bert.'"):
            merge(base, [Task(task)], method="averaging", head_names=["nothing"], heads="base")


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_two_models_are_needed_for_every_tensor(method):
    lacking = {name: value for name, value in MODELS[0].items() if name != "layers.0.w"}
    with pytest.raises(ValueError, match=rf"'layers.0.w' is in 1 of the tasks, and {method} needs 2"):
        merge(BASE, [Task(lacking), Task(MODELS[1])], method=method, missing="base")


def test_copied_values_that_another_dtype_cannot_hold():
    base, model = {"w": torch.ones(2), "old": torch.tensor([1e38, 1.0])}, {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"old: values reach 1e\+38, beyond what torch.float16 holds"):
        merge(base, [Task(model)], method="averaging", missing="base", dtype="float16")


@pytest.mark.parametrize(("method", "instead"), [("gradient_matching", "fisher"), ("removal", "negation")])
def test_a_missing_base_curvature_names_a_method_of_the_same_purpose(method, instead):
    base, _, models, curvatures = problem(1)
    with pytest.raises(ValueError, match=rf"base_curvature=1.0 .*, or use method='{instead}'"):
        merge(base, [Task(models[0], curvatures[0])], method=method)


def test_models_of_another_size_are_not_called_another_head():
    small = {name: value[..., :3] if value.dim() == 2 else value for name, value in MODELS[0].items()}
    said = r"'layers.0.w' has shape \[4, 6\] in the base and \[4, 3\] in task 1, and so have 2 more of 5 tensors another"
    for heads in ("error", "base"):
        with pytest.raises(ValueError, match=said) as error:
            merge(BASE, [Task(small)], method="averaging", heads=heads)
        assert "head" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net."])
@pytest.mark.parametrize("heads", ["base", "keep-per-task"])
def test_a_head_never_holds_the_network_whatever_its_names_begin_with(prefix, heads):
    def network(classes, seed):
        shapes = {
            "features.0.weight": (4, 3),
            "features.2.weight": (8, 4),
            "classifier.0.weight": (classes, 8),
            "classifier.0.bias": (classes,),
        }
        return {prefix + name: value for name, value in state(seed, shapes=shapes).items()}

    base, models = network(2, 0), [network(3, 1), network(4, 2)]
    made = prepare(
        base, [Task(m, name=n) for m, n in zip(models, "ab", strict=True)], method="averaging", heads=heads
    )
    assert [step.name.removeprefix(prefix) for step in made.merged] == [
        "features.0.weight",
        "features.2.weight",
    ]


def test_a_merge_that_merges_nothing_is_an_error_and_one_that_merges_little_is_told():
    base = {"few": torch.ones(2), "many": torch.ones(100)}
    with pytest.raises(
        ValueError, match=r"no tensor would be merged, .* \(in no task: the base's\); check the policies"
    ):
        prepare(base, [Task({"other": torch.ones(3)})], method="averaging", missing="base")
    with pytest.warns(UserWarning, match="2 of the base's 102 weights are merged; all others are the base's"):
        prepare(base, [Task({"few": torch.ones(2)})], method="averaging", missing="base")


@pytest.mark.parametrize(
    ("method", "weights", "options", "total"),
    [
        ("linear", (1.0, -0.5), {"normalize": False}, "0.5"),
        ("weighted", (1.0, 1.0), {"normalize": False}, "2"),
        ("linear", (1.0, {"*norm*": 0.5, "*": 0.0}), {"normalize": False}, "1.5"),
        ("linear", (1.0, -0.5), {}, None),
        ("linear", (0.25, 0.75), {"normalize": False}, None),
        ("task_arithmetic", (1.0, -0.5), {}, None),  # the base keeps the rest
        ("passthrough", (1.0,), {"scale": 0.5}, None),  # what was asked for
    ],
)  # fmt: skip
def test_weights_that_scale_whole_models_are_remarked(recwarn, method, weights, options, total):
    tasks = [Task(m, weight=w) for m, w in zip(MODELS, weights, strict=False)]
    made = prepare(BASE, tasks, method=method, **options)
    said = [note for note in made.notes if "do not sum to 1" in note]
    assert [f"({total} for " in note for note in said] == [True] * (total is not None)
    if method == "linear":
        assert made.formula == "sum_t alpha_t theta_t" + " / sum_t alpha_t" * options.get("normalize", True)
