"""Claims 15 and 16 from made-up records: what holds, what is refuted, and what too few seeds do not show."""

import pytest

from experiments.claims_removal import guarded, tofu
from experiments.verdicts import HOLDS, NOT_SHOWN, REFUTED


def evidence(value, low, high, seeds=3, left=0.6):
    pairs = [[seed, bad] for seed in range(seeds) for bad in (0, 1)]
    areas = [
        {"kind": "area", "ours": "guarded", "theirs": "negation", "measure": measure, "cost": cost, "pairs": pairs,
         "difference": -value, "low": -high, "high": -low}
        for measure in ("words", "judge") for cost in ("keep", "beside")
    ]  # fmt: skip
    after = {"relearned remove": {"survives": left}}
    ways = [{"kind": "way", "label": "guarded", "seed": s, "bad": b, "after": after} for s, b in pairs]
    return {"guarded": [*areas, *ways]}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ((-0.05, -0.07, -0.03), HOLDS), ((-0.05, -0.07, 0.01), NOT_SHOWN), ((-0.01, -0.02, -0.005), REFUTED),
        ((-0.05, -0.07, -0.03, 1), NOT_SHOWN),
    ],
)  # fmt: skip
def test_the_area_must_be_wide_enough_and_its_interval_below_zero(given, verdict):
    rows = list(guarded(evidence(*given)))
    assert [row.verdict for row in rows[:4]] == [verdict] * 4
    assert rows[0].measured == f"{given[0]:+.3f}"
    few = len(given) > 3
    assert rows[4].verdict == (NOT_SHOWN if few else HOLDS)
    assert list(guarded(evidence(*given, *(() if few else (3,)), left=0.1)))[4].verdict == REFUTED
    assert list(guarded({})) == []
    assert {row.verdict for row in guarded({"guarded": []})} == {NOT_SHOWN}


def facts(ours, plain, seeds=3):
    points = [
        {"kind": "path", "label": label, "seed": seed, "bad": 0, "budget": budget, "forget kl": kl + 9 * (budget < 0.1),
         "forget quality": 0.3, "utility": 0.5}
        for seed in range(seeds) for budget in (0.05, 0.1) for label, kl in (("guarded", ours), ("negation", plain))
    ]  # fmt: skip
    truth = [
        {"kind": "reference", "label": "retrained", "seed": seed, "utility": 0.51} for seed in range(seeds)
    ]
    return {"facts": [*points, *truth]}


@pytest.mark.parametrize(
    ("given", "verdict"), [((0.1, 0.2), HOLDS), ((0.2, 0.1), REFUTED), ((0.1, 0.2, 2), NOT_SHOWN)]
)
def test_nearer_to_the_retrained_model_in_every_seed(given, verdict):
    rows = list(tofu(facts(*given)))
    assert [row.verdict for row in rows[:2]] == [verdict, NOT_SHOWN]  # no records of an ascent
    assert rows[2].measured == "best p 0.3 at >= 97 % of the utility"
    assert list(tofu({})) == []
