"""A zoo looked at: cards, similarities against a flattened reference, families that lose no model, folders as people have them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from gradmatch import Curvature, GradmatchError, Task, zoo
from tests.command import run
from tests.gradmatch.cases import curvature, state, tuned
from tests.gradmatch.tiny import save_classifier


def flat(tensors):
    return torch.cat([value.double().flatten() for value in tensors.values()])


def cosine(one, other):
    x, y = flat(one), flat(other)
    return float(x @ y / (x.norm() * y.norm()))


def save(folder, tensors, config=None):
    folder.mkdir(parents=True)
    save_file({name: value.float() for name, value in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models():
    """Large weights and small independent updates, and a planted pair."""
    base = state(0, torch.float32, scale=10.0)
    found = {name: tuned(base, seed, 1e-3) for seed, name in enumerate("abc", 1)}
    found["twin"] = {name: base[name] + 1.001 * (found["a"][name] - base[name]) for name in base}
    return base, found


@pytest.mark.parametrize("pages", [2**22, 5])
def test_cosines_are_those_of_the_flattened_weights_and_task_vectors(models, monkeypatch, pages):
    base, found = models
    monkeypatch.setattr("gradmatch.zoo.pairs.AT_ONCE", pages)
    weights = zoo.similarity(found)
    updates = zoo.similarity(found, base, by="task_vectors")
    taus = {name: {k: model[k].double() - base[k].double() for k in base} for name, model in found.items()}
    for a in found:
        for b in found:
            assert weights.of(a, b) == pytest.approx(cosine(found[a], found[b]), abs=1e-12)
            assert updates.of(a, b) == pytest.approx(cosine(taus[a], taus[b]), abs=1e-9)
    assert weights.of("a", "b") > 0.999999  # of every pair: weights tell fine-tunes of one base not apart
    assert abs(updates.of("a", "b")) < 0.4
    assert updates.of("a", "twin") > 0.999
    assert "one long vector" in weights.definition


def test_the_base_among_the_models_has_a_defined_place(models):
    base, found = models
    alike = zoo.similarity({**found, "base": base}, base, by="task_vectors")
    assert not any(value != value for row in alike.matrix.tolist() for value in row)
    assert alike.of("base", "a") == 0.0
    assert alike.of("base", "base") == 1.0
    seen = zoo.inspect({**found, "base": base}, base)
    assert seen["base"].notes == ("equals the base in every weight",)
    assert seen["a"].base == "base"
    tau = float((flat(found["a"]) - flat(base)).norm())
    assert seen["a"].update == pytest.approx(tau)
    assert seen["a"].distance == pytest.approx(tau / float(flat(base).norm()))
    assert seen["a"].cosine == pytest.approx(cosine(found["a"], base))


def test_a_base_that_lies_amid_its_fine_tunes_is_found_and_equal_models_are_told(models):
    base, found = models
    three = {name: found[name] for name in "abc"}
    seen = zoo.inspect({**three, "origin": base, "copy": dict(base)})
    assert {card.base for name, card in seen.items() if name in "abc"} <= {"origin", "copy"}
    assert seen["copy"].notes == ("equals origin in every weight",)
    assert all(card.base == "" for card in zoo.inspect(three).values())
    assert "equals origin" in seen.summary()


@pytest.mark.parametrize("seed", range(6))
def test_every_model_is_in_exactly_one_family_whatever_their_order(seed):
    generator = torch.Generator().manual_seed(seed)
    bases = [state(100 + n, torch.float32) for n in range(3)]
    other = {
        "layers.0.w": torch.randn(3, 3, generator=generator),
        "layers.1.v": torch.randn(2, generator=generator),
    }
    zoo_ = {f"m{n}": tuned(bases[int(torch.randint(3, (), generator=generator))], n, 0.02) for n in range(9)}
    zoo_["odd"] = other
    zoo_["nan"] = {name: torch.full_like(value, torch.nan) for name, value in bases[0].items()}
    for threshold in (-1.0, 0.5, 0.95, 1.0):
        found = zoo.cluster(zoo_, threshold)
        assert sorted(name for family in found.families for name in family) == sorted(zoo_)
        assert len(found.apart) == len(found.families) - 1
        backwards = zoo.cluster(dict(reversed(zoo_.items())), threshold)
        assert {frozenset(f) for f in found.families} == {frozenset(f) for f in backwards.families}
    found = zoo.cluster(zoo_, 0.95)
    assert found.of("odd") == ("odd",)
    assert {one.kind for one in found.apart if one.members == ("nan",)} == {"broken"}
    with pytest.raises(GradmatchError, match="model is 'm99'"):
        found.of("m99")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder as people have them."""
    top = tmp_path_factory.mktemp("zoo")
    save_classifier(top / "cls")
    model = save_classifier(top / "deep" / "cls", classes=3)
    del model
    base = state(0, torch.float32)
    save(top / "runs" / "x" / "model", tuned(base, 1, 0.01))
    save(top / "runs" / "y" / "model", tuned(base, 2, 0.01))
    save(top / "runs" / "far" / "model", state(5, torch.float32))
    (top / "runs" / "x" / "logs").mkdir()
    (top / "runs" / "x" / "logs" / "train.txt").write_text("loss 1")
    save(top / "out.partial", base)
    (top / "cut").mkdir()
    (top / "cut" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    (top / "stub").mkdir()
    (top / "stub" / "config.json").write_text("{}")
    curvature(base, 1, 10).save(top / "h.safetensors")
    (top / "curvatures").mkdir()
    curvature(base, 1, 10).save(top / "curvatures" / "x.safetensors")
    save(top / "sharded", {"w": torch.ones(2, 2)})
    (top / "sharded" / "model.safetensors").rename(top / "sharded" / "a.safetensors")
    (top / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "a.safetensors"}})
    )
    save_file({"w": torch.zeros(2, 2)}, top / "sharded" / "old.safetensors")
    (top / "h.safetensors").unlink()
    return top


