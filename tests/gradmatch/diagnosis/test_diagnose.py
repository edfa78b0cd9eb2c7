"""The public call: values of the report, bad input, JSON that fits its schema, a page that is whole and small."""

import html.parser
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradmatch import Task, diagnose, merge
from gradmatch.diagnosis.charts import number
from gradmatch.diagnosis.page import bins
from gradmatch.estimators import Curvature, estimate
from gradmatch.estimators.tensorfile import TensorFile
from gradmatch.measure.products import save_products


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    data = {}
    for t in ("first", "second"):
        truth = torch.randn(5, 3)
        inputs = [torch.randn(40, 5) for _ in range(2)]
        data[t] = [(x, (x @ truth).argmax(1)) for x in inputs]
    tasks = []
    for t, batches in data.items():
        theta = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        theta.load_state_dict(module.state_dict())
        optimizer = torch.optim.Adam(theta.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(theta(x), y) for x, y in batches).backward()
            optimizer.step()
        curvature = estimate(
            theta, batches, gradient=True, standard_error=True, num_examples=800, progress=False
        )
        tasks.append(Task(theta, curvature, 0.5, t))
    h0 = estimate(module, [b for batches in data.values() for b in batches], progress=False)
    return module, tasks, data, h0


def test_without_data_no_tensor_is_held_whole(world, tmp_path, monkeypatch):
    """Models and curvatures in files are read a range at a time, whatever is wrong with them."""
    from safetensors.torch import save_file

    module, tasks, _, h0 = world
    models = {"base": dict(module.state_dict())}
    models |= {t.name: {n: v + 0.01 * torch.randn_like(v) for n, v in models["base"].items()} for t in tasks}
    models["first"]["0.weight"] = models["first"]["0.weight"][torch.arange(15, -1, -1)]  # another order
    models["second"]["2.weight"] = 3 * models["second"]["2.weight"]
    models["merged"] = {n: sum(m[n] for m in models.values()) / 3 for n in models["base"]}
    for name, weights in models.items():
        save_file({n: v.contiguous() for n, v in weights.items()}, tmp_path / f"{name}.safetensors")
    for name, curvature in (("h", h0), *((t.name, t.curvature) for t in tasks)):
        errors = {n: h for n in curvature if (h := curvature.standard_error(n)) is not None}
        plain = Curvature.from_dict(dict(curvature), 800, standard_error=errors)  # without fingerprint
        plain.save(tmp_path / f"{name}.curvature")
    read = TensorFile.read_into

    def counted(file, name, buffer, first=0):
        assert len(buffer) < 80 * 4  # 0.weight is 5 x 16
        read(file, name, buffer, first)

    for module_name, size in (("source.PIECE", 16), ("moved.AT_ONCE", 16), ("causes_choice.PIECE", 16)):
        monkeypatch.setattr(f"gradmatch.diagnosis.{module_name}", size)
    for module_name in ("health", "opening"):
        monkeypatch.setattr(f"gradmatch.measure.{module_name}.AT_ONCE", 16)
    monkeypatch.setattr("gradmatch.models.units.BLOCK", 1)
    monkeypatch.setattr(TensorFile, "read_into", counted)
    monkeypatch.setattr(TensorFile, "read", None)
    given = [
        Task(tmp_path / f"{t.name}.safetensors", tmp_path / f"{t.name}.curvature", 0.5, t.name) for t in tasks
    ]
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "merged")}
    result = diagnose(
        files["base"], given, files["merged"], base_curvature=tmp_path / "h.curvature", delta0=1e9
    )
    found = {(cause.name, cause.subject) for cause in result.causes}
    assert found >= {("permuted_neurons", "first"), ("rescaled_layer", "second"), ("floor_decides", "delta0")}


def test_with_data_everything_is_told(world):
    module, tasks, data, h0 = world
    result = diagnose(module, tasks, data=data, base_curvature=h0)
    report = result.to_dict()
    assert report["method"] == "gradient_matching"
    losses = {(row["model"], row["task"]): row for row in report["losses"]}
    assert {model for model, _ in losses} == {"base", "first", "second", "merged"}
    assert [t["num_examples"] for t in report["tasks"]] == [800, 800]
    for row in report["forecasts"]:
        own, merged = (losses[model, row["task"]]["nll"] for model in (row["task"], "merged"))
        assert row["kind"] == "ggn"
        assert row["measured"] == pytest.approx(merged - own, abs=1e-9)
        assert 0.3 < row["scale"] < 3
    assert report["mismatch"]["total"] > 0
    assert [report["path"][i][0] for i in (0, -1)] == [0, 1]
    assert set(report["redundancy"]) == {"first", "second"}
    assert list(report["barriers"]) == ["first | second"]
    assert 0 < report["overlaps"]["first | second"] <= 1
    frame = pytest.importorskip("pandas") and result.to_frame()
    assert list(frame.columns) == ["name", "subject", "cost", "source", "evidence", "remedy"]
    assert len(frame) == len(result.causes)


