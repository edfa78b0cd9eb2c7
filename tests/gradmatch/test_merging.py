"""merge, subtract and analogy from outside: kinds of input, dtypes, ties, buffers, streaming to a folder."""

import json
import math
import struct
import threading
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gradmatch import Task, analogy, load_head, merge, open_checkpoint, subtract
from gradmatch.estimators import Curvature
from gradmatch.models.slices import Slice, stack
from tests.gradmatch.cases import SHAPES, curvature, problem, state, tuned
from tests.gradmatch.test_views import MODELS
from tests.gradmatch.tiny import gpt2 as tiny_gpt2
from tests.gradmatch.tiny import tuned as perturbed

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tasks_of(models, curvatures=None, weight=1.0):
    return [Task(m, None if curvatures is None else curvatures[i], weight) for i, m in enumerate(models)]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return tiny_gpt2()


def saved(folder, **modules):
    """Folders with the models, in order."""
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    return [folder / name for name in modules]


def test_result_has_the_bases_names_shapes_and_dtypes():
    def model(step, mask, values):
        return {**values, "step": torch.tensor(step), "mask": torch.full((2,), mask)}

    base = model(7, True, state(0, torch.bfloat16))
    models = [model(9, False, tuned(state(0, torch.bfloat16), seed)) for seed in (1, 2)]
    merged = merge(base, tasks_of(models), method="averaging")
    kinds = [{n: (t.dtype, t.shape) for n, t in one.items()} for one in (merged, base)]
    assert kinds[0] == kinds[1]
    assert merged["step"] == 7
    assert merged["mask"].all()


def test_bfloat16_is_merged_in_float32_and_the_loss_reported():
    base = state(0, torch.bfloat16, scale=1.0, shapes={"w": (64, 64)})
    model = {"w": (base["w"].float() * (1 + 1e-3 * torch.randn(64, 64))).float()}
    with pytest.warns(UserWarning, match="rounding kept"):
        merged = merge(base, [Task(model)], method="task_arithmetic")
    assert merged["w"].dtype == torch.bfloat16
    assert 0 <= merged.report.kept_update < 0.9
    assert merge(base, [Task(model)], method="task_arithmetic", dtype="float32").report.kept_update is None


def test_stochastic_rounding_is_unbiased_and_seeded():
    count = 200_000
    base = {"w": torch.zeros(count, dtype=torch.bfloat16)}
    value = 1 + 1 / 512  # a quarter of the way between two bfloat16 neighbours
    options = {"method": "task_arithmetic", "rounding": "stochastic"}
    merged, again, other = (
        merge(base, [Task({"w": torch.full((count,), value)})], **options, seed=seed)["w"]
        for seed in (1, 1, 2)
    )
    assert abs(float(merged.double().mean()) - value) < 4 * (1 / 128) * math.sqrt(0.25 * 0.75 / count)
    assert torch.equal(merged, again)
    assert not torch.equal(merged, other)