def test_models_are_found_in_folders_and_the_rest_is_listed_with_its_reason(folders):
    seen = zoo.inspect(folders)
    assert set(seen) == {"zoo0/cls", "deep/cls", "x/model", "y/model", "far/model", "sharded"}
    reasons = {place.rsplit("/", 1)[1]: why for place, why in seen.skipped.items()}
    assert reasons["out.partial"] == "the unfinished output of a merge"
    assert "gone.safetensors" in reasons["cut"]
    assert reasons["logs"] == "holds no model"
    assert reasons["stub"] == "holds a config.json and no weights"
    assert "curvature file x.safetensors" in reasons["curvatures"]
    assert seen["sharded"].notes == ("old.safetensors lies beside the index and is not read",)
    assert (
        seen.similarity.pairs.square[list(seen).index("sharded")].max() == 4.0
    )  # the value that the index names
    card = seen["deep/cls"]
    assert card.architecture == "BertForSequenceClassification"
    assert card.head == ("class0", "class1", "class2")
    assert card.dtype == "F32"
    assert card.vocabulary == 18
    assert len(card.tokenizer) == 8


def test_families_of_the_folder_say_why_and_what_helps(folders):
    found = zoo.cluster(folders)
    assert set(found.of("x/model")) == {"x/model", "y/model"}
    assert set(found.of("zoo0/cls")) == {"zoo0/cls", "deep/cls"}
    told = {one.members[0]: (one.kind, one.helps) for one in found.apart}
    assert told["far/model"] == ("initialisation", "rebasin") or found.families[0] != ("x/model", "y/model")
    assert told["sharded"] == ("shapes", "")
    assert "skipped" in found.summary()


