"""The ten claims from records: each verdict on tiny synthetic records, the command, and the README's table."""

from pathlib import Path

import pytest

from experiments import claims
from experiments.__main__ import main
from experiments.config import ConfigError, digest, load
from experiments.records import of_kind, read_records, write_records
from experiments.studies import claims as study
from experiments.verdicts import HOLDS, NOT_SHOWN, REFUTED, REPORTED, summary

ROOT = Path(__file__).parents[2]


def theory(number, holds, **value):
    return {"kind": "claim", "claim": number, "value": value, "seeds": 40, "holds": holds}


def comparison(low, high, seeds=3, **more):
    tasks = {"difference": (low + high) / 2, "low": low, "high": high, **more}
    everywhere = {"difference": -1, "low": -1, "high": -1}  # the base's domain too: not what is claimed
    return {"kind": "comparison", "ours": "GM", "theirs": "TA", "seeds": seeds, **everywhere, "tasks": tasks}


def evaluation(model, seed, distance):
    return {"kind": "evaluation", "model": model, "seed": seed, "distance_to_joint": distance}


def sweep(model, seed, *accuracies):
    points = [{"alpha": i, "metrics": {"tasks": {"accuracy": value}}} for i, value in enumerate(accuracies)]
    return {"kind": "sweep", "model": model, "seed": seed, "points": points}


def subset(model, tasks, mismatch, accuracy, seed=0):
    found = {"kind": "subset", "seed": seed, "tasks": tasks, "model": model, "compare": ["GM", "TA"]}
    found["metrics"] = {"macro": {"accuracy": accuracy}}
    return found | {"mismatch": {"per_example": mismatch, "total": mismatch}}


def proof(problem, edit, seed, distance, kl=None):
    found = {"kind": "proof", "problem": problem, "edit": edit, "seed": seed, "alpha": 1.0}
    return found | {"distance": distance} | ({} if kl is None else {"kl": kl})


def area(low, high):
    found = {"kind": "area", "ours": "GM", "theirs": "TA", "measure": "toxicity"}
    return found | {"difference": (low + high) / 2, "low": low, "high": high}


def gain(estimate, kept, low, high, kind="fisher", examples=1000, seeds=3):
    found = {"kind": "gain", "estimate": estimate, "full": "full", "seeds": list(range(seeds))}
    return found | {"spec": {"kind": kind, "examples": examples}, "kept": kept, "low": low, "high": high}


def biases(*ratios):
    spec = {"kind": "batch means", "batch_size": 8}
    return [{"kind": "bias", "seed": 0, "trace_ratio": ratio / 8, "spec": spec} for ratio in ratios]


def refined(*values):
    return {"kind": "refinement", "seed": 0, "values": values}


def subsets(count, *measured):
    """Merges of two tasks on so many seeds: (model, mismatch, accuracy)."""
    return [subset(model, ["a", "b"], *own, seed) for seed in range(count) for model, *own in measured]