def test_float32_close_to_float64_and_precision_option():
    base, base_curvature, models, curvatures = problem()
    exact = merge(base, tasks_of(models, curvatures), base_curvature=base_curvature)
    low = [{n: t.float() for n, t in m.items()} for m in (base, *models)]
    options = {"base_curvature": base_curvature}
    single = merge(low[0], tasks_of(low[1:], curvatures), **options)
    double = merge(low[0], tasks_of(low[1:], curvatures), precision="float64", dtype="float64", **options)
    for name in SHAPES:
        torch.testing.assert_close(single[name].double(), exact[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(double[name], exact[name], rtol=1e-5, atol=1e-6)


def test_blocks_give_what_whole_tensors_give():
    base = state(0, shapes={"w": (700, 500), "v": (3,)})
    models, curvatures = [tuned(base, 1), tuned(base, 2)], []
    curvatures = [curvature(m, i, 10) for i, m in enumerate(models)]
    h0 = curvature(base, 9, 20)
    merged = merge(base, tasks_of(models, curvatures, 0.7), base_curvature=h0, delta0=1e-3)
    for name in base:
        bar = h0.total(name) + 1e-3 + sum(0.7 * c.total(name) for c in curvatures)
        top = sum(
            0.7 * (h0.total(name) + 1e-3 + c.total(name)) * (m[name] - base[name])
            for c, m in zip(curvatures, models, strict=True)
        )
        torch.testing.assert_close(merged[name], base[name] + top / bar, **CLOSE)


def test_modules_with_tied_weights(gpt2):
    one, two = perturbed(gpt2, 1), perturbed(gpt2, 2)
    merged = merge(gpt2, [Task(one), Task(two)], method="averaging")
    assert set(merged) == set(gpt2.state_dict())
    assert merged["lm_head.weight"].data_ptr() == merged["transformer.wte.weight"].data_ptr()
    expected = (one.state_dict()["lm_head.weight"] + two.state_dict()["lm_head.weight"]) / 2
    torch.testing.assert_close(merged["lm_head.weight"], expected)
    gpt2.load_state_dict(merged)


def test_a_curvature_may_go_by_either_name_of_a_tied_tensor(gpt2):
    one = perturbed(gpt2, 1)
    names = [name for name, _ in one.named_parameters()]
    mean = {name: torch.rand_like(one.state_dict()[name]) for name in names}
    mean["lm_head.weight"] = mean.pop("transformer.wte.weight")
    known = Curvature.from_dict(mean, 5)
    merged = merge(gpt2, [Task(one, known)], base_curvature=1.0)
    torch.testing.assert_close(merged["lm_head.weight"], one.state_dict()["lm_head.weight"])


def test_tied_in_the_base_but_not_in_a_task(gpt2):
    one = {name: value.clone() for name, value in gpt2.state_dict().items()}
    merge(gpt2, [Task(one)], method="averaging")  # equal values in two places: fine
    one["lm_head.weight"] = one["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"tied to 'transformer.wte.weight' in the base but differs"):
        merge(gpt2, [Task(one)], method="averaging")


def test_streamed_folder_loads_in_transformers_and_equals_memory(gpt2, tmp_path):
    models = [gpt2, perturbed(gpt2, 1), perturbed(gpt2, 2)]
    paths = [tmp_path / f"m{number}" for number in range(3)]
    for number, (path, model) in enumerate(zip(paths, models, strict=True)):
        model.save_pretrained(path, max_shard_size="20KB" if number else "1GB")
    options = {"method": "ties", "density": 0.5}
    streamed = merge(paths[0], tasks_of(paths[1:]), out=tmp_path / "out", **options)
    memory = merge(gpt2, tasks_of(models[1:]), **options)
    for name in streamed:
        torch.testing.assert_close(streamed[name], memory[name])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.state_dict()["lm_head.weight"], memory["transformer.wte.weight"])
    assert streamed.report.summary() == memory.report.summary()


def test_module_streamed_with_its_config_and_verified_by_reload(gpt2, tmp_path):
    options = {"method": "averaging", "dtype": "bfloat16", "verify": "reload"}
    done = merge(gpt2, [Task(perturbed(gpt2, 1))], out=tmp_path / "out", **options)
    assert done.config["dtype"] == "bfloat16"
    assert "lm_head.weight" not in done.store
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16


def test_plain_state_dict_streamed_keeps_its_aliases(tmp_path):
    shared = torch.randn(3, 2)
    base, model = {"a": shared, "b": shared}, {"a": shared + 1, "b": shared + 1}
    done = merge(base, [Task(model)], method="averaging", out=tmp_path / "out")
    assert list(done.store) == ["a"]
    torch.testing.assert_close(done["b"], shared + 1)
    torch.testing.assert_close(open_checkpoint(tmp_path / "out")["b"], shared + 1)


def test_shards_and_index(tmp_path):
    base = state(0, torch.float32)
    done = merge(base, [Task(tuned(base, 1))], method="averaging", out=tmp_path / "out", shard_bytes=200)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert set(done) == set(base)


def test_memory_of_a_streamed_merge_stays_below_four_megabytes(tmp_path):
    paths = []
    for number in range(4):  # 16 MB each
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"w": torch.randn(2000, 2000), "v": torch.randn(7)}, paths[-1])
    options = {"method": "task_arithmetic", "shard_bytes": 1 << 30}
    merge(paths[0], tasks_of(paths[1:]), out=tmp_path / "warm", **options)
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    merge(paths[0], tasks_of(paths[1:]), out=tmp_path / "out", **options)
    stop.set()
    watching.join()
    assert peak[0] - before < 4e6 + 8 * 131072 * 8  # a few blocks for each worker, whatever the tensor's size


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_reading_is_lazy(tmp_path):
    save_file({"w": torch.randn(1000, 1000)}, tmp_path / "m.safetensors")
    tracemalloc.start()
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.spec("w").shape == (1000, 1000)
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


