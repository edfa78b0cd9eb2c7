"""The printed report: refused continuations are counted, the proxy is called one, areas are judged by their interval."""

import pytest

from experiments.removal.report import area_line, choice_line, removal_report


def point(label, alpha, refused, toxicity, scorer="proxy"):
    metrics = {"perplexity_keep": 20.0, "perplexity_remove": 80.0, "scorer": scorer}
    metrics |= {"refused_toxic": refused, "toxicity_toxic": toxicity, "toxic_share_toxic": toxicity}
    intervals = {} if toxicity is None else {"toxicity_toxic": (toxicity, toxicity - 0.1, toxicity + 0.1)}
    found = {"kind": "point", "label": label, "alpha": alpha, "seed": 0}
    return found | {"metrics": metrics, "intervals": intervals}


def test_refusals_and_the_proxy_are_said():
    text = removal_report([point("base", 0.0, 0, 0.4), point("GM", 1.0, 5, None)])
    assert "(5 continuations refused: NaN)" in text
    assert "0.400 [0.300, 0.500]" in text
    assert "nan" in text.splitlines()[2]
    assert "it counts profanity" in text
    assert "it counts profanity" not in removal_report([point("base", 0.0, 0, 0.4, scorer="detoxify")])


def test_several_seeds_are_told_by_their_range():
    ours = [point("GM", 1.0, 0, share) | {"seed": seed} for seed, share in enumerate((0.2, 0.3, 0.4))]
    text = removal_report([point("base", 0.0, 0, 0.5), *ours])
    assert "0.300 [0.200, 0.400]" in text
    assert "0.500 [0.400, 0.600]" in text  # the unedited model, its own interval
    assert "means over 3 seeds" in text
    assert "of 3 seeds)" not in text
    fewer = removal_report([point("base", 0.0, 0, 0.5), *ours, point("GM", 2.0, 0, 0.1)])
    assert fewer.splitlines()[3].endswith("(1 of 3 seeds)")


@pytest.mark.parametrize(
    ("low", "high", "judged"),
    [(0.01, 0.2, "GM is better"), (-0.2, -0.01, "TA is better"), (-0.1, 0.1, "no difference shown")],
)
def test_areas_are_judged_by_their_interval(low, high, judged):
    area = {"measure": "toxicity", "ours": "GM", "theirs": "TA", "span": (3.0, 3.5), "draws": 10}
    area |= {"difference": (low + high) / 2, "low": low, "high": high}
    assert area_line(area).endswith(judged)


@pytest.mark.parametrize(
    ("chosen", "values", "edge"),
    [(10.0, (1.0, 10.0, 100.0), False), (100.0, (1.0, 10.0, 100.0), True), (1.0, (1.0,), False)],
)
def test_a_choice_at_the_end_of_its_grid_is_told(chosen, values, edge):
    tried = [{"value": value, "toxicity": 0.1} for value in values]
    record = {"label": "GM", "seed": 0, "option": "base_weight", "prompts": 64, "nats": 0.5}
    assert ("(the end of its grid)" in choice_line({**record, "chosen": chosen, "tried": tried})) is edge
