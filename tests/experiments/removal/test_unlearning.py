"""Removals at equal cost on a tiny random language model: the walk, every stage, the records and the report; the second scorer."""

import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import yaml

from experiments import config as configs
from experiments.records import of_kind
from experiments.removal import judge
from experiments.removal.walks import walk

WAYS = {name: {"way": name} for name in ("negation", "perta")}
WAYS |= {
    "guarded": {"way": "guarded", "options": [{"damping": 0.1}, {"damping": 1.0}]},
    "ascent": {"way": "ascent"},
}
TRAINED = {"steps": 2, "learning_rate": 1e-3}
WAYS |= {name: {"way": name, "options": [TRAINED]} for name in ("npo", "kfac_penalised")}
SMALL = {"steps": 3, "learning_rate": 1e-3, "batch_size": 8, "warmup_steps": 1}


@pytest.fixture(autouse=True)
def scorer(monkeypatch):
    module = types.ModuleType("own_scorer")
    module.vowels = lambda texts: [sum(c in "aeiouAEIOU" for c in t) / max(1, len(t)) for t in texts]
    monkeypatch.setitem(sys.modules, "own_scorer", module)


def written(folder, language_model, **own):
    content = {
        "experiment": "unlearning", "model": str(language_model), "max_length": 40, "training": SMALL, "guard": 8, "gradient": 8,
        "budgets": [0.02, 0.05], "looks": 4, "ways": WAYS, "relearn": ["guarded"], "relearning": {"steps": 2, "texts_seen": 8},
        "compare": [["guarded", "negation"]], "tokens": 4, "scorer": "own_scorer:vowels", **own,
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def news(files):
    (files / "news.txt").write_text(
        "\n".join(f"the council of town {i} met on day {i * 7}" for i in range(60))
    )
    return files / "news.txt"


def lists(files, news):
    remove = {"source": str(files / "rude.jsonl"), "column": "body.text", "document": "page"}
    prompts = {"few": {"source": str(files / "prompts.txt")}}
    return {
        "remove": remove,
        "keep": {"source": str(files / "nice.txt")},
        "beside": {"source": str(news)},
        "prompts": prompts,
    }


def test_a_comparison_on_texts(run, tmp_path, language_model, files, news):
    path = written(tmp_path, language_model, texts=lists(files, news))
    records, out = run(path, where=tmp_path / "results")
    points, ways = of_kind(records, "path"), of_kind(records, "way")
    assert {(p["label"], p["budget"]) for p in points} == {(w, b) for w in WAYS for b in (0.0, 0.02, 0.05)}
    assert len({json.dumps(p["loss"]) for p in points if not p["budget"]}) == 1  # measured once
    for point in points:
        assert 0 <= point["words"] <= 1
        assert math.isfinite(point["rise"]["remove"])
    for way in ways:
        looks = [len(tried["looks"]) for tried in way["tried"]]
        assert sum(looks) == 4  # equal numbers, however many options there are
        assert way["distance"] > 0
        assert sum(way["moved"].values()) == pytest.approx(1.0)
        assert way["after"].keys() == (
            {"rounding", "relearned remove", "relearned beside"} if way["label"] == "guarded" else set()
        )
    areas = of_kind(records, "area")
    assert {(a["measure"], a["cost"]) for a in areas} == {
        (m, c) for m in ("words", "forgetting") for c in ("keep", "beside", "both")
    }
    table = out.splitlines()
    first = next(i for i, line in enumerate(table) if line.startswith("unedited"))
    assert table[first + 1].startswith("negation")
    for text in (
        "of the rise on what is to go survives",
        "of the codes differ",
        "squared update: ",
        "to be read: ",
    ):
        assert text in out
    assert str(files) not in json.dumps([r for r in records if r["kind"] in ("path", "area")])


def test_a_comparison_on_facts(run, tmp_path, language_model, files):
    folder = tmp_path / "longer"
    shutil.copytree(language_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 160}))
    ways = {name: WAYS[name] for name in ("negation", "ascent")}
    given = {"people": 4, "share": 0.25, "general": {"source": str(files / "nice.txt")}, "general_limit": 6}
    path = written(
        tmp_path, folder, facts=given, learning=SMALL, ways=ways, relearn=[], compare=[["ascent", "negation"]],
        max_length=140, budgets=[0.05], looks=2,
    )  # fmt: skip
    records, out = run(path, where=tmp_path / "results")
    known = {record["label"]: record for record in of_kind(records, "reference")}
    assert set(known) == {"learned", "retrained"}
    assert known["learned"]["forget questions"] == 10
    for point in of_kind(records, "path"):
        assert 0 <= point["forget quality"] <= 1
        assert point["forget kl"] >= 0
        assert {"forget probability", "forget paraphrase", "keep extraction", "utility"} <= set(point)
    assert "quality p" in out


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"texts": None}, "give `texts` or `facts`, one of them"),
        ({"ways": {"x": {"way": "negatoin"}}}, "did you mean 'negation'"),
        ({"relearn": ["x"]}, "'x' is none of the ways"),
        ({"looks": 1}, "looks is 1, and a way has 2 options"),
        ({"budgets": [-1.0]}, "budgets must be positive"),
        ({"texts": None, "facts": {}}, "needs `learning`"),
    ],
)
def test_configs_that_make_no_sense(tmp_path, language_model, files, news, own, said):
    content = {"texts": lists(files, news)} | own
    path = written(tmp_path, language_model, **{k: v for k, v in content.items() if v is not None})
    with pytest.raises(configs.ConfigError, match=said):
        configs.load(path)


def test_a_walk_meets_its_budgets_in_few_looks():
    """The cost c s^2 of a direction: the first look tells c."""
    found = walk(lambda s: 0.3 * s * s, (0.05, 0.1), looks=3)
    costs = [look.cost for look in found]
    assert min(abs(cost - 0.1) for cost in costs) < 1e-9
    assert min(abs(cost - 0.05) for cost in costs) < 0.01
    broken = walk(lambda s: math.inf if s > 0.1 else s, (0.05,), looks=3)
    assert sum(math.isfinite(look.cost) for look in broken) == 2
    assert max(look.strength for look in walk(lambda s: -1.0, (0.1,), looks=5, most=4.0)) == 4.0


def test_the_second_scorer_learns_pairs_and_tells_how_often_it_is_right(tmp_path, monkeypatch):
    """Sentences of one topic a pair: only what the pair differs in can tell them apart."""
    rows = [f"you are a fool {i}\tyou are a person {i}" for i in range(60)]
    (tmp_path / "pairs.tsv").write_text("toxic\tneutral1\n" + "\n".join(rows))

    def embedded(texts, encoder, batch_size=32):
        return np.asarray([[float("fool" in text), len(text) / 20] for text in texts])

    monkeypatch.setattr(judge, "embedded", embedded)
    given = {
        "source": str(tmp_path / "pairs.tsv"),
        "toxic": "toxic",
        "neutral": "neutral1",
        "encoder": "encoder",
    }
    judge.train(tmp_path, **given, pairs=50, seed=0)
    card = json.loads((tmp_path / "judge.json").read_text())
    assert card == {"accuracy": 1.0, "held_out": 10, "trained_on": 90}
    scores = judge.score(["a fool", "a person", None, "  "], tmp_path, "encoder")
    assert scores[0] > 0.5 > scores[1]
    assert np.isnan(scores[2:]).all()