def test_per_tensor_weights():
    base, _, models, _ = problem(1)
    merged = merge(base, [Task(models[0], weight=[0.0, 1.0])], method="task_arithmetic")
    torch.testing.assert_close(merged["layers.0.w"], base["layers.0.w"], **CLOSE)
    torch.testing.assert_close(merged["layers.1.w"], models[0]["layers.1.w"], **CLOSE)
    merged = merge(base, [Task(models[0], weight={"layers.*": 1.0, "*": 0.0})], method="task_arithmetic")
    torch.testing.assert_close(merged["layers.0.w"], models[0]["layers.0.w"], **CLOSE)
    torch.testing.assert_close(merged["norm.bias"], base["norm.bias"], **CLOSE)


def test_transforms_compose_with_curvature():
    base, base_curvature, models, curvatures = problem(3)
    chain = ["dare", "ties"]
    flat = Curvature.from_dict({n: torch.zeros_like(t) for n, t in base.items()}, 1)
    options = {"transforms": chain, "density": 0.6, "seed": 3}
    zero = merge(base, tasks_of(models, [flat] * 3), base_curvature=base_curvature, **options)
    plain = merge(base, tasks_of(models), method="task_arithmetic", **options)
    dare_ties = merge(base, tasks_of(models), method="dare_ties", density=0.6, seed=3)
    for name in base:  # without curvature Eq. 12 is task arithmetic, also of edited task vectors
        torch.testing.assert_close(zero[name], plain[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plain[name], dare_ties[name], **CLOSE)
    curved = merge(base, tasks_of(models, curvatures), base_curvature=base_curvature, **options)
    assert any(not torch.allclose(curved[name], plain[name]) for name in base)


def test_random_methods_depend_on_names_and_seed_alone():
    base, _, models, _ = problem(2)
    tasks = [Task(m, name=name) for m, name in zip(models, "ab", strict=True)]
    one = merge(base, tasks, method="dare", density=0.5)
    two = merge(base, tasks[::-1], method="dare", density=0.5)
    other = merge(base, tasks, method="dare", density=0.5, seed=1)
    assert all(torch.allclose(one[n], two[n], atol=1e-12) for n in base)
    assert any(not torch.equal(one[n], other[n]) for n in base)


def test_floor_share_and_floor_error():
    base, _, models, _ = problem(1)
    known = {name: torch.ones_like(t) for name, t in base.items()}
    known["layers.0.w"][0] = 0
    some = Curvature.from_dict(known, 3)
    merged = merge(base, [Task(models[0], some)], method="fisher", delta0=1e-6)
    assert merged.report.floor_share == pytest.approx(6 / sum(t.numel() for t in base.values()))
    torch.testing.assert_close(merged["layers.0.w"], models[0]["layers.0.w"])
    said = r"'layers.0.w': 6 weights have no curvature in any model and delta0 = 0"
    with pytest.raises(ValueError, match=said):
        merge(base, [Task(models[0], some)], method="fisher", delta0=0.0)


def test_missing_curvature_is_flat_where_asked():
    base, base_curvature, models, curvatures = problem(1)
    partial = Curvature.from_dict({n: curvatures[0].mean(n) for n in SHAPES if n != "norm.bias"}, 5)
    with pytest.raises(ValueError, match=r"curvature of task 1 has no block for 'norm.bias'"):
        merge(base, [Task(models[0], partial)], base_curvature=base_curvature)
    options = {"base_curvature": base_curvature, "missing_curvature": "zero"}
    found = merge(base, [Task(models[0], partial, 0.4)], **options)["norm.bias"]
    expected = base["norm.bias"] + 0.4 * (models[0]["norm.bias"] - base["norm.bias"])
    torch.testing.assert_close(found, expected, **CLOSE)
    for method in ("fisher_base", "ewr", "fisher_negation"):  # and in the readable rules
        merged = merge(base, [Task(models[0], partial)], method=method, **options)
        torch.testing.assert_close(merged["norm.bias"], base["norm.bias"], **CLOSE)


def test_missing_and_extra_tensors():
    base, _, models, _ = problem(2)
    lacking = {name: t for name, t in models[0].items() if name != "norm.bias"}
    extra = {**models[1], "layers.0.new": torch.ones(2)}
    for task, text in (
        (lacking, r"'norm.bias' F64 \[4\] of the base is missing in task 1"),
        (extra, r"task 1 .*holds 1 tensor\(s\) that the base lacks, first 'layers.0.new'"),
    ):
        with pytest.raises(ValueError, match=text):
            merge(base, [Task(task)], method="averaging")
    merged = merge(base, [Task(lacking), Task(extra)], method="averaging", missing="base")
    torch.testing.assert_close(merged["norm.bias"], models[1]["norm.bias"], **CLOSE)
    assert "layers.0.new" not in merged


def test_heads():
    base, _, models, _ = problem(2)
    base, one, two = (
        {**m, "classifier.dense.weight": torch.randn(4, 4), "classifier.out.weight": torch.randn(k, 4)}
        for m, k in zip((base, *models), (2, 3, 5), strict=True)
    )
    tasks = [Task(one, name="one"), Task(two, name="two")]
    with pytest.raises(ValueError, match=r"head 'classifier.out.weight' differs: \[2, 4\] in the base"):
        merge(base, tasks, method="averaging")
    kept = merge(base, tasks, method="averaging", heads="base")
    assert torch.equal(kept["classifier.dense.weight"], base["classifier.dense.weight"])
    beside = merge(base, tasks, method="averaging", heads="keep-per-task")
    assert torch.equal(beside.report.heads["two"]["classifier.out.weight"], two["classifier.out.weight"])
    torch.testing.assert_close(beside["layers.0.w"], (one["layers.0.w"] + two["layers.0.w"]) / 2, **CLOSE)


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.classifier = nn.Linear(4, classes)


def test_heads_saved_beside_the_trunk_and_loaded(tmp_path):
    base, one, two = Classifier(2), Classifier(3), Classifier(5)
    tasks = [Task(one, name="one"), Task(two, name="two")]
    merge(base, tasks, method="averaging", heads="keep-per-task", out=tmp_path / "out")
    target = Classifier(5)
    load_head(target, tmp_path / "out", "two")
    assert torch.equal(target.classifier.weight, two.classifier.weight)
    with pytest.raises(FileNotFoundError, match=r"keeps no head of 'tow' \(did you mean 'two'"):
        load_head(target, tmp_path / "out", "tow")
    with pytest.raises(ValueError, match=r"head tensor 'classifier.\w+' of one has shape"):
        load_head(target, tmp_path / "out", "one")


@pytest.fixture
def convnets():
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        for _ in range(3):
            net(torch.randn(16, 3, 6, 6) * (1 + seed))
        nets.append(net)
    return nets


def test_batchnorm_policies(convnets):
    base, *models = convnets
    with pytest.raises(ValueError, match=r"BatchNorm statistic '1.running_mean' differs .*recalibrate"):
        merge(base, tasks_of(models), method="averaging")
    copied = merge(base, tasks_of(models), method="averaging", batchnorm="copy")
    assert torch.equal(copied["1.running_var"], base[1].running_var)
    averaged = merge(base, tasks_of(models), method="averaging", batchnorm="average")
    torch.testing.assert_close(
        averaged["1.running_var"], (models[0][1].running_var + models[1][1].running_var) / 2
    )
    assert averaged["1.num_batches_tracked"] == 3


def test_batchnorm_recalibrated_on_data(convnets):
    base, *models = convnets
    batches = [torch.randn(16, 3, 6, 6) for _ in range(4)]
    merged, pairs = (
        merge(base, tasks_of(models), method="averaging", batchnorm="recalibrate", batches=given)
        for given in (batches, [(x, None) for x in batches])
    )
    inputs = [nn.functional.conv2d(x, merged["0.weight"], merged["0.bias"]) for x in batches]
    torch.testing.assert_close(merged["1.running_mean"], torch.cat(inputs).mean((0, 2, 3)))
    torch.testing.assert_close(merged["1.running_var"], torch.cat(inputs).var((0, 2, 3)))
    torch.testing.assert_close(pairs["1.running_var"], merged["1.running_var"])


def test_batchnorm_recalibrated_in_a_folder_is_that_in_memory(convnets, tmp_path, monkeypatch):
    base, *models = convnets
    before = base[1].running_mean.clone()
    batches = [torch.randn(16, 3, 6, 6) for _ in range(2)]
    options = {"method": "averaging", "batchnorm": "recalibrate"}
    memory = merge(base, tasks_of(models), batches=batches, **options)
    folder = merge(base, tasks_of(models), batches=batches, out=tmp_path / "out", shard_bytes=500, **options)
    assert all(torch.equal(folder[name], memory[name]) for name in memory)
    assert torch.equal(base[1].running_mean, before)
    with pytest.raises(ValueError, match="are empty"):
        merge(base, tasks_of(models), batches=iter([]), out=tmp_path / "none", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_batchnorm_of_a_folder_recalibrated_by_transformers_and_resumed(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, num_labels=2)
    for name in ("base", "a", "b"):
        model = ResNetForImageClassification(config).train()
        model(torch.randn(8, 3, 32, 32))
        model.save_pretrained(tmp_path / name)
    batches = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.zeros(8).long()} for _ in range(2)]
    given = tmp_path / "base", tasks_of([tmp_path / "a", tmp_path / "b"])
    call = {"method": "averaging", "batchnorm": "recalibrate", "missing": "base"}

    def interrupted():
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*given, batches=interrupted(), out=tmp_path / "out", **call)
    assert (tmp_path / "out.partial.journal").is_file()
    done = merge(*given, batches=batches, out=tmp_path / "out", **call)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "out").train()
    seen = []
    hook = loaded.resnet.embedder.embedder.normalization.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3)))
    )
    with torch.no_grad():
        for batch in batches:
            loaded(batch["pixel_values"])
    hook.remove()
    name = "resnet.embedder.embedder.normalization.running_mean"
    torch.testing.assert_close(done[name], torch.stack(seen).mean(0))
    memory = merge(*given, batches=batches, **call)
    assert all(torch.equal(done[name], memory[name]) for name in done)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "hidden_sizes": [4, 16]}))
    with pytest.raises(ValueError, match="in ResNetForImageClassification it is"):
        merge(*given, batches=batches, **call)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "needs batches"),
        ({"batches": []}, "are empty"),
        ({"batches": iter([])}, "are empty"),
        ({"batches": [torch.full((2, 3, 6, 6), torch.nan)]}, r"'1.running_mean' is not finite"),
    ],
)
def test_recalibration_errors(convnets, options, text):
    with pytest.raises(ValueError, match=text):
        merge(convnets[0], tasks_of(convnets[1:]), method="averaging", batchnorm="recalibrate", **options)


