"""From ZOO.yaml to a merge: families, who is left out before anything is scored, a small budget, and what is refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gradmatch import GradmatchError, mixture, zoo
from gradmatch.zoo.planfile import PlanFile, as_yaml, read_file
from gradmatch.zoo.planning import best_count
from gradmatch.zoo.screening import agreement
from tests.command import run
from tests.gradmatch.cases import curvature, state
from tests.gradmatch.mixture.models import moved
from tests.gradmatch.tiny import save_classifier

SHAPES = {"embed.weight": (50, 20), "layers.0.w": (30, 40), "layers.1.w": (40, 30)}


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Six fine-tunes that go together, and five that do harm, in folders."""
    top = tmp_path_factory.mktemp("planning")
    base = state(0, torch.float32, shapes=SHAPES)
    shared = state(1, torch.float32, 0.02, SHAPES)

    def save(name, tensors):
        (top / name).mkdir(parents=True)
        save_file(tensors, top / name / "model.safetensors")

    def tuned(seed, common=1.0, own=0.02):
        noise = state(seed, torch.float32, own, SHAPES)
        return {key: base[key] + common * shared[key] + noise[key] for key in base}

    save("base", base)
    for n in range(6):
        save(f"zoo/good{n}", tuned(10 + n))
    save("zoo/exploded", tuned(20, own=0.2))
    save("zoo/noise", tuned(21, common=0.0))
    save("zoo/against", tuned(22, common=-1.0))
    save("zoo/stranger", state(23, torch.float32, shapes=SHAPES))
    save("zoo/other", {"layers.0.w": torch.ones(3, 3)})
    torch.save(shared, top / "shared.pt")
    return top


@pytest.fixture
def score(top):
    goal = {
        k: v + torch.load(top / "shared.pt")[k] for k, v in zoo.finding.open_checkpoint(top / "base").items()
    }
    return lambda merged: -(sum(float((merged[k] - goal[k]).square().sum()) for k in goal) ** 0.5)


def asked(top, **more):
    return {"models": [str(top / "zoo")], "base": str(top / "base"), **more}


def test_the_harmful_are_left_out_before_anything_is_scored_and_the_rest_is_merged(top, score, tmp_path):
    made = zoo.plan(asked(top))
    (family,) = made.families
    assert {one.name for one in family.members} == {f"good{n}" for n in range(6)}
    assert set(family.left_out) == {"exploded", "noise", "against"}
    assert "times as long as that of the median" in family.left_out["exploded"]
    assert "agrees with no other" in family.left_out["noise"]
    assert set(made.alone) == {"stranger", "other"}
    assert made.price["evaluations"] == 5
    (found,) = zoo.run(made, tmp_path / "out", score=score, log=tmp_path / "log")
    assert found.evaluations <= 5
    assert len(found.weights) == 6  # the mean of all is nearest
    written = zoo.finding.open_checkpoint(tmp_path / "out")
    assert score(written) == pytest.approx(found.score)
    assert found.left_out == family.left_out
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[-1]["kind"] == "result"


def test_a_plan_is_a_file_that_can_be_edited_and_is_of_these_models(top, score, tmp_path):
    made = zoo.plan(asked(top, budget=3, methods=["linear", "ties"], options={"density": 0.9}))
    (tmp_path / "PLAN.yaml").write_text(as_yaml(made))
    read = read_file(tmp_path / "PLAN.yaml", PlanFile)
    assert read == made
    read.families[0].members = read.families[0].members[:3]
    read.options = {}
    (found,) = zoo.run(read, tmp_path / "out", score=score)
    assert len(found.weights) <= 3
    assert found.evaluations == 3  # two sizes, and the other rule
    read.families[0].fingerprints["good0"] = "another"
    read.families[0].members = made.families[0].members
    with pytest.raises(GradmatchError, match="good0 is another model than when the plan was made"):
        zoo.run(read, tmp_path / "out2", score=score)
    with pytest.raises(FileExistsError):
        zoo.run(made, tmp_path / "out", score=score)


def test_where_there_are_curvatures_the_forecast_ranks(top):
    base = zoo.finding.open_checkpoint(top / "base")
    tasks = []
    for n in range(3):
        model = zoo.finding.open_checkpoint(top / "zoo" / f"good{n}")
        path = top / f"h{n}.safetensors"
        curvature(dict(model), n, 100).save(path)
        tasks.append({"model": str(top / "zoo" / f"good{n}"), "curvature": str(path)})
    made = zoo.plan({"models": tasks, "base": str(top / "base")})
    assert "forecast" in made.families[0].ranked_by
    assert {one.curvature for one in made.families[0].members} == {one["curvature"] for one in tasks}
    del base