POINT = {"kind": "point", "seed": 0}
RIDGE = ("ridge", "GM, full H"), ("ridge", "TA")
LOGISTIC = ("logistic", "GM", 0.5, 0.9), ("logistic", "TA", 0.7, 0.8)
PROOFS = [
    *(proof(*edit, s, d) for s in (0, 1) for edit, d in zip(RIDGE, (1e-14, 0.5), strict=True)),
    *(proof(problem, edit, s, d + s / 100, k) for s in (0, 1) for problem, edit, d, k in LOGISTIC),
]
FLAT = [sweep("GM", 0, 0.90, 0.89), sweep("TA", 0, 0.90, 0.70)]
FLAT += [sweep("GM", 1, 0.9, 0.9), sweep("TA", 1, 0.9, 0.8)]
STEEP = [sweep("GM", 0, 0.95, 0.75), sweep("TA", 0, 0.90, 0.70)]
LONE = [evaluation("GM", 0, 0.5), evaluation("TA", 0, 1.0), evaluation("GM", 1, 0.5)]
SMALLER = subsets(3, ("GM", 1, 0.9), ("TA", 3, 0.7), ("AM", 2, 0.8))
LARGER = subsets(9, ("GM", 3, 0.9), ("TA", 1, 0.7), ("AM", 2, 0.8))
REMOVED = {"a": HOLDS, "b, logistic": [HOLDS, REFUTED], "b, network": NOT_SHOWN, "c": NOT_SHOWN}
FEW = [gain("IVON", 0.99, 0.95, 1.1, "ivon", seeds=2), *biases(2.0, 2.1, 2.0)]
CURVED = {"Fisher": HOLDS, "Adam": REFUTED, "IVON": NOT_SHOWN, "batch bias": NOT_SHOWN}
CONVEX = [theory(10, False, **dict.fromkeys(claims.SHOWN[10], 0.7))]
GAINS = [  # the worst Fisher of at least 500 counts, and the full estimate is no cheap one
    gain("full", 1, 1, 1),
    gain("500", 0.95, 0.8, 1.1, examples=500),
    gain("600", 1.1, 1, 1.2, examples=600),
    gain("100", 0.1, 0, 0.2, examples=100),
    gain("Adam", 0.5, 0.2, 0.8, "adam"),
    gain("IVON", 0.8, 0.5, 1.1, "ivon"),
    *biases(1.1, 0.9, 1.0),  # .75 to 1.25
]
CASES = [  # claim, study, its records, verdicts
    (claims.exactness, "theory", [theory(1, True, **{"GM, largest": 1e-15})], {"": HOLDS}),
    (claims.identities, "theory", [theory(2, False, **{"Eq. 6, largest": 1.0})], {"": REFUTED}),
    (claims.special_cases, "theory", [theory(3, True, a=1e-14, b=1e-13)], {"": HOLDS}),
    (claims.closer, "theory", [theory(4, True, **{"interval low": 0.9, "interval high": 1.0})], {"": HOLDS}),
    (claims.closer, "vision", [], {"": NOT_SHOWN}),
    (claims.closer, "vision", LONE, {"": NOT_SHOWN, "vision": REPORTED}),
    (claims.accuracy, "alpha", [comparison(0.01, 0.03)], {"text": HOLDS, "vision": NOT_SHOWN}),
    (claims.accuracy, "vision", [comparison(-0.01, 0.03)], {"vision": NOT_SHOWN}),
    (claims.accuracy, "alpha", [comparison(0.01, 0.03, seeds=1)], {"text": NOT_SHOWN}),  # too few
    (claims.accuracy, "vision", [comparison(-0.3, -0.1)], {"text": NOT_SHOWN, "vision": REFUTED}),
    (claims.flat, "alpha", FLAT, {"range": HOLDS, "best": HOLDS}),
    (claims.flat, "alpha", STEEP, {"range": REFUTED, "best": REFUTED}),
    (claims.flat, "alpha", [], {"range": NOT_SHOWN, "best": NOT_SHOWN}),
    (claims.mismatch, "adding", SMALLER, {"2 tasks": HOLDS, "smaller": HOLDS}),
    (claims.mismatch, "adding", LARGER, {"2 tasks": REFUTED, "smaller": REFUTED}),
    (claims.mismatch, "adding", [], {"rank": NOT_SHOWN, "smaller": NOT_SHOWN}),
    (claims.removal, "proof", PROOFS, REMOVED),
    (claims.removal, "proof", [proof(*edit, 0, 0.5) for edit in RIDGE], {"a": REFUTED}),
    (claims.removal, "toxicity", [area(0.01, 0.02), POINT], {"a": NOT_SHOWN, "c": HOLDS}),
    (claims.removal, "toxicity", [area(-0.01, 0.02)], {"c": NOT_SHOWN}),
    (claims.removal, "toxicity", [area(-0.02, -0.01)], {"c": REFUTED}),
    (claims.cheap, "curvature", GAINS, CURVED),
    (claims.cheap, "curvature", FEW, {"IVON": NOT_SHOWN, "batch bias": REFUTED}),
    (claims.cheap, "curvature", biases(1.1, 1.0, 1.05), {"Fisher": NOT_SHOWN, "batch bias": HOLDS}),
    (claims.cheap, "curvature", [], {"Adam": NOT_SHOWN, "batch bias": NOT_SHOWN}),
    (claims.refinement, "theory", CONVEX, {"convex": REFUTED}),
    (claims.refinement, "assumption", [refined(3.0, 2.0, 1.5), refined(3.0, 2.9)], {"network": HOLDS}),
    (claims.refinement, "assumption", [refined(3.0, 2.0, 2.5)], {"network": REFUTED, "convex": NOT_SHOWN}),
]