def test_identical_batchnorm_statistics_need_no_policy(convnets):
    net = convnets[0]
    merged = merge(net, [Task(net), Task(net)], method="averaging")
    assert torch.equal(merged["1.running_mean"], net[1].running_mean)
    with pytest.raises(ValueError, match="as a module"):
        merge(state(0), [Task(state(0))], method="averaging", batchnorm="recalibrate", batches=[1])


def test_subtract_reports_clamping_and_the_largest_weight():
    base, _, models, _ = problem(1)
    sizes = {n: 2.0 if n == "embed.weight" else 0.1 for n in base}
    h0 = Curvature.from_dict({n: torch.ones_like(t) for n, t in base.items()}, 10)
    h = Curvature.from_dict({n: torch.full_like(t, sizes[n]) for n, t in base.items()}, 10)
    task = Task(models[0], h)
    with pytest.warns(UserWarning, match="clamped"):
        report = subtract(base, task, base_curvature=h0, weight=0.5, keep=0.2, delta0=0.0).report
    assert report.clamped_share == pytest.approx(44 / sum(t.numel() for t in base.values()))
    assert (report.clamped["embed.weight"], report.clamped["norm.bias"]) == (1.0, 0.0)
    # alpha = 0.8 * 10 / 20 = 0.4 clamps the embedding, 0.8 * 10 / 1 = 8 everything
    assert report.largest_alpha[0.1] == pytest.approx(0.4, rel=0.01)
    assert report.largest_alpha[0.1] <= 0.4
    quiet = subtract(base, task, base_curvature=h0, weight=report.largest_alpha[0.01], keep=0.2)
    assert quiet.report.clamped_share == 0.0
    moved = math.sqrt(10) * float((quiet["norm.bias"] - base["norm.bias"]).norm())
    assert quiet.report.moved["norm.bias"]["norm_h0"] == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("method", ["negation", "ewr", "fisher_negation"])
