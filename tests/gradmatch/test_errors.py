"""Every way to ask for something that cannot be done, and what is said: all before a value is merged."""

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
SMALL = {name: value[..., :3] if value.dim() == 2 else value for name, value in MODELS[0].items()}
LACKING = {name: value for name, value in MODELS[0].items() if name != "layers.0.w"}
BARE = {"embed.w": torch.ones(2), "norm.w": torch.ones(2)}
HEADED = {f"bert.{name}": value for name, value in BARE.items()} | {"head.w": torch.ones(2)}
BESIDE = {"method": "averaging", "heads": "keep-per-task"}
OTHER_SIZE = r"^(?!.*head).*'layers.0.w' has shape \[4, 6\] in the base and \[4, 3\] in task 1, and so have 2 more of 5 tensors another"


def weighing(*weights):
    return [Task(m, weight=w) for m, w in zip([*MODELS, BASE], weights, strict=False)]


def called(*names):
    return [Task(m, name=n) for m, n in zip(MODELS, names, strict=False)]


def filled(value, dtype=torch.float64):
    return {name: torch.full_like(t, value, dtype=dtype) for name, t in BASE.items()}


# Keyword arguments of merge(base=BASE, tasks=PLAIN, ...), and what the error must say. What the command refuses as well
# stands in test_refusals.py.
VALUES = [
    ({"method": "ties", "density": 0.0}, r"density is 0.0; it is the share kept and must lie in \(0, 1\]"),
    ({"method": "ties", "density": {"*mlp*": 2.0, "*": 0.1}}, r"density is 2.0"),
    ({"method": "dare", "rescale": "l2"}, r"rescale is 'l2'"),
    ({"method": "della", "density": 0.9, "epsilon": 0.4}, r"density 0.9 with epsilon 0.4 gives probabilities from 0.7 to 1.1"),
    ({"method": "breadcrumbs", "gamma": 1.0}, r"gamma is 1.0"),
    ({"method": "slerp", "t": 1.5}, r"t is 1.5, it must lie in \[0, 1\]"),
    ({"method": "slerp", "t": [0.0, 2.0]}, r"t is 2, it must"),
    ({"method": "regmean", "ridge": -1.0}, r"ridge is -1"),
    ({"method": "nuslerp", "along": "row"}, r"along is 'row' \(did you mean 'rows'\?\); choose one of tensor, rows, columns"),
    ({"method": "slerp", "along": {"*w": "rows", "*": "colums"}}, r"along is 'colums' \(did you mean 'columns'"),
    ({"method": "task_arithmetic", "scale": math.inf}, r"scale is inf"),
    ({"method": "task_arithmetic", "transforms": [{"ties": {"densty": 1}}]}, r"ties has no option 'densty'"),
    ({"dtype": "flot32"}, r"dtype is 'flot32' \(did you mean 'float32'\?\)"),
    ({"dtype": "float8_e4m3fn"}, r"dtype is 'float8_e4m3fn'.*; choose one of float64, float32, float16, bfloat16"),
    ({"delta0": -1.0}, r"delta0 is -1.0; it must be a finite number of at least 0"),
    ({"delta0": math.nan}, r"delta0 is nan"),
    ({"base_weight": math.inf}, r"base_weight is inf"),
    ({"heads": "bse"}, r"heads is 'bse' \(did you mean 'base'\?\)"),
    ({"shard_bytes": 0}, r"shard_bytes is 0"),
    ({"method": "gradient_matching", "base_curvature": 1.0}, r"gradient_matching needs a curvature .* for every task, task 1 has none"),
    ({"method": "regmean"}, r"regmean needs gram matrices"),
    ({"method": "averaging", "batchnorm": "recalibrate"}, r"as a module"),
    ({"method": "ties", "trim": 1}, r"trim is 1; choose one of global, tensor"),
    ({"method": "dare", "seed": 1.7}, r"seed is 1.7, it must be a whole number"),
    ({"method": "della", "epsilon": math.nan}, r"epsilon is nan, it must be a finite number"),
    ({"method": "karcher", "iterations": -1}, r"iterations is -1, it must lie in \[1, inf\]"),
    ({"method": "karcher", "iterations": 1.5}, r"iterations is 1.5, it must be a whole number"),
    ({"method": "karcher", "tolerance": math.nan}, r"tolerance is nan"),
    ({"delta0": "1"}, r"delta0 is '1'"),
    ({"tasks": []}, "no tasks to merge"),
    ({"tasks": KNOWN, "base_curvature": H0, "guard": "flor", "method": "removal"}, r"guard is 'flor' \(did you mean 'floor'\?\); choose one of floor, scale"),
    ({"tasks": KNOWN[:1]}, r"needs the base's curvature; pass base_curvature.* base_curvature=1.0 .*, or use method='fisher'"),
    ({"tasks": KNOWN[:1], "method": "removal"}, r"base_curvature=1.0 .*, or use method='negation'"),
    ({"tasks": weighing(1, -1), "method": "weighted"}, "sum to zero and cannot be normalised"),
    ({"tasks": weighing(0.1, 0.2, -0.3), "method": "linear"}, "sum to zero and cannot be normalised"),
    ({"tasks": weighing(0.1, 0.2, -0.3), "method": "dare", "normalize": True}, "sum to zero and cannot be normalised"),
    ({"tasks": called("a", "../../b"), **BESIDE}, r"'../../b' is no plain file name"),
    ({"tasks": called("a\\b", "b"), **BESIDE}, "is no plain file name"),
    ({"tasks": called(".a"), **BESIDE}, "'.a' is no plain file name"),
    ({"tasks": [Task(MODELS[0], options={"densty": 1})], "method": "ties"}, r"task 1 has no option 'densty' of its own \(did you mean 'density'"),
    ({"tasks": [Task(MODELS[0], options={"density": 1})], "method": "averaging"}, "no option 'density' of its own; the method has none"),
    ({"tasks": [Task(MODELS[0], options={"density": 2})], "method": "ties"}, "density is 2"),
    ({"tasks": [Task({"layers.0.w": torch.ones(2, 2)})], "method": "averaging", "missing": "base"}, "head|shape"),
    ({"tasks": PLAIN[:1], "method": "slerp"}, "slerp takes 2 tasks, got 1"),
    ({"tasks": [Task(LACKING), PLAIN[1]], "method": "slerp", "missing": "base"}, "'layers.0.w' is in 1 of the tasks, and slerp needs 2"),
    ({"tasks": [Task(LACKING), PLAIN[1]], "method": "nuslerp", "missing": "base"}, "'layers.0.w' is in 1 of the tasks, and nuslerp needs 2"),
    ({"tasks": [Task(MODELS[0], Curvature.from_dict(filled(1.0), 1))], "method": "measured", "base_curvature": 1.0}, "needs the measured gradient"),
    ({"tasks": [Task(MODELS[0], Curvature.from_dict({n: torch.ones(3) for n in BASE}, 1))], "base_curvature": 1.0}, r"has shape \[3\] for 'embed.weight', the model has \[11, 4\]"),
    ({"tasks": [Task({**MODELS[0], "layers.0.w": torch.ones(4, 6, dtype=torch.int64)})], "method": "averaging"}, "is F64 in the base and I64 in task 1"),
    ({"tasks": [Task(SMALL)], "method": "averaging"}, OTHER_SIZE),
    ({"tasks": [Task(SMALL)], "method": "averaging", "heads": "base"}, OTHER_SIZE),
    ({"tasks": [Task(filled(1e308))], "method": "task_arithmetic", "scale": 1e10}, "though every input is finite"),
    ({"tasks": [Task(filled(1e6))], "method": "averaging", "dtype": "float16"}, "beyond what torch.float16 holds"),
    ({"base": {"w": torch.ones(3).to(torch.float8_e5m2)}, "tasks": [Task({"w": torch.full((3,), 1e6)})], "method": "averaging"}, r"reach 1e\+06, beyond what torch.float8_e5m2 holds"),
    ({"base": {"w": torch.ones(2), "old": torch.tensor([1e38, 1.0])}, "tasks": [Task({"w": torch.zeros(2)})], "method": "averaging", "missing": "base", "dtype": "float16"}, r"old: values reach 1e\+38, beyond what torch.float16 holds"),
    ({"base": {**BASE, "norm.bias": torch.full((4,), math.inf, dtype=torch.float64)}, "method": "task_arithmetic"}, "'norm.bias' holds 4 NaN or infinite values in the base"),
    ({"base": {"w": torch.ones(4, dtype=torch.int8)}, "tasks": [Task({"w": torch.ones(4)})], "method": "averaging"}, "'w' is I8 in the base and F32 in task 1; quantised weights"),
    ({"base": {"w": torch.zeros(2)}, "tasks": [Task({"w": torch.ones(2)}, weight=[0, 1])], "method": "task_arithmetic"}, r"weight of task 1 is a list over the depth, \[0, 1\], but names such as 'w' hold no layers"),
    ({"base": BARE, "tasks": [Task(HEADED)], "method": "averaging", "head_names": ["nothing"], "heads": "base"}, "names of the task begin with 'bert.'"),
    ({"base": HEADED, "tasks": [Task(BARE)], "method": "averaging", "head_names": ["nothing"], "heads": "base"}, "names of the base begin with 'bert.'"),
    ({"base": BARE, "tasks": [Task({"other": torch.ones(3)})], "method": "averaging", "missing": "base"}, r"no tensor would be merged, .* \(in no task: the base's\); check the policies"),
]  # fmt: skip
TYPES = [
    ({"method": "task_arithmetic", "scale": "much"}, r"scale is 'much'; it must be a number, as its default 1.0"),
    ({"method": "task_arithmetic", "scale": [0, "1"]}, r"scale is '1'"),
    ({"method": "task_arithmetic", "normalize": "no"}, r"normalize is 'no'; it must be true or false"),
    ({"method": "removal", "keep": "0.1", "base_curvature": 1.0}, r"keep is '0.1'"),
    ({"method": "ties", "density": True}, r"ties: density is True; it must be a number"),
    ({"method": "dare", "shard_bytes": "5"}, r"shard_bytes is '5'"),
    ({"method": "ties", "density": [{"filter": 3, "value": 1}]}, r"the filter 3 is no text"),
    ({"tasks": MODELS, "method": "averaging"}, "tasks must be Task objects"),
    ({"base": 3, "method": "averaging"}, "a model is a path"),
    ({"base": {"w": 3}, "method": "averaging"}, "'w' is a int, not a tensor"),
    ({"tasks": [Task(MODELS[0], 3)], "base_curvature": 1.0}, "a curvature is a Curvature or the path"),
    ({"tasks": [Task(MODELS[0], weight="x")], "method": "task_arithmetic"}, "weight of task 1 is 'x'"),
    ({"tasks": [Task(MODELS[0], weight=[])], "method": "task_arithmetic"}, "is no number, list"),
    ({"method": "averaging", "transforms": [3]}, "a transform is a name or"),
]  # fmt: skip
REFUSED = [(ValueError, *row) for row in VALUES] + [(TypeError, *row) for row in TYPES]