@pytest.mark.parametrize(("claim", "source", "records", "verdicts"), CASES)
def test_verdicts(claim, source, records, verdicts):
    rows = list(claim({source: records}))
    for part, verdict in verdicts.items():
        found = [row.verdict for row in rows if row.part == part]
        assert found == verdict if isinstance(verdict, list) else set(found) == {verdict}, part


def test_numbers_are_those_of_the_records():
    (text, _) = claims.accuracy({"alpha": [comparison(0.01, 0.03)]})
    assert (text.measured, text.interval, text.seeds) == ("+2.0 points", "+1.0 to +3.0", 3)
    (text, _) = claims.accuracy({"alpha": [comparison(0.01, 0.03, by_seed={"0": 0.01, "1": 0.03})]})
    assert text.measured == "+2.0 points (by seed +1.0, +3.0)"
    cells = [evaluation(model, seed, value) for model, value in (("GM", 0.6), ("TA", 1.2)) for seed in (0, 1)]
    told = "ratio of distances 0.50 (GM 0.60, TA 1.20 of the base's)"
    assert list(claims.closer({"alpha": cells}))[1].measured == told
    (ratio, _) = claims.flat({"alpha": [sweep("GM", 0, 0.9, 0.85), sweep("TA", 0, 0.9, 0.7)]})
    assert ratio.measured == "0.25 (5.0 / 20.0 points)"
    points = [{"kind": "point", "seed": seed} for seed in (0, 1)]
    *_, removal = claims.removal({"toxicity": [area(-0.03, -0.01) | {"by_seed": [-0.01, -0.03]}, *points]})
    assert (removal.measured, removal.seeds) == ("-0.0200 (by seed -0.010, -0.030)", 2)


def test_the_whole_claim_and_the_summary():
    parts = ((1, HOLDS), (2, HOLDS), (2, NOT_SHOWN), (3, NOT_SHOWN), (3, REFUTED), (1, REPORTED))
    rows = [{"claim": claim, "verdict": verdict} for claim, verdict in parts]
    assert summary(rows).endswith("holds: 1; refuted: 3; not shown: 2.")


def test_every_claim_has_a_row_even_without_records():
    assert sorted({row.claim for row in claims.rows({})}) == list(range(1, 11))
    assert {row.verdict for row in claims.rows({})} == {NOT_SHOWN}