def test_a_stranger_and_another_vocabulary_are_told_apart(tmp_path, models):
    _, found = models
    alone = zoo.cluster({"a": found["a"], "b": found["b"], "far": state(9, torch.float32)})
    (apart,) = alone.apart
    assert (apart.kind, apart.helps) == ("initialisation", "rebasin")
    assert "gradmatch align" in alone.summary()
    save_classifier(tmp_path / "one")
    save_classifier(tmp_path / "two")
    words = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    words["model"]["vocab"] = {word: 15 - n for word, n in words["model"]["vocab"].items()}
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(words))
    (apart,) = zoo.cluster(tmp_path).apart
    assert apart.kind == "tokenizer"


def test_mismatch_and_gradients_come_from_curvature_files(models):
    base = models[0]
    base = {name: value.double() for name, value in base.items()}
    tasks = {}
    for seed, name in enumerate("ab", 1):
        model = tuned(base, seed, 0.1)
        tasks[name] = Task(model, curvature(model, seed, 10 * seed, gradient=True))
    cost = zoo.similarity(tasks, base, by="mismatch")
    half = {name: (tasks["a"].model[name] + tasks["b"].model[name]) / 2 for name in base}
    rise = 0.0
    for name in "ab":
        d = {k: half[k] - tasks[name].model[k] for k in base}
        h = tasks[name].curvature
        rise += sum(
            float((h.gradient(k) * d[k]).sum() + 0.5 * (h.total(k) * d[k].square()).sum()) / h.num_examples
            for k in base
        )
    assert cost.of("a", "b") == pytest.approx(float(torch.exp(-torch.tensor(max(rise / 2, 0.0)))), rel=1e-6)
    gradients = [{k: tasks[name].curvature.gradient(k) for k in base} for name in "ab"]
    assert zoo.similarity(tasks, by="gradients").of("a", "b") == pytest.approx(cosine(*gradients))
    assert zoo.cluster(tasks, -1.0, "mismatch", base=base).families == [("a", "b")]


BASE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.inspect([]), "no model was found"),
        (lambda: zoo.inspect(BASE), "models is one state dict"),
        (lambda: zoo.inspect(7), "models is a int"),
        (lambda: zoo.inspect({"a": 3}), "a is a int; a model is a path"),
        (lambda: zoo.inspect([Task(BASE, name="a"), Task(BASE, name="a")]), "two models are called 'a'"),
        (lambda: zoo.inspect("nowhere"), "nowhere"),
        (lambda: zoo.similarity([BASE], by="weight"), "by is 'weight' .did you mean 'weights'"),
        (lambda: zoo.similarity([BASE], by="task_vectors"), "pass base="),
        (lambda: zoo.similarity([BASE], BASE, by="mismatch"), "has no curvature file"),
        (
            lambda: zoo.similarity([Task(BASE, Curvature.from_dict(BASE, 1))], by="gradients"),
            "holds no gradient",
        ),
        (lambda: zoo.cluster([BASE], 95), "threshold is 95, it must lie in"),
        (lambda: zoo.cluster([BASE], by="task_vectors"), "pass base="),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call()


def test_the_same_folder_twice_is_refused(folders):
    with pytest.raises(GradmatchError, match="is given twice"):
        zoo.inspect([folders / "runs", folders / "runs" / "x" / "model"])


def test_the_commands(folders, capsys):
    assert run(f"zoo inspect {folders} --quiet") == 0
    out = capsys.readouterr().out
    assert "6 models" in out
    assert "similarity by weights" in out
    assert run(f"zoo inspect {folders}/runs --json --quiet") == 0
    told = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in told["models"]] == ["far/model", "x/model", "y/model"]
    assert run(f"zoo cluster {folders}/runs --threshold 0.9 --json --quiet") == 0
    assert json.loads(capsys.readouterr().out)["families"] == [["x/model", "y/model"], ["far/model"]]
    assert run("zoo inspect") == 2
    assert "no models: name folders, or give --task" in capsys.readouterr().err
    assert run(f"zoo cluster {folders}/runs --by task_vectors --quiet") == 2
    assert "--base" in capsys.readouterr().err