def test_stored_gradients_save_a_pass_and_agree(world):
    module, tasks, data, h0 = world
    stored = diagnose(module, tasks, data=data, base_curvature=h0, thorough=False)
    bare = [
        Task(t.model, Curvature.from_dict(dict(t.curvature), 800, {"examples_seen": "80"}), 0.5, t.name)
        for t in tasks
    ]
    measured = diagnose(module, bare, data=data, base_curvature=h0, thorough=False)
    assert stored.evidence.mismatch.total == pytest.approx(measured.evidence.mismatch.total, rel=1e-3)


KEYS = {
    "schema_version gradmatch_version method healthy verdict looked_at not_looked_at causes notes tasks residual losses forecasts mismatch "
    "layers cosines conflicts weighted_conflicts overlaps path barriers redundancy batchnorm": lambda r: r,
    "name subject rank evidence remedy cost source numbers": lambda r: r["causes"][0],
    "name weight coefficient norm curvature noise num_examples": lambda r: r["tasks"][0],
    "model task nll accuracy interval per_prediction perplexity predictions examples": lambda r: r["losses"][
        0
    ],
    "task kind forecast measured trusted scale best_weight at_best curve measured_curve": lambda r: r[
        "forecasts"
    ][0],
    "total per_example preconditioned tasks layers": lambda r: r["mismatch"],
    "layer weights norms shares ranks": lambda r: r["layers"][0],
}


def test_json_keeps_its_keys_and_is_json(world):
    module, tasks, data, h0 = world
    heavy = [replace(tasks[0], weight=9.0), tasks[1]]
    text = json.dumps(diagnose(module, heavy, data=data, base_curvature=h0).to_dict(), allow_nan=False)
    content = json.loads(text)
    for keys, part in KEYS.items():
        assert set(part(content)) == set(keys.split())
    assert content["schema_version"] == 1
    broken = {n: v + 0.01 for n, v in module.state_dict().items()}
    broken["0.bias"][0] = math.nan
    ill = diagnose(module, [*tasks, Task(broken, name="ill")], method="averaging")
    assert '"cost": "Infinity"' in json.dumps(ill.to_dict(), allow_nan=False)
    assert repr(ill) == "Diagnosis(1 cause: not_finite (ill))"
    assert repr(diagnose(module, tasks, base_curvature=h0)) == "Diagnosis(nothing found)"
    assert "the merge is useless" in ill._repr_html_()
    assert "<html" not in ill._repr_html_()


