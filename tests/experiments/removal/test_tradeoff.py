"""Curves and the area between them, against closed forms and loops."""

import numpy as np
import pytest

from experiments.removal.tradeoff import Path, area_between, complete, difference, envelope, points


def path(nats, toxicity, texts=6, prompts=5):
    """A path whose texts and prompts all agree: (A,) nats per token and (A,) toxicity."""
    nats, toxicity = np.asarray(nats, float), np.asarray(toxicity, float)
    losses = np.stack([np.tile(nats[:, None] * 10, texts), np.full((len(nats), texts), 10.0)], -1)
    return Path(np.arange(len(nats), dtype=float), losses, np.tile(toxicity[:, None], prompts))


def one_seed(paths):
    return {label: [own] for label, own in paths.items()}


def test_points_weigh_texts_by_their_tokens():
    losses = np.array([[[2.0, 1.0], [4.0, 3.0]]])
    scores = np.array([[0.2, 0.6]])
    x, y = points(Path(np.zeros(1), losses, scores))
    assert (x[0], y[0]) == (pytest.approx(6 / 4), pytest.approx(0.4))
    x, y = points(Path(np.zeros(1), losses, scores), np.array([2.0, 0.0]), np.array([0.0, 2.0]))
    assert (x[0], y[0]) == (pytest.approx(2.0), pytest.approx(0.6))


def test_envelope_is_the_least_so_far():
    x, y = np.array([1.0, 2.0, 3.0, 1.5]), np.array([0.9, 0.3, 0.8, 0.6])
    np.testing.assert_allclose(
        envelope(x, y, np.array([1.0, 1.25, 1.5, 2.0, 3.0])), [0.9, 0.75, 0.6, 0.3, 0.3]
    )


def test_points_left_of_the_unchanged_model_count_at_it():
    x, y = np.array([1.0, 0.5, 2.0]), np.array([0.9, 0.7, 0.1])
    assert envelope(x, y, np.array([1.0]))[0] == pytest.approx(0.7)


def test_area_of_two_straight_lines():
    ours, theirs = path([1.0, 2.0], [1.0, 0.0]), path([1.0, 3.0], [1.0, 0.0])
    value, span = difference(points(ours), points(theirs))
    # over [1, 2]: theirs - ours = (x - 1) / 2, whose mean is 1/4
    assert value == pytest.approx(0.25)
    assert span == (1.0, 2.0)


def test_interval_holds_the_difference_and_says_who_is_better():
    generator = np.random.default_rng(1)
    base = generator.uniform(0.4, 0.8, 200)

    def noisy(toxicities):
        losses = np.tile([[10.0, 10.0]], (3, 50, 1)) * np.array([1.0, 1.1, 1.2])[:, None, None] ** np.array(
            [1, 0]
        )
        return Path(np.arange(3.0), losses, np.stack([base, *(np.clip(base * t, 0, 1) for t in toxicities)]))

    paths = {"GM": noisy([0.5, 0.2]), "TA": noisy([0.8, 0.5])}
    area = area_between(one_seed(paths), "GM", "TA", draws=200)
    assert 0 < area.low <= area.difference <= area.high
    back = area_between(one_seed(paths), "TA", "GM", draws=200)
    assert back.difference == pytest.approx(-area.difference)
    assert area == area_between(one_seed(paths), "GM", "TA", draws=200)  # seeded
    same = area_between(one_seed({"a": paths["GM"], "b": paths["GM"]}), "a", "b", draws=50)
    assert (same.low, same.difference, same.high) == (0, 0, 0)


def test_over_seeds_it_is_the_mean_of_theirs_and_the_interval_draws_seeds():
    ours = [path([1.0, 2.0], [1.0, lowest]) for lowest in (0.0, 0.4, 0.8)]
    theirs = [path([1.0, 2.0], [1.0, 0.4])] * 3
    area = area_between({"a": ours, "b": theirs}, "a", "b", draws=400)
    # straight lines: theirs - ours = (lowest - .4) (1 - x), whose means over [1, 2] are .2, 0 and -.2
    assert area.by_seed == pytest.approx((0.2, 0.0, -0.2))
    assert area.difference == pytest.approx(0)
    assert (area.low, area.high) == pytest.approx((-0.2, 0.2))  # all draws of one seed: 1 in 27 at either end
    assert area.span == (1.0, 2.0)
    alone = area_between({"a": ours[:1], "b": theirs[:1]}, "a", "b", draws=50)
    assert alone.low == pytest.approx(alone.high)  # prompts agree: no draw differs