def test_subtraction_baselines(method):
    base, base_curvature, models, curvatures = problem(2)
    tasks = tasks_of(models, curvatures, 0.5)
    found = subtract(base, tasks, base_curvature=base_curvature, weight=0.6, method=method)
    expected = merge(base, tasks_of(models, curvatures, 0.3), base_curvature=base_curvature, method=method)
    for name in base:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_subtract_to_a_folder_writes_the_completed_card(tmp_path):
    base, base_curvature, models, curvatures = problem(1)
    options = {"base_curvature": base_curvature, "weight": 0.1, "out": tmp_path / "out"}
    done = subtract(base, Task(models[0], curvatures[0]), **options)
    card = json.loads((tmp_path / "out" / "gradmatch.json").read_text())
    assert card["report"]["largest_alpha"]["0.01"] == done.report.largest_alpha[0.01]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"method": "removl"}, r"method is 'removl' \(did you mean 'removal'"), ({"weight": -1.0}, "at least 0"), ({"weight": float("nan")}, "finite")],
)  # fmt: skip
def test_subtract_errors(options, text):
    base, base_curvature, models, curvatures = problem(1)
    with pytest.raises(ValueError, match=text):
        subtract(base, Task(models[0], curvatures[0]), base_curvature=base_curvature, **options)