@pytest.mark.parametrize(("error", "given", "text"), REFUSED, ids=[text[:60] for _, _, text in REFUSED])
def test_what_is_refused_and_leaves_nothing_behind(error, given, text, tmp_path):
    with pytest.raises(error, match=text):
        merge(**{"base": BASE, "tasks": PLAIN, **given}, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_task_checks_itself():
    with pytest.raises(TypeError, match="the filter 3 is no text"):
        Task(BASE, weight=[{"filter": 3, "value": 1}])
    with pytest.raises(TypeError, match=r"Task\(\.\.\.\): a model is a path"):
        Task(3)


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


def test_values_of_curvatures(tmp_path):
    mean = {f"mean/{name}": CURVATURES[0].mean(name).float() for name in BASE}
    mean["mean/norm.bias"][1] = math.nan
    save_file(mean, tmp_path / "c.safetensors", metadata={"format_version": "1", "num_examples": "3"})
    said = "'norm.bias' holds 1 NaN or infinite values in the curvature of"
    with pytest.raises(ValueError, match=f"{said} task 1"):
        merge(BASE, [Task(MODELS[0], tmp_path / "c.safetensors")], base_curvature=H0)
    with pytest.raises(ValueError, match=f"{said} the base"):
        merge(BASE, KNOWN, base_curvature=tmp_path / "c.safetensors")


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


def test_a_file_of_values_that_was_cut_while_it_is_open(tmp_path):
    """What of a folder cannot be opened at all stands in test_refusals.py."""
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    unread, opened = open_checkpoint(tmp_path), TensorFile(tmp_path / "model.safetensors")
    opened.fileno()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut short"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="changed since its header was read"):
        unread["w"]
    with pytest.raises(ValueError, match="has shrunk"):
        opened.block("w")


def test_one_name_in_two_shards(tmp_path):
    from gradmatch.models.stores import FileStore

    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'w' is in .*a.safetensors and in .*b.safetensors"):
        FileStore([TensorFile(tmp_path / "a.safetensors"), TensorFile(tmp_path / "b.safetensors")])


def test_a_pickle_of_before_zip_archives_is_read(tmp_path):
    torch.save(BASE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = open_checkpoint(tmp_path / "old.pt", allow_pickle=True)
    assert all(torch.equal(found[name], value) for name, value in BASE.items())


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
    options = {"method": "ties", "scale": {"*layrs*": 1.0, "*": 2.0}, "trim": "tensor"}
    with pytest.warns(UserWarning, match="matches no tensor") as found:
        prepare(BASE, tasks, heads="base", head_names=["clasifier*"], **options)
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
    with pytest.raises(ValueError, match="no slices"):
        stack([])


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


def test_a_merge_that_merges_little_is_told():
    base = {"few": torch.ones(2), "many": torch.ones(100)}
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


def test_weights_that_are_all_zero_are_told():
    base = {"w": torch.zeros(2)}
    for weight, count in ((0.0, 1), ({"w": 0.0}, 1), (1.0, 0)):
        notes = merge(
            base, [Task({"w": torch.ones(2)}, weight=weight)], method="task_arithmetic"
        ).report.notes
        assert sum("every weight is 0, so that no task takes part" in note for note in notes) == count