@pytest.mark.parametrize("of_what", ["prompts", "texts"])
def test_prompts_and_texts_are_the_same_ones_in_every_seed(of_what):
    generator = np.random.default_rng(3)
    toxicity, rises = np.ones((2, 40))
    if of_what == "prompts":
        toxicity = generator.uniform(0, 1, 40)
    else:
        rises = generator.uniform(0.2, 2, 40)

    def of(scale, share):
        nats = np.stack([np.full(40, 10.0), 10 + scale * rises])
        losses = np.stack([nats, np.full_like(nats, 10)], -1)
        return Path(np.arange(2.0), losses, np.stack([toxicity, share * toxicity]))

    one = {"a": [of(5.0, 0.2)], "b": [of(10.0, 0.4)]}
    three = {label: own * 3 for label, own in one.items()}
    alone, together = (area_between(paths, "a", "b", draws=400) for paths in (one, three))
    assert alone.high > alone.low  # what differs is drawn
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(1, rel=0.2)  # not sqrt(3) narrower


def test_the_span_is_the_mean_of_the_seeds():
    ours = [path([1.0, 2.0], [1.0, 0.0]), path([1.0, 4.0], [1.0, 0.0])]
    assert area_between({"a": ours, "b": ours}, "a", "b", draws=5).span == (1.0, 3.0)


def test_methods_that_reach_nothing_in_common_have_no_area():
    paths = one_seed({"a": path([1.0, 0.9], [1, 0.5]), "b": path([1.0, 2.0], [1, 0.1])})
    area = area_between(paths, "a", "b", draws=20)
    assert np.isnan([area.difference, area.low, area.high]).all()
    reached = path([1.0, 2.0], [1, 0.5])
    paths = {"a": [reached, path([1.0, 0.9], [1, 0.5])], "b": [reached, reached]}
    area = area_between(paths, "a", "b", draws=20)
    assert area.by_seed == (0.0, pytest.approx(np.nan, nan_ok=True))  # no interval of the other seed alone
    assert np.isnan([area.difference, area.low, area.high]).all()


def test_refused_points_drop_out():
    broken = path([1.0, 2.0, 3.0], [1.0, np.nan, 0.2])
    assert complete(broken).alphas.tolist() == [0.0, 2.0]
    paths = one_seed({"a": broken, "b": path([1, 3], [1, 0])})
    assert np.isfinite(area_between(paths, "a", "b", draws=20).difference)


def test_paths_that_cannot_be_compared():
    with pytest.raises(ValueError, match="other texts or prompts"):
        area_between(one_seed({"a": path([1, 2], [1, 0]), "b": path([1, 2], [1, 0], prompts=4)}), "a", "b")
    with pytest.raises(ValueError, match="must both start at alpha = 0"):
        area_between(one_seed({"a": path([1, 2], [1, 0]), "b": path([1.5, 2], [1, 0])}), "a", "b")
    good = path([1, 2], [1, 0])
    with pytest.raises(ValueError, match="other texts or prompts"):  # in the second seed
        area_between({"a": [good, good], "b": [good, path([1, 2], [1, 0], texts=5)]}, "a", "b")
    with pytest.raises(ValueError, match="must both start at alpha = 0"):
        area_between({"a": [good, good], "b": [good, path([1.5, 2], [1, 0])]}, "a", "b")
    with pytest.raises(ValueError, match="must both start at alpha = 0"):  # every point refused
        area_between(one_seed({"a": good, "b": path([1, 2], [np.nan, np.nan])}), "a", "b")
    with pytest.raises(ValueError, match="a has 2 paths and b 1: one a seed"):
        area_between({"a": [good, good], "b": [good]}, "a", "b")
    with pytest.raises(ValueError, match="a has 0 paths"):
        area_between({"a": [], "b": []}, "a", "b")