def test_analogy_with_curvature_and_weight():
    base, base_curvature, models, curvatures = problem(3)
    a, b, c = (Task(m, k, name=n) for m, k, n in zip(models, curvatures, "abc", strict=True))
    found = analogy(base, a, b, c, weight=0.5)
    for name in base:
        torch.testing.assert_close(
            found[name], models[2][name] + 0.5 * (models[1][name] - models[0][name]), **CLOSE
        )
    options = {"method": "gradient_matching", "base_curvature": base_curvature}
    curved = analogy(base, a, b, c, weight=0.2, base_weight=100.0, **options)
    assert set(curved) == set(base)
    with pytest.raises(ValueError, match="is not positive"):
        analogy(base, a, b, c, weight=0.9, base_weight=0.01, **options)


def test_what_is_printed_in_one_line():
    base, base_curvature, models, curvatures = problem(2)
    report = merge(base, tasks_of(models, curvatures), base_curvature=base_curvature).report
    told = "Report(gradient_matching, 5 tensors: elementwise, 97 weights, floor_share=0, 0 notes)"
    assert repr(report) == told
    assert repr(open_checkpoint(base)) == "Checkpoint(the state dict, 5 tensors)"


def test_averaging_warns_that_weights_play_no_role_and_names_the_line_that_called():
    base, _, models, _ = problem(2)
    tasks = [Task(models[0], weight=1.0), Task(models[1], weight=2.0)]
    with pytest.warns(UserWarning, match="averaging ignores the weights.*'weighted' uses them") as found:
        merge(base, tasks, method="averaging")
    assert found[0].filename == __file__


def test_isotropic_base_curvature():
    base, _, models, curvatures = problem(1)
    ones = Curvature.from_dict({n: torch.ones_like(t) for n, t in base.items()}, 1)
    one = merge(base, tasks_of(models, curvatures), base_curvature=2.0)
    two = merge(base, tasks_of(models, curvatures), base_curvature=ones, base_weight=2.0)
    assert all(torch.allclose(one[n], two[n], atol=1e-12) for n in base)