@pytest.fixture
def evidence(tmp_path):
    """A folder of configs with the claims of the theory study alone, three seeds."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "theory.yaml").write_text("experiment: theory\nseeds: 3\nquick: [seeds=2]\n")
    path, given = folder / "claims.yaml", f"evidence: {{theory: {folder / 'theory.yaml'}}}"
    path.write_text(f"experiment: claims\n{given}\nquick: [small=true]\n")
    return path


def test_the_config_runs_the_studies_and_judges(evidence, tmp_path, capsys):
    assert main(["run", str(evidence), "--quick", "--results", str(tmp_path / "results"), "--debug"]) == 0
    out = capsys.readouterr().out
    assert "1              holds      Eq. 12 is the joint solution" in out
    assert "theory: this run" in out
    assert ", 2 seeds" in out
    assert (tmp_path / "results" / "theory-quick.jsonl").is_file()


def test_without_a_run_the_newer_file_counts_and_else_the_committed_one(evidence, tmp_path, capsys):
    options = ["claims", "--configs", str(evidence.parent), "--results", str(tmp_path / "results")]
    assert main(options) == 0
    assert "theory: experiments/results/theory.jsonl" in capsys.readouterr().out
    write_records(tmp_path / "results" / "theory.jsonl", [theory(1, False, **{"GM, largest": 1.0})])
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "theory: results/theory.jsonl" in out
    assert "1              refuted" in out


def test_a_half_run_study_is_read_from_its_file(evidence, tmp_path):
    results = tmp_path / "results"

    def origin():
        (found,) = of_kind(study.records(load(evidence), results / "stages"), "origins")
        return found["origins"]["theory"]

    assert origin().startswith("experiments/results/theory.jsonl (of ")  # another config: 40 seeds
    own = digest(load(evidence.parent / "theory.yaml"))
    for carried, said in (({}, " (of no recorded config)"), ({"config": own}, "")):
        write_records(results / "theory.jsonl", [theory(1, True) | carried])
        assert origin() == f"results/theory.jsonl{said}"
    (results / "theory.jsonl").unlink()
    (evidence.parent / "theory.yaml").write_text("experiment: theory\nname: new\nseeds: 3\n")
    assert origin() == "what has been run of it"


def test_evidence_can_be_a_part_of_a_config(evidence, tmp_path):
    results = tmp_path / "results"
    parts = load(evidence, ["parts={theory: [seeds=2]}"])
    own = study.studies(parts)["theory"]
    assert (own.seeds, own.name) == (2, "theory-claims")
    committed = study.COMMITTED / "theory.jsonl"  # all of it holds the part as well
    assert study.find(own.name, results) == committed
    whole = digest(load(evidence.parent / "theory.yaml"))
    write_records(results / "theory.jsonl", [theory(1, True) | {"config": whole}])
    for config, said in ((parts, " (of other seeds)"), (load(evidence, ["parts={theory: [seeds=3]}"]), "")):
        (origins,) = of_kind(study.read(config, results), "origins")
        assert origins["origins"]["theory"] == f"results/theory.jsonl{said}"
    write_records(results / "theory-claims.jsonl", [theory(1, True)])
    assert study.find(own.name, results) == results / "theory-claims.jsonl"
    quick = load(evidence, ["parts={theory: [seeds=5]}"], quick=True)
    assert study.studies(quick)["theory"].seeds == 2  # the quick variant leaves out enough
    said = r"`parts` changes 'theorie', which is no evidence \(did you mean 'theory'"
    with pytest.raises(ConfigError, match=said):
        load(evidence, ["parts={theorie: [seeds=2]}"])


def test_a_record_that_lacks_something_is_told(evidence, tmp_path, capsys):
    write_records(tmp_path / "results" / "theory.jsonl", [{"kind": "claim", "claim": 1}])
    assert main(["claims", "--configs", str(evidence.parent), "--results", str(tmp_path / "results")]) == 2
    said = "a record lacks 'value', or holds something else there (Claim 1.): run its config again"
    assert said in capsys.readouterr().err


def test_faults(evidence, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"no claim asks for 'theorie' \(did you mean 'theory'"):
        load(evidence, ["evidence={theorie: configs/theory.yaml}"])
    other = evidence.with_name("demo.yaml")
    other.write_text("experiment: sentiment\n")
    said = r"theory is told by a config of theory, but .*demo.yaml is one of sentiment"
    with pytest.raises(ConfigError, match=said):
        load(evidence, [f"evidence={{theory: {other}}}"])
    said = r"parts.theory: .*theory.yaml: '~sedes': there is no key 'sedes' to leave out"
    with pytest.raises(ConfigError, match=said):
        study.studies(load(evidence, ["parts={theory: [~sedes]}"]))
    document = tmp_path / "README.md"
    document.write_text("no markers")
    assert main(["claims", "--configs", str(evidence.parent), "--write", str(document)]) == 2
    assert "no block to write into" in capsys.readouterr().err
    assert document.read_text() == "no markers"


def test_the_page_of_results_carries_the_table_of_the_committed_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = study.read(load(Path("configs/claims.yaml")), None)
    assert study.rewritten(text, found) == text, "run `python -m experiments claims --write docs/results.md`"
    carried = read_records(ROOT / "experiments" / "results" / "claims.jsonl")
    assert carried == found, "run `python -m experiments claims --write experiments/results/claims.jsonl`"


def test_the_verdicts_can_be_written_as_records(evidence, tmp_path, capsys):
    file = tmp_path / "claims.jsonl"
    assert main(["claims", "--configs", str(evidence.parent), "--write", str(file)]) == 0
    assert {record["kind"] for record in read_records(file)} == {"verdict", "origins"}
