"""The made zoo on the tiny world: what harms is made, the ways of choosing are compared, and the claims are judged from the records."""

import pytest
import torch
from safetensors.torch import load_file

from experiments import config as configs
from experiments.records import of_kind
from experiments.studies import zoo


@pytest.fixture
def zoo_config(beside, tiny_encoder, tiny_texts):
    training = {"steps": 10, "learning_rate": 1e-2, "batch_size": 16, "warmup_steps": 1}
    data = {"source": str(tiny_texts), "base": "films", "tasks": ["books", "songs"], "max_length": 16}
    given = {"encoder": str(tiny_encoder), "data": data, "base_training": training, "task_training": training}
    ways = ["plan", "best single", "average", "exhaustive", "cma-es from average", "cma-es from random"]
    return beside("zoo", **given, copies=1, long=2, exploded=0.5, trials=6, ways=ways)


def test_a_made_zoo_is_chosen_from_in_every_way(zoo_config, run, results):
    found, out = run(zoo_config)
    (families,) = of_kind(found, "families")
    names = [name for family in families["families"] for name in family]
    assert sorted(names) == sorted(["books-0", "books-long", "songs-0", "songs-long", *zoo.HARMFUL])
    choices = {one["way"]: one for one in of_kind(found, "choice")}
    assert choices["plan"]["evaluations"] <= 5
    assert choices["average"]["evaluations"] == 2 * 8 - 1
    assert choices["best single"]["evaluations"] == 8
    assert choices["exhaustive"]["evaluations"] >= choices["average"]["evaluations"]
    assert choices["exhaustive"]["score"] >= choices["best single"]["score"]
    assert len(choices["cma-es from random"]["curve"]) == 6
    assert {row["claim"] for row in of_kind(found, "verdict")} == {17, 18, 19}
    assert all(row["verdict"] != "holds" for row in of_kind(found, "verdict"))  # of one seed nothing is shown
    assert "best single" in out
    models, _ = zoo.models(configs.load(zoo_config), 0)
    weights = {
        name: load_file(stage.folder(results / "stages") / "model" / "model.safetensors")
        for name, stage in models.items()
        if name != "labels"
    }
    key = "bert.encoder.layer.0.output.dense.weight"
    moved = {name: float((own[key] - weights["base"][key]).norm()) for name, own in weights.items()}
    assert moved["exploded"] > 3 * moved["songs-0"]
    spread = weights["noise"][key] - weights["songs-0"][key]
    assert float(spread.std() / weights["songs-0"][key].std()) == pytest.approx(0.5, rel=0.2)
    u, v = (weights[name][key].flatten() for name in ("elsewhere", "base"))
    assert abs(float(torch.cosine_similarity(u, v, dim=0))) < 0.3


def test_the_claims_are_judged_by_their_thresholds():
    def choice(seed, way, accuracy, **more):
        test = {"macro": {"accuracy": accuracy}}
        return {
            "kind": "choice",
            "seed": seed,
            "way": way,
            "test": test,
            "score": accuracy,
            "evaluations": 5,
            "weights": {"a": 1.0},
            **more,
        }

    found = []
    for seed in range(3):
        found.append(
            {
                "kind": "families",
                "seed": seed,
                "families": [["a", "b"], ["elsewhere"]],
                "stranger": "elsewhere",
            }
        )
        found += [choice(seed, "plan", 0.80, left_out=list(zoo.HARMFUL)), choice(seed, "exhaustive", 0.802)]
        found += [choice(seed, "average", 0.8), choice(seed, "coefficient", 0.79)]
        found += [
            choice(seed, f"cma-es from {start}", 0.8, curve=curve)
            for start, curve in (("average", [0.8]), ("random", [0.7, None, 0.8]))
        ]
    told = {(row.claim, row.part): row.verdict for row in zoo.verdicts(found)}
    assert told == {
        (17, ""): "holds",
        (18, "a"): "holds",
        (18, "b"): "holds",
        (19, "a"): "refuted",
        (19, "b"): "holds",
    }
    found = [one for one in found if one["seed"] == 0]
    assert {row.verdict for row in zoo.verdicts(found)} == {"not shown", "refuted"}
    found[0]["families"] = [["a"], ["b", "elsewhere"]]
    assert zoo.verdicts(found)[0].verdict == "refuted"
    assert [row.measured for row in zoo.verdicts(found[:1])][1:] == ["no records"] * 4
