"""What a run says: sentences follow from the numbers, whichever way they point."""

import re

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
    ("gm", "ta", "low", "high", "row"),
    [
        (0.85, 0.75, 0.05, 0.15, r"GM - TA, all +\+10\.0 +\+5\.0 to \+15\.0 +better"),
        (0.75, 0.85, -0.15, -0.05, r"-10\.0 +-15\.0 to -5\.0 +worse"),
        (0.81, 0.80, -0.02, 0.04, r"\+1\.0 +-2\.0 to \+4\.0 +not told apart"),
    ],
)
def test_a_comparison_has_its_interval_and_is_read_whichever_way_it_points(gm, ta, low, high, row):
    found = records(gm, ta, low, high)
    assert re.search(row, sentiment_report(found))
    found[-1] |= {"p": 0.02, "p_holm": 0.08, "seeds": 2}  # what Holm does not leave is not told apart
    text = sentiment_report(found)
    assert re.search(r"0\.0200 +0\.0800 +not told apart", text)
    assert "paired bootstrap over the 2 seeds and the test examples" in text


def ranked(count, sign=1):
    """Merges whose mismatch and error rise together, or against each other."""
    return [evaluation(f"M{i}", "merge", 0.9 - i / 100, 1 + sign * i / 10) for i in range(count)]


def test_no_correlation_is_told_without_its_interval():
    assert "4 merges are too few to say whether the mismatch goes with" in sentiment_report(ranked(4))
    assert mismatch_correlation(ranked(4)) is None
    rho, low, high = mismatch_correlation(ranked(7))
    assert rho == pytest.approx(1)
    assert 0.7 < low < 0.95 < high < 1
    text = sentiment_report(ranked(7))
    assert (
        f"Spearman correlation of 1.00 (95 % interval over merges {low:.2f} to {high:.2f}): merges of" in text
    )
    assert "this tells no order of the merges" in sentiment_report(ranked(7, -1))


def test_what_is_missing_is_left_out():
    found = records(0.85, 0.75, 0.05, 0.15)
    without = [record for record in found if record.get("model") != "TA" and record["kind"] == "evaluation"]
    assert "comparison" not in sentiment_report(without).partition("±:")[0]
    assert sentiment_report([]) == "nothing was evaluated"
    assert "Merged models" not in sentiment_report(found[:2])


def test_what_stands_behind_plus_minus_is_said():
    found = [evaluation("GM", "merge", value, 0.1, seed) for seed, value in enumerate((0.8, 0.8, 0.9))]
    text = sentiment_report(found)
    assert "mean of 3 seeds" in text
    assert "83.3 ± 5.8" in text
    assert "±: standard deviation over the 3 seeds" in text
    one = [evaluation("GM", "merge", 0.8)]
    one[0]["metrics"]["macro"] = {**one[0]["metrics"]["macro"], "low": 0.7, "high": 0.86}
    assert "80.0 ± 8.0" in sentiment_report(one)
    assert "±: half the 95 % interval over the test examples of one seed" in sentiment_report(one)


def test_rows_by_split_and_class_are_told():
    rows = {"shop": {"train": {"bad": 3, "good": 4}, "test": {"bad": 1, "good": 1}}}
    data = {"kind": "data", "rows": rows, "notes": ["shop: 2 rows are left out"]}
    text = sentiment_report([data, evaluation("GM", "merge", 0.8)])
    assert re.search(r"shop, train +7 +bad 3, good 4", text)
    assert "  shop: 2 rows are left out" in text


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


def swept(*points, seeds=1):
    """The report with a sweep of GM: (alpha, accuracy), or also the loss and its forecast."""
    found = []
    for alpha, accuracy, *losses in points:
        told = {"forecast": {"mean": losses[1]}} if losses else {}
        tasks = {"accuracy": accuracy, **({"nll": losses[0]} if losses else {})}
        found.append({"alpha": alpha, "metrics": {"tasks": tasks}, **told})
    sweeps = [{"kind": "sweep", "model": "GM", "seed": seed, "points": found} for seed in range(seeds)]
    return sentiment_report([*records(0.85, 0.75, 0.05, 0.15), *sweeps])


def test_a_sweep_tells_its_range_and_best_alpha():
    text = swept((0.1, 0.7), (1.0, 0.9), (2.0, 0.6))
    assert "over alpha from 0.1 to 2" in text
    assert "GM     60.0 to 90.0 (range 30.0), best 90.0 at alpha = 1" in text
    assert "forecast" not in text


def test_a_sweep_that_was_forecast_tells_where_and_how_well():
    points = ((0.1, 0.7, 0.5, 0.6), (1.0, 0.9, 0.3, 0.7), (2.0, 0.6, 0.9, 4.0))
    text = swept(*points)
    assert "best 90.0 at alpha = 1; at the alpha of each seed's lowest forecast (0.1): 70.0" in text
    assert "Spearman" not in text  # one seed has no interval
    assert "Spearman correlation of 0.50 (95 % interval over 2 seeds, Student's t: 0.50 to 0.50)" in swept(
        *points, seeds=2
    )


def test_a_choice_at_the_end_of_its_grid_is_told():
    tried = [{"value": value} for value in (0.1, 0.3, 1.0)]
    for value, note in ((0.3, "base_weight = 0.3\n"), (0.1, "base_weight = 0.1 (the end of its grid)\n")):
        found = {
            **evaluation("GM*", "merge", 0.8),
            "choice": {"chosen": {"base_weight": value}, "tried": tried},
        }
        assert f"chosen on validation data, GM*: {note}" in sentiment_report([found])
