"""What a config says of a merge: names of options that nobody knows, rules that a study does not serve."""

import pytest

from experiments.options import check_names, check_rule


def test_known_names_pass():
    check_names("dare", {"density": 0.5, "scale": 1.0}, ["base_weight", "alpha", "seed"])
    check_names("averaging", {"transforms": ["dare", {"breadcrumbs": {}}], "density": 0.5, "gamma": 0.1})
    check_names("averaging", {"transforms": "ties", "trim": "global"})
    check_names("averaging", {"after": ["svc", {"lines": {}}], "least": 1.0, "beta": 0.5})
    check_names("no such method", {"x": 1})  # which is said elsewhere


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("task_arithmetic", {"base_wieght": 1}, r"no option 'base_wieght' \(did you mean 'base_weight'"),
        (
            "averaging",
            {"delta": 1},
            r"no option 'delta' \(did you mean 'delta0'.*it takes none of its own, and",
        ),
        ("task_arithmetic", {"scal": 1}, r"'scal' \(did you mean 'scale'.*it takes normalize, scale, and"),
        ("averaging", {"density": 1}, "averaging has no option 'density'"),
        ("averaging", {"method": "ties"}, "averaging has no option 'method'"),
        ("averaging", {"after": [5]}, r"after: each is a name or \{name: options\}, not 5"),
        ("averaging", {"transforms": [5]}, r"transforms: each is a name or \{name: options\}, not 5"),
    ],
)
def test_unknown_names(method, options, message):
    with pytest.raises(ValueError, match=message):
        check_names(method, options)


def test_what_the_config_does_not_take():
    with pytest.raises(ValueError, match="no option 'alpha'"):
        check_names("removal", {"alpha": 1}, also=())


def test_rules_that_a_study_does_not_serve():
    check_rule("merge 'R'", "regmean", 3, lacking=("factors",))
    with pytest.raises(ValueError, match="merge 'S': slerp takes 2 to 2 models, but there are 3 tasks"):
        check_rule("merge 'S'", "slerp", 3, lacking=())
    with pytest.raises(ValueError, match="merge 'R': regmean needs Gram matrices, which this study does not"):
        check_rule("merge 'R'", "regmean", 3, lacking=("gram",))