def test_families_of_several_bases_and_a_dry_run(top, tmp_path):
    dry = zoo.plan(asked(top), dry_run=True)
    assert len(dry.families[0].members) == 10  # headers do not tell what weights are
    assert dry.alone == {"other": "its layers are not the base's"}
    far = zoo.plan({**asked(top), "base": str(top / "zoo" / "stranger")})
    assert not far.families
    assert "another base" in far.alone["good0"]
    with pytest.raises(GradmatchError, match="the plan has no family to merge"):
        zoo.run(far, tmp_path / "x", score=lambda _: 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_count_is_found_in_a_few_evaluations(seed):
    generator = torch.Generator().manual_seed(seed)
    peak = int(torch.randint(1, 13, (), generator=generator))
    tried = {}
    found = best_count(12, lambda count: -abs(count - peak), 6, tried)
    assert len(tried) <= 6
    assert abs(found - peak) <= 1
    assert best_count(12, lambda count: 0.0, 5) == 12  # ties go to more models
    assert best_count(1, lambda count: 0.0, 5) == 1
    assert best_count(6, lambda count: None if count > 3 else 1.0, 3) <= 3


def test_agreement_against_the_plain_sum():
    u = torch.randn(4, 7, dtype=torch.float64)
    unit = u / u.norm(dim=1, keepdim=True)
    found = agreement((u @ u.T).numpy())
    for i in range(4):
        rest = unit.sum(0) - unit[i]
        assert found[i] == pytest.approx(float(unit[i] @ rest / rest.norm()))
    assert not agreement(torch.zeros(3, 3).numpy()).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "b", "models": ["m"], "budgt": 3}, "unknown key 'budgt' .did you mean 'budget'"),
        (
            {"base": "b", "models": ["m"], "score": {"data": {"a": "x"}, "metrc": 1}},
            "unknown key 'score.metrc' .did you mean 'metric'",
        ),
        ({"models": ["m"]}, "base is missing"),
        ({"base": "b", "models": ["m"], "budget": 0}, "budget: Input should be greater"),
        ({"base": "b", "models": ["m"], "score": {}}, "score: give either `data"),
        ({"base": "b", "models": []}, "models: List should have at least 1"),
        ({"base": "b", "models": ["m"], "methods": ["tis"]}, "unknown method 'tis'"),
        ([], "holds no table of keys"),
    ],
)
def test_what_is_refused(content, message, tmp_path):
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(GradmatchError, match=message):
        zoo.plan(tmp_path / "zoo.yaml")


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_classifier(tmp_path / "base")
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) for p in base.parameters()]
    for seed in range(3):
        own = save_classifier(tmp_path / "zoo" / f"m{seed}")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, way in zip(own.parameters(), direction, strict=True):
                parameter.add_(0.05 * way + 0.01 * torch.randn(parameter.shape, generator=generator))
        own.save_pretrained(tmp_path / "zoo" / f"m{seed}")
    (tmp_path / "d.csv").write_text("text,label\ngood film,1\nbad plot,0\nfine film,1\ndull plot,0\n")
    asked = {
        "models": ["zoo"],
        "base": "base",
        "budget": 2,
        "score": {"data": {"d": "d.csv"}, "metric": "loss"},
    }
    (tmp_path / "ZOO.yaml").write_text(yaml.safe_dump(asked))
    assert run("zoo plan ZOO.yaml --dry-run --quiet") == 0
    assert "price: evaluations 2" in capsys.readouterr().out
    assert run("zoo plan ZOO.yaml -o PLAN.yaml --json --quiet") == 0
    assert len(json.loads(capsys.readouterr().out)["families"][0]["members"]) == 3
    assert run("zoo run PLAN.yaml out --dry-run --quiet") == 0
    assert not (tmp_path / "out").exists()
    assert run("zoo run PLAN.yaml out --json --quiet") == 0
    caught = capsys.readouterr()
    told = json.loads(caught.out[caught.out.rindex("\n{") if "\n{" in caught.out else 0 :])
    assert "price: evaluations 2" in caught.err
    assert (tmp_path / "out" / "config.json").is_file()
    assert told["families"][0]["evaluations"] == 2
    assert run("zoo run PLAN.yaml out --quiet") == 2
    assert "pass overwrite (--overwrite)" in capsys.readouterr().err
    assert run("zoo run PLAN.yaml out --overwrite --quiet") == 0  # from the log, without an evaluation
    assert run("zoo run ZOO.yaml out2 --quiet") == 2
    assert "unknown key 'models'" in capsys.readouterr().err


def test_the_families_merges_stand_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = save_classifier("base")
    for n in range(4):  # two near one another, and two that went far away
        tuned = moved(start, n, scale=0.003)
        if n > 1:
            tuned = moved(tuned, 9, scale=1.0)
        tuned.save_pretrained(f"zoo/m{n}")
    other = moved(start, 20, scale=1.0)
    other.save_pretrained("zoo/lone")
    (tmp_path / "data.csv").write_text("text,label\ngood film,1\nbad film,0\n")
    told = {"models": ["zoo"], "base": "base", "budget": 2, "score": {"data": {"all": "data.csv"}}}
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(told))
    assert run("zoo plan zoo.yaml -o plan.yaml --mixture --quiet") == 0
    plan = read_file("plan.yaml", PlanFile)
    assert plan.mixture["level"] == "model"
    assert "lone" in [one.name for one in plan.singles]
    assert run("zoo run plan.yaml out --quiet --json") == 0
    module = mixture.load("out")
    batch = {"input_ids": torch.tensor([[3, 5]])}
    assert module(**batch).logits.shape == (1, 2)
    assert len(module.experts) == len(plan.families) + len(plan.singles)
    assert not list(tmp_path.glob(".gradmatch-*"))
    (tmp_path / "one.yaml").write_text(
        as_yaml(plan.model_copy(update={"families": plan.families[:1], "singles": []}))
    )
    assert run("zoo run one.yaml other --quiet") == 2
    assert "a mixture needs two experts" in capsys.readouterr().err