def test_card_holds_recipe_fingerprints_and_health(tmp_path):
    base, base_curvature, models, curvatures = problem(2, torch.float32)
    merge(base, tasks_of(models, curvatures), base_curvature=base_curvature, out=tmp_path / "out")
    card = json.loads((tmp_path / "out" / "gradmatch.json").read_text())
    assert card["recipe"]["method"] == "gradient_matching"
    assert card["recipe"]["tasks"][1]["num_examples"] == 20
    assert len(card["inputs"]) == 3
    assert card["report"]["floor_share"] == 0
    assert "Eq. 12" in (tmp_path / "out" / "README.md").read_text()


def test_an_untied_copy_of_tied_embeddings_is_left_out(gpt2, tmp_path):
    base, one = saved(tmp_path, base=gpt2, one=perturbed(gpt2, 1))
    held = load_file(one / "model.safetensors")
    save_file({**held, "lm_head.weight": held["transformer.wte.weight"].clone()}, one / "model.safetensors")
    merged = merge(base, [Task(one)], method="averaging")
    assert "lm_head.weight" not in merged
    assert "lm_head.weight left out: tied to a tensor of the base" in merged.report.notes[0]
    save_file({**held, "lm_head.weight": torch.randn(50, 16)}, one / "model.safetensors")  # no copy
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        merge(base, [Task(one)], method="averaging")


def test_a_base_that_stores_tied_embeddings_twice_is_tied(gpt2, tmp_path):
    one = perturbed(gpt2, 1)
    known = Curvature.from_dict({name: torch.rand_like(value) for name, value in one.named_parameters()}, 5)
    one.save_pretrained(tmp_path / "one")
    gpt2.save_pretrained(tmp_path / "base")
    twice = {name: value.clone() for name, value in gpt2.state_dict().items()}
    save_file(twice, tmp_path / "base" / "model.safetensors")
    for task in (tmp_path / "one", one):
        merged = merge(tmp_path / "base", [Task(task, known)], base_curvature=1.0)
        assert set(merged) == set(twice)
        torch.testing.assert_close(merged["lm_head.weight"], one.state_dict()["lm_head.weight"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert not open_checkpoint(tmp_path / "base").aliases


def test_the_output_dtype_may_be_torchs_and_a_task_may_stand_alone(capsys):
    base, _, models, _ = problem(1)
    merged = merge(base, Task(models[0]), method="averaging", dtype=torch.bfloat16, progress=True)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert merged.keys() == base.keys()
    assert "100%" in capsys.readouterr().err


def test_stacked_layers_with_a_config_list_of_one_entry_a_layer(tmp_path):
    base, folder = state(0, torch.float32), tmp_path / "m"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}')
    stacked = stack([Slice(folder, 0, 2), Slice(folder, 1, 2)])
    options = {"method": "passthrough", "scale": {"layers.2.*": 2.0, "*": 1.0}}
    done = merge(stacked, [Task(stacked)], out=tmp_path / "out", **options)
    assert done.config == {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "sliding"]}
    assert torch.equal(done["layers.2.w"], 2 * base["layers.1.w"])
    assert torch.equal(done["norm.bias"], base["norm.bias"])


def test_public_names():
    import gradmatch

    assert set(gradmatch.__all__) <= set(dir(gradmatch))
    with pytest.raises(AttributeError, match="no attribute 'mrge'"):
        gradmatch.mrge  # noqa: B018
    with pytest.raises(TypeError, match="is no"):
        merge(state(0), [Task(state(0), weight={"a"})], method="weighted")


