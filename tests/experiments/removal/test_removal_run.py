"""The whole study on a tiny random language model: every stage, the records, the report, the figure."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import config as configs
from experiments.records import of_kind, read_records
from experiments.removal import choosing as choosing_module
from experiments.removal import stages
from experiments.studies import removal
from paper_figures import fig_removal


@pytest.fixture(autouse=True)
def scorer(monkeypatch):
    """A scorer that a random model moves: the share of vowels."""
    module = types.ModuleType("own_scorer")
    module.vowels = lambda texts: [sum(c in "aeiouAEIOU" for c in t) / max(1, len(t)) for t in texts]
    monkeypatch.setitem(sys.modules, "own_scorer", module)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One folder for the tests of this file: what the first computes, the next find cached."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def whole(run, tiny_config, results):
    """Run the study with that scorer: (records, output)."""

    def command(*overrides, name="whole", where=results):
        return run(tiny_config, "scorer=own_scorer:vowels", f"name={name}", *overrides, where=where)

    return command


def test_the_whole_study(whole, results):
    records, out = whole()
    points = of_kind(records, "point")
    path = [("base", 0.0), ("GM", 0.1), ("GM", 0.2), ("TA", 0.5), ("TA", 1.0)]
    assert [(p["label"], p["alpha"]) for p in points] == path
    for point in points:
        assert math.isfinite(point["metrics"]["perplexity_keep"])
        assert 0 <= point["metrics"]["toxicity_few"] <= 1
        assert point["metrics"]["refused_few"] == 0
        lines = read_records(Path(point["generations"]))
        assert len(lines) == 6
        assert set(lines[0]) == {"list", "prompt", "continuation", "score"}
    perplexities = {(p["label"], p["alpha"]): p["metrics"]["perplexity_remove"] for p in points}
    assert perplexities["TA", 1.0] > perplexities["TA", 0.5] > perplexities["base", 0.0]
    areas = of_kind(records, "area")
    assert [a["measure"] for a in areas] == ["toxicity", "forgetting"]
    assert {(a["ours"], a["theirs"]) for a in areas} == {("GM", "TA")}
    (forecast,) = of_kind(records, "forecast")
    assert [point["alpha"] for point in forecast["with_data"]] == [0.1, 0.2]
    assert {point["collateral_by"] for point in forecast["with_data"]} == {"ggn"}
    assert {point["collateral_by"] for point in forecast["without_data"]} == {"diagonal"}
    assert forecast["budget"]["alpha"] <= 0.2
    curvatures = of_kind(records, "curvature")
    assert {(c["of"], c["side"]) for c in curvatures} == {("base", "keep"), ("task", "remove")}
    assert [c["seed"] for c in curvatures] == [0, 0]  # the study's, a number; the estimator's own is a text
    assert all(0 < c["relative_error"] < 1 and c["reduction"] == "batch" for c in curvatures)
    assert "area between TA and GM" in out
    assert "budget of 2 nats" in out
    assert "linear classifier of words" not in out  # that is said of the proxy alone
    drawn = fig_removal.draw(records, results / "figures")
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_two_seeds_share_the_base_and_are_compared_seed_by_seed(tiny_config, whole):
    records, out = whole("seeds=[0, 1]", "forecast=null", name="two")
    points = of_kind(records, "point")
    assert [p["seed"] for p in points if p["label"] == "base"] == [0]
    assert {p["seed"] for p in points if p["label"] == "GM"} == {0, 1}
    curvatures = [(c["of"], c["seed"]) for c in of_kind(records, "curvature")]
    assert curvatures == [("base", 0), ("task", 0), ("task", 1)]
    for area in of_kind(records, "area"):
        assert area["seeds"] == [0, 1]
        assert sum(area["by_seed"]) / 2 == pytest.approx(area["difference"])
        assert len(area["by_seed"]) == 2
    one, two, other = (
        removal.Cells(configs.load(tiny_config, [f"seeds={seeds}"])) for seeds in ([0], [0, 1], [1])
    )
    assert one.base_curvature.key == other.base_curvature.key
    assert one.unedited.key == other.unedited.key
    cell = (1, "GM", 0.1)
    assert two.evaluations[cell].key == other.evaluations[cell].key  # whatever other seeds there are
    assert two.evaluations[0, "GM", 0.1].key != two.evaluations[cell].key
    assert "means over 2 seeds, their range in brackets" in out
    assert "; by seed " in out
    last = fig_removal.curve(points, "TA", "toxicity_few")[-1]
    both = [p["metrics"]["toxicity_few"] for p in points if (p["label"], p["alpha"]) == ("TA", 1.0)]
    assert last[2:] == (pytest.approx(sum(both) / 2), min(both), max(both))


def test_forgetting_needs_no_prompts(whole, results):
    records, out = whole("prompts={}", "forecast=null", name="forgetting")
    assert not of_kind(records, "forecast")
    assert of_kind(records, "area")[0]["measure"] == "forgetting"
    assert "log-likelihood of what is removed" in out
    assert fig_removal.curve(of_kind(records, "point"), "TA", "perplexity_remove")[-1][0] == 1.0
    assert fig_removal.draw(records, results / "figures", "forgetting")
    both = of_kind(whole("prompts={}", "forecast=null", "seeds=[0, 1]", name="both")[0], "point")
    *_, low, high = fig_removal.curve(both, "TA", "perplexity_remove")[-1]
    ends = [
        math.log(p["metrics"]["perplexity_remove"] / p["metrics"]["perplexity_keep"])
        for p in both
        if (p["label"], p["alpha"]) == ("TA", 1.0)
    ]
    assert (low, high) == (min(ends), max(ends))


def test_figure_without_points_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no record holds a point"):
        fig_removal.draw([{"kind": "forecast"}], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods.GM.method=removl", "is no way to remove"),
        ("methods.GM.alphas=[0.5, 0.5]", "alphas must be positive and different"),
        ("compare=[[GM, GM]]", "compare.0: 'GM' stands twice"),
        ("compare=[[GM, XY]]", "'XY' is none of the methods"),
        ("methods={}", "methods: .*at least 1 item"),
        ("methods.GM.options={base_wight: 1}", "removal has no option 'base_wight' .*'base_weight'"),
        ("methods.GM.options={alpha: 1}", "removal has no option 'alpha'"),
        ("methods.TA.options={keep: 0.1}", "negation has no option 'keep'"),
        ("methods.GM.options.guard=scal", "removal: guard is 'scal' .*'scale'"),
        ("methods.GM.choose={bse_weight: [1]}", "removal has no option 'bse_weight'"),
        ("methods.GM.choose={keep: [2]}", "removal: keep is 2, it must lie in"),
        ("methods.GM.choose={keep: []}", "`choose` has no values for 'keep'"),
        ("scorer=proxi", r"scorer: unknown scorer 'proxi' \(did you mean 'proxy'"),
    ],
)
def test_bad_configs(tiny_config, change, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(tiny_config, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("remove.source={folder}/absent.jsonl", r"remove: no data file .*absent\.jsonl"),
        ("keep={{source: {folder}/broken.jsonl}}", r"keep: .*broken\.jsonl cannot be read: JSON parse error"),
        ("prompts.few.column=prompt", r"prompts\.few: .*prompts\.txt has no column 'prompt'; it has text"),
        ("prompts.few.source={folder}/cafe.txt", r"prompts\.few: .*cafe\.txt is no UTF-8 text"),
        ("keep={{source: encyclopedi}}", r"keep: no list 'encyclopedi' \(did you mean 'encyclopedic'"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_before_anything_runs(tiny_config, tmp_path, change, message):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(tiny_config, [change.format(folder=tmp_path)])
    configs.load(
        tiny_config, ["remove={source: allenai/real-toxicity-prompts}"]
    )  # a hub's name is looked up later


def test_a_file_that_changed_is_read_again(tiny_config, tmp_path):
    def key():
        return removal.Cells(configs.load(tiny_config, [f"keep.source={tmp_path}/keep.txt"])).data.key

    (tmp_path / "keep.txt").write_text("one\n")
    first = key()
    assert key() == first
    (tmp_path / "keep.txt").write_text("another\n")
    assert key() != first


def test_training_that_diverges_stops(tiny_config, language_model, files, tmp_path):
    (tmp_path / "data" / "remove").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model").symlink_to(language_model)
    row = {"text": "abc", "document": "1", "context": ""}
    (tmp_path / "data" / "remove" / "train.jsonl").write_text(json.dumps(row) + "\n")
    folders = {name: tmp_path / name for name in ("data", "base")}
    settings = {"max_length": 16, "precision": "float32", "seed": 0, "batch_size": 1, "warmup_steps": 0}
    with pytest.raises(ValueError, match="lower the learning rate"):
        stages.finetune(
            tmp_path / "out", **folders, steps=8, learning_rate=1e30, weight_decay=0.0, **settings
        )


def test_quick_applies_the_configs_own_overrides(tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config.read_text() + "\nquick: [training.steps=2, 'methods.GM.alphas=[0.1]']\n")
    assert configs.load(path).training.steps == 4
    small = configs.load(path, quick=True)
    assert (small.training.steps, small.methods["GM"].alphas, small.name) == (2, (0.1,), "tiny-quick")
    assert configs.load(path, ["training.steps=3"], quick=True).training.steps == 3
    with pytest.raises(configs.ConfigError, match="has no quick variant"):
        configs.load(tiny_config, quick=True)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("removal-*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_plan(path):
    config = configs.load(path)
    assert configs.study(config.experiment).stages(config)


def test_options_are_chosen_on_spare_prompts(tiny_config, whole, tmp_path):
    choosing = ["choosing.prompts=few", "choosing.count=5", "methods.GM.choose.base_weight=[1, 50]"]
    records, out = whole("prompts.few.limit=4", *choosing, where=tmp_path)
    (choice,) = of_kind(records, "choice")
    assert choice["option"] == "base_weight"
    assert choice["prompts"] == 2  # of six, four are evaluated
    scores = {cell["value"]: cell["toxicity"] for cell in choice["tried"]}
    assert scores[choice["chosen"]] == min(scores.values())
    printed = f"base_weight = {choice['chosen']:g} (the end of its grid) chosen on validation texts"  # of two values
    assert printed in out
    evaluated = Path(of_kind(records, "point")[0]["generations"]).read_text(encoding="utf-8").splitlines()
    asked = {"source": yaml.safe_load(tiny_config.read_text())["prompts"]["few"]["source"], "limit": 4}
    spare = choosing_module.spare_prompts(asked, 5, 0)
    assert len(spare) == 2
    assert not set(spare) & {json.loads(line)["prompt"] for line in evaluated}
    with pytest.raises(ValueError, match=r"no prompts are left .* 6 in all and limit None"):
        choosing_module.spare_prompts({**asked, "limit": None}, 5, 0)


def test_mean_toxicity_of_a_path():
    path = np.array([[3.0, 0.4], [3.5, 0.2], [np.nan, 0.0]])  # linear to half the budget, flat after
    assert choosing_module.mean_toxicity(path, 1.0) == pytest.approx(0.5 * 0.3 + 0.5 * 0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.GM.choose.base_weight=[1]"], "GM: `choose` needs the key `choosing`"),
        (["choosing.prompts=many"], "choosing.prompts: 'many' is none of"),
    ],
)
def test_what_a_choice_needs(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        configs.load(tiny_config, overrides)