class Page(html.parser.HTMLParser):
    """Checks that elements close, and collects what would reach for the network."""

    void = frozenset({"meta", "link", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        links = [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        self.links += [value for value in links if not value.startswith(("#", "data:"))]
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("with_data", [True, False])
def test_page_is_self_contained_and_well_formed(world, with_data):
    module, tasks, data, h0 = world
    text = diagnose(module, tasks, data=data if with_data else None, base_curvature=h0).to_html()
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "script" not in parser.tags
    assert len(parser.ids) == len(set(parser.ids))
    assert "nan" not in text.lower()
    assert ("How far to go" in text) == with_data


def test_names_cannot_break_out_of_the_page():
    base = {"w": torch.randn(4, 4)}
    tasks = [Task({"w": base["w"] + 0.01 * torch.randn(4, 4)}, name=f"<b>{t}&") for t in "xy"]
    result = diagnose(base, tasks, method="averaging")
    for text in (result.to_html(), result._repr_html_()):
        assert "<b>x" not in text
        assert "&lt;b&gt;x&amp;" in text


def test_a_tensor_takes_less_than_two_kilobytes_of_page_and_json():
    torch.manual_seed(0)
    base = {f"model.layers.{i}.block.{j}.weight": torch.randn(2, 2) for i in range(100) for j in range(10)}
    tasks = [Task({n: v + 0.01 * torch.randn(2, 2) for n, v in base.items()}, name=t) for t in "abc"]
    result = diagnose(base, tasks, method="averaging")
    assert len(result.evidence.scan.tensors) == 1000
    assert len(result.to_html()) < 2_000_000
    assert len(json.dumps(result.to_dict())) < 2_000_000
    names, values = bins([f"l{i}" for i in range(300)], [[1.0] * 300])
    assert len(names) == 60
    assert sum(v * v for v in values[0]) == pytest.approx(300)


def test_one_model_only(world):
    module, tasks, data, _ = world
    half = diagnose(module, tasks[:1], method="task_arithmetic", data={"first": data["first"]})
    assert half.evidence.coefficients() == pytest.approx({"first": 0.5}, abs=1e-5)
    assert [(cause.name, cause.subject) for cause in half.causes] == [("weights_far_from_best", "first")]
    assert half.causes[0].numbers["first"] > 1
    whole = replace(tasks[0], weight=1.0)
    result = diagnose(module, [whole], method="task_arithmetic", data={"first": data["first"]})
    assert result.healthy
    assert not any("too small" in note for note in result.notes)


def test_data_for_some_tasks_only(world):
    module, tasks, data, h0 = world
    result = diagnose(module, tasks, data={"second": data["second"]}, base_curvature=h0)
    assert set(result.evidence.losses["merged"]) == {"second"}
    assert result.evidence.mismatch is None
    assert "second" in str(result)


def test_stored_products_are_used(world, tmp_path):
    module, tasks, data, h0 = world
    measured = diagnose(module, tasks, data=data, base_curvature=h0, thorough=False)
    save_products(measured.evidence.products, tmp_path / "p.json")
    again = diagnose(module, tasks, base_curvature=h0, products=tmp_path / "p.json")
    forecasts = [[row["forecast"] for row in result.to_dict()["forecasts"]] for result in (again, measured)]
    assert forecasts[0] == pytest.approx(forecasts[1])
    assert again.to_dict()["forecasts"][0]["measured"] is None


def test_merged_from_a_folder(world, tmp_path):
    module, tasks, _, h0 = world
    save_file(dict(merge(module, tasks, base_curvature=h0)), tmp_path / "merged.safetensors")
    assert diagnose(module, tasks, tmp_path / "merged.safetensors", base_curvature=h0).healthy


def test_slerp_that_was_lerp_is_told(world, tmp_path):
    module, tasks, *_ = world
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    states = [{k: v + s * 1e-3 * torch.randn_like(v) for k, v in kept.items()} for s in (1, 2)]
    near = [Task(theta, name=str(number)) for number, theta in enumerate(states)]
    merge(kept, near, method="slerp", out=tmp_path / "merged")
    for merged in (merge(kept, near, method="slerp"), str(tmp_path / "merged")):
        result = diagnose(kept, near, merged, method="slerp")
        assert [note for note in result.notes if note.startswith("SLERP was LERP in 4 of 4 tensors")]
    assert not [note for note in diagnose(module, tasks).notes if "SLERP" in note]


def test_redundancy_curves_of_many_examples_are_measured_on_a_few(world):
    module, tasks, data, _ = world
    many = {task: [*batches, *batches] for task, batches in data.items()}
    assert not [note for note in diagnose(module, tasks, data=data).notes if "redundancy" in note]
    result = diagnose(module, tasks, data=many)
    assert "redundancy curves: on the first 64 or so examples of each task" in result.notes
    x, y = (torch.cat(pair) for pair in zip(*data["first"], strict=True))
    own = nn.functional.cross_entropy(tasks[0].model(x), y).item()
    assert result.evidence.redundancy["first"][0].plain == pytest.approx(own, rel=1e-5)


def test_errors_say_what_to_do(world):
    module, tasks, data, _ = world
    for change, error, text in (
        ({"tasks": []}, ValueError, "no tasks"),
        ({"tasks": [{}]}, TypeError, "Task objects, got dict"),
        ({"tasks": [replace(tasks[0], name="base")]}, ValueError, "a task is called 'base'.*another name"),
        (
            {"tasks": [replace(tasks[0], name="merged")]},
            ValueError,
            "a task is called 'merged'.*another name",
        ),
        ({"method": "averagin"}, ValueError, "did you mean 'averaging'"),
        ({"data": {"frist": data["first"]}}, ValueError, r"data names a task 'frist'.*did you mean 'first'"),
        (
            {"num_examples": {"zzz": 1}},
            ValueError,
            "num_examples names a task 'zzz'.*tasks are first, second",
        ),
        ({"base": dict(module.state_dict()), "data": data}, ValueError, "data needs a module"),
        ({"merged": "/nowhere/merged"}, FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(error, match=text):
            diagnose(**{"base": module, "tasks": tasks, **change})


def test_module_of_an_unknown_architecture(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "bert"}')
    task = Task({"w": torch.ones(2, 2) * 1.01}, name="t")
    with pytest.raises(ValueError, match=r"architecture 'NoSuchModel'.*pass module="):
        diagnose(str(tmp_path), [task], data={"t": [(torch.ones(1, 2), torch.ones(1))]})


def test_frame_without_pandas(world, monkeypatch):
    module, tasks, _, h0 = world
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        diagnose(module, tasks, base_curvature=h0).to_frame()


NUMBERS = [(0, "0"), (0.12345, "0.123"), (-2.5, "\u22122.5"), (12345.6, "12,346"), (3.2e-7, "3.2e\u22127")]


@pytest.mark.parametrize(("value", "text"), [*NUMBERS, (math.inf, "infinite")])
def test_numbers(value, text):
    assert number(value) == text
