"""What a run says: sentences follow from the numbers, whichever way they point."""

import pytest

from experiments.report import claims_report, format_table, mismatch_correlation, sentiment_report


def evaluation(model, role, accuracy, mismatch=None, seed=0):
    """An evaluation record."""
    part = {"accuracy": accuracy, "nll": 0.5, "ece": 0.1, "n": 100}
    found = {"kind": "evaluation", "model": model, "role": role, "seed": seed, "folder": f"/models/{model}"}
    found |= {"domains": ["films", "books"]}
    found["metrics"] = dict.fromkeys(("films", "books", "macro", "per_example", "tasks"), part)
    measured = dict.fromkeys(("total", "per_example", "preconditioned"), mismatch)
    return found if mismatch is None else {**found, "mismatch": measured}


def records(gm, ta, low, high, gm_mismatch=0.1, ta_mismatch=0.4):
    """A base, a joint model, three merges and the comparison of GM with TA."""
    comparison = {"kind": "comparison", "ours": "GM", "theirs": "TA", "difference": gm - ta}
    return [
        evaluation("base", "base", 0.7),
        evaluation("joint", "joint", 0.9),
        evaluation("AM", "merge", 0.8, 0.2),
        evaluation("TA", "merge", ta, ta_mismatch),
        evaluation("GM", "merge", gm, gm_mismatch),
        {**comparison, "low": low, "high": high},
    ]


@pytest.mark.parametrize(
    ("gm", "ta", "low", "high", "sentence"),
    [
        (0.85, 0.75, 0.05, 0.15, r"GM (85.0 %) beats TA (75.0 %) by +10.0 points"),
        (0.75, 0.85, -0.15, -0.05, r"GM (75.0 %) loses to TA (85.0 %) by -10.0 points"),
        (0.81, 0.80, -0.02, 0.04, r"GM (81.0 %) is not told apart from TA (80.0 %) by +1.0 points"),
    ],
)
def test_the_first_sentence_says_who_is_better_or_that_nobody_is(gm, ta, low, high, sentence):
    text = sentiment_report(records(gm, ta, low, high))
    assert sentence in text
    assert "the joint model stands at 90.0" in text
    assert f"the best merge is {'GM' if gm > 0.84 else 'TA' if ta > 0.84 else 'GM'}" in text


def test_the_second_sentence_says_whether_the_mismatch_tells():
    text = sentiment_report(records(0.85, 0.75, 0.05, 0.15))
    assert "mismatch of GM is 0.25 times that of TA" in text
    assert "tells which merge errs less (Spearman 1.00" in text
    text = sentiment_report(records(0.85, 0.75, 0.05, 0.15, gm_mismatch=0.4, ta_mismatch=0.1))
    assert "mismatch of GM is 4.00 times that of TA" in text
    assert "does not tell which merge errs less (Spearman -1.00" in text


def test_what_is_missing_is_left_out():
    found = records(0.85, 0.75, 0.05, 0.15)
    assert mismatch_correlation(found[:2]) is None
    without = [record for record in found if record.get("model") != "TA" and record["kind"] == "evaluation"]
    assert "beats" not in sentiment_report(without)
    assert sentiment_report([]) == "nothing was evaluated"
    assert "Merged models" not in sentiment_report(found[:2])


def test_seeds_are_averaged():
    found = [evaluation("GM", "merge", value, 0.1, seed) for seed, value in enumerate((0.8, 0.8, 0.9))]
    text = sentiment_report(found)
    assert "mean of 3 seeds" in text
    assert "83.3" in text


def test_two_merges_have_no_rank_correlation():
    two = [record for record in records(0.85, 0.75, 0.05, 0.15) if record.get("model") != "AM"]
    assert mismatch_correlation(two) is None
    assert "which merge errs less" not in sentiment_report(two)


def test_columns_are_aligned():
    assert format_table(["a", "bb"], [["long", "1"], ["x", "22"]]).splitlines() == [
        "a     bb",
        "--------",
        "long   1",
        "x     22",
    ]


def test_claims_that_fail_are_printed_as_such():
    claim = {"kind": "claim", "claim": 1, "statement": "s", "threshold": "t", "value": {"v": 0.5}, "seeds": 3}
    assert "claim 1: holds. s" in claims_report([{**claim, "holds": True}])
    assert "claim 1: DOES NOT HOLD. s" in claims_report([{**claim, "holds": False}])


def swept(*points):
    """The report with a sweep of GM: (alpha, accuracy), or also the loss and its forecast."""
    found = []
    for alpha, accuracy, *losses in points:
        told = {"forecast": {"mean": losses[1]}} if losses else {}
        tasks = {"accuracy": accuracy, **({"nll": losses[0]} if losses else {})}
        found.append({"alpha": alpha, "metrics": {"tasks": tasks}, **told})
    sweep = {"kind": "sweep", "model": "GM", "seed": 0, "points": found}
    return sentiment_report([*records(0.85, 0.75, 0.05, 0.15), sweep])


def test_a_sweep_tells_its_range_and_best_alpha():
    text = swept((0.1, 0.7), (1.0, 0.9), (2.0, 0.6))
    assert "over alpha from 0.1 to 2" in text
    assert "GM     60.0 to 90.0 (range 30.0), best 90.0 at alpha = 1" in text
    assert "forecast" not in text


def test_a_sweep_that_was_forecast_tells_where_and_how_well():
    text = swept((0.1, 0.7, 0.5, 0.6), (1.0, 0.9, 0.3, 0.7), (2.0, 0.6, 0.9, 4.0))
    assert "best 90.0 at alpha = 1; at the alpha of each seed's lowest forecast (0.1): 70.0" in text
    assert "Spearman correlation of 0.50 (mean over seeds)" in text


def test_a_choice_at_the_end_of_its_grid_is_told():
    tried = [{"value": value} for value in (0.1, 0.3, 1.0)]
    for value, note in ((0.3, "base_weight = 0.3\n"), (0.1, "base_weight = 0.1 (the end of its grid)\n")):
        found = {
            **evaluation("GM*", "merge", 0.8),
            "choice": {"chosen": {"base_weight": value}, "tried": tried},
        }
        assert f"chosen on validation data, GM*: {note}" in sentiment_report([found])
