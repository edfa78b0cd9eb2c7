"""Texts: read, cleaned, each kept once; rows split by count, share or document so that no group is on two sides."""

from collections import Counter

import pytest

from experiments.tasks.sentiment import Example, clean, fingerprint, read_vader, without_duplicates
from experiments.tasks.splits import SPLITS, divided, limited, split_of

AMAZON = "1_1\t-0.9\tno picture &amp; no  sound.\n1_2\t-0.15\tneutral\n2_1\t1.5\tGood\tbuy\n"


def test_reading_the_rated_texts(tmp_path):
    (tmp_path / "amazonReviewSnippets_GroundTruth.txt").write_text(AMAZON)
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text("7\t0.5\tfine\n8\t-0.49\tmeh\n")
    assert read_vader(tmp_path, "amazon") == [
        Example("no picture & no sound.", "0", "1"),
        Example("Good buy", "1", "2"),
    ]
    assert read_vader(tmp_path, "movies") == [Example("fine", "1", "7")]
    with pytest.raises(ValueError, match="no domain 'films' in this data; there are movies"):
        read_vader(tmp_path, "films")


def test_texts_that_differ_in_case_and_signs_are_one():
    assert clean(" a &lt;b&gt;\n c ") == "a <b> c"
    assert fingerprint("It's GREAT!") == fingerprint("its great")
    assert fingerprint(":)") != fingerprint(":(")


def test_duplicates_are_dropped_over_the_union_and_told():
    domains = {
        "a": [Example("One!", "1", "1"), Example("one", "1", "2"), Example("both", "0", "3")],
        "b": [Example("ONE", "1", "9"), Example("Both", "1", "9"), Example("two", "0", "9")],
    }
    notes = []
    assert without_duplicates(domains, notes) == {"a": domains["a"][:1], "b": domains["b"][2:]}
    assert notes[0] == "a: 1 rows that stand elsewhere too are left out"
    assert "b: 1 rows with two labels are left out" in notes
    tested = {"a": [Example("x", "1", "1"), Example("X", "1", "2", split="test")]}
    assert without_duplicates(tested)["a"] == tested["a"][1:]  # what is tested on stays
    pairs = {"a": [Example("x", "1", "1", "y"), Example("x", "1", "2", "z")]}
    assert without_duplicates(pairs) == pairs


def test_a_packaged_document_has_one_split_and_shares_are_as_stated():
    found = Counter(split_of("a", str(i), 0) for i in range(5000))
    assert [found[split] / 5000 for split in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert Counter(split_of("a", str(i), 0) == split_of("a", str(i), 1) for i in range(1000))[False] > 200
    assert limited("a", range(30), "train", 50) == list(range(30))  # at most
    assert limited("a", range(30), "test", 20) == list(range(20))


LABELS = [("bad", "fine", "good")[i % 3 if i % 7 else 0] for i in range(510)]  # of unequal size
ALONE = [str(i) for i in range(510)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (357, 51, 102)),
        ({"validation": 60, "test": 150}, (300, 60, 150)),
        ({"validation": 0.2, "test": 0.3}, (255, 102, 153)),
        ({"train": 100, "validation": 60, "test": 150}, (100, 60, 150)),
        ({"train": 5000, "validation": 11, "test": 13}, (486, 11, 13)),
    ],
)
def test_rows_are_split_by_count_and_share_with_the_classes_in_proportion(sizes, expected):
    found = divided("shop", LABELS, ALONE, sizes, 0)
    assert tuple(len(found[split]) for split in SPLITS) == expected
    assert len(set().union(*found.values())) == sum(expected)
    whole = Counter(LABELS)
    for rows in found.values():
        counts = Counter(LABELS[row] for row in rows)
        for name in whole:
            assert abs(counts[name] - whole[name] * len(rows) / 510) < 2
    assert divided("shop", LABELS, ALONE, sizes, 0) == found
    assert divided("shop", LABELS, ALONE, sizes, 1)["test"] != found["test"]


@pytest.mark.parametrize("sizes", [{}, {"validation": 60, "test": 150}])
def test_groups_stay_on_one_side(sizes):
    groups = [str(i // 4) for i in range(510)]
    found = divided("shop", LABELS, groups, sizes, 0)
    sides = [{groups[row] for row in found[split]} for split in SPLITS]
    assert sum(map(len, sides)) == len(set().union(*sides))
    if sizes:
        assert [len(found[split]) for split in ("validation", "test")] == [60, 150]


def test_given_splits_stay_what_they_are():
    given = ["test"] * 100 + ["train"] * 410
    found = divided("shop", LABELS, ALONE, {}, 0, given)
    assert set(found["test"]) == set(range(100))
    assert len(found["validation"]) == 41
    fewer = divided("shop", LABELS, ALONE, {"test": 30}, 0, given)
    assert len(fewer["test"]) == 30
    assert set(fewer["train"]) == set(found["train"])  # a smaller test changes nothing else


def apart(count, whole=510):
    return ["test"] * count + ["train"] * (whole - count)


NEW_CLASS = ["c", "a"] * 10 + ["a", "b"] * 100
REFUSED = [  # labels, given splits, sizes, what is said
    (LABELS, (), {"test": 600}, "data.test asks for 600 rows, and 510 of 510 are left: ask for fewer"),
    (LABELS, (), {"test": 500}, "asks for 51 rows, and 10 of 510 are left|leaves"),
    (LABELS[:25], (), {}, "shop leaves 5 rows for train; at least 10 are needed"),
    (["a"] * 20 + ["a", "b"] * 50, apart(20, 120), {}, "all 20 test rows are of one class, 'a'"),
    (NEW_CLASS, apart(20, 220), {}, "test rows have the class 'c', which none"),
    (LABELS, apart(9), {}, "leaves 9 rows for test"),
    (LABELS, apart(90), {"test": 0.5}, "given apart, so data.test is a number of them"),
    (LABELS, apart(90), {"test": 100}, "data.test asks for 100 rows, and 90 of 90 are left"),
]


@pytest.mark.parametrize(("labels", "given", "sizes", "message"), REFUSED)
def test_what_cannot_be_split_is_refused(labels, given, sizes, message):
    with pytest.raises(ValueError, match=message):
        divided("shop", labels, [str(i) for i in range(len(labels))], sizes, 0, given)


@pytest.mark.parametrize(
    ("size", "message"), [(40, "a has 30 test rows, and data.test asks for 40"), (0.5, "not the share 0.5")]
)
def test_packaged_rows_meet_a_count_or_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        limited("a", range(30), "test", size)