def test_hub_ids_resolve_to_their_snapshot(gpt2, tmp_path, monkeypatch):
    import huggingface_hub

    gpt2.save_pretrained(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(name, allow_patterns, **_):
        asked[name] = allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    merged = merge("someone/gpt2-tiny", [Task("someone/gpt2-tiny")], method="averaging")
    assert set(asked) == {"someone/gpt2-tiny"}
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["someone/gpt2-tiny"])
    assert torch.equal(merged["transformer.wte.weight"], gpt2.state_dict()["transformer.wte.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_storage_dtypes(tmp_path, dtype):
    base, _, models, curvatures = problem(2, dtype)
    for number, model in enumerate((base, *models)):
        save_file(model, tmp_path / f"{number}.safetensors")
    tasks = [Task(tmp_path / f"{i}.safetensors", c, 0.5) for i, c in enumerate(curvatures, 1)]
    merged = merge(tmp_path / "0.safetensors", tasks, base_curvature=1.0, dtype="float64")
    h0, tolerance = 1.0 + 1e-6, 1e-12 if dtype == torch.float64 else 1e-5
    for name, theta0 in base.items():
        h = [c.total(name).double() for c in curvatures]
        taus = [m[name].double() - theta0.double() for m in models]
        top = sum(0.5 * (h0 + x) * t for x, t in zip(h, taus, strict=True))
        expected = theta0.double() + top / (h0 + 0.5 * sum(h))
        torch.testing.assert_close(merged[name], expected, rtol=tolerance, atol=tolerance)


def test_unaligned_files_are_read_all_the_same(tmp_path):
    values, file = torch.randn(5, dtype=torch.float64), tmp_path / "m.safetensors"
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F64", "shape": [5], "data_offsets": [3, 43]},
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"abc" + values.numpy().tobytes())
    merged = merge(file, [Task(file)], method="averaging")
    assert torch.equal(merged["w"], values)
    assert merged["a"].tolist() == list(b"abc")


def test_eight_bit_floats_are_merged_and_copied():
    base = {"w": torch.randn(6, 4).to(torch.float8_e4m3fn), "head.w": torch.randn(3).to(torch.float8_e4m3fn)}
    model = {name: (t.float() * 1.5).to(torch.float8_e4m3fn) for name, t in base.items()}
    merged = merge(base, [Task(model)], method="averaging", heads="base", head_names=["head.*"])
    assert torch.equal(merged["w"].float(), model["w"].float())
    assert torch.equal(merged["head.w"].float(), base["head.w"].float())


def test_masks_of_infinities_are_kept():
    mask = torch.tensor([[0.0, -math.inf], [math.inf, 0.0]])
    base, *models = ({"w": torch.full((2, 2), k), "mask": mask.clone()} for k in (0.0, 1.0, 3.0))
    for method in ("averaging", "task_arithmetic", "ties"):
        for dtype in (None, "bfloat16"):
            merged = merge(base, tasks_of(models), method=method, dtype=dtype)
            assert torch.equal(merged["mask"].float(), mask)
    only = merge(base, [Task({"w": models[0]["w"]})], method="averaging", missing="base", dtype="bfloat16")
    assert torch.equal(only["mask"].float(), mask)
    other = {**models[1], "mask": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"'mask' holds 2 NaN or infinite values in the base"):
        merge(base, tasks_of([models[0], other]), method="task_arithmetic")
    broken = {**base, "mask": torch.full((2, 2), math.nan)}
    with pytest.raises(ValueError, match=r"'mask' holds 4 NaN"):
        merge(broken, [Task(broken)], method="task_arithmetic")


def test_an_integer_buffer_of_another_length_is_the_bases():
    base, model = {"w": torch.zeros(2), "ids": torch.arange(4)}, {"w": torch.ones(2), "ids": torch.arange(6)}
    assert torch.equal(merge(base, [Task(model)], method="averaging")["ids"], torch.arange(4))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_tied_names_that_a_folder_leaves_out(tmp_path, gpt2, kind):
    module = gpt2 if kind == "gpt2" else MODELS[kind]()
    module.save_pretrained(tmp_path)
    task = perturbed(module, 3)
    for given in (task, task.state_dict()):
        merged = merge(tmp_path, [Task(given)], method="averaging")
        for name in open_checkpoint(tmp_path):
            torch.testing.assert_close(merged[name], task.state_dict()[name])
        assert any("tied to a tensor of the base" in note for note in merged.report.notes)


def test_tied_names_of_a_merge_on_disk_are_those_in_memory(tmp_path, gpt2):
    tasks = [Task(perturbed(gpt2, 1))]
    memory = merge(gpt2, tasks, method="averaging")
    disk = merge(gpt2, tasks, method="averaging", out=tmp_path / "out")
    assert set(disk) == set(memory)
    assert torch.equal(disk["lm_head.weight"], memory["lm_head.weight"])


def test_random_draws_of_tasks_without_names_are_announced():
    base, _, models, _ = problem(2)
    said = r"random draws follow the names of tasks, .* task 1, task 2; pass Task"
    with pytest.warns(UserWarning, match=said):
        merge(base, tasks_of(models), method="dare")
