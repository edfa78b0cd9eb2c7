"""Which rows are trained on, chosen on and tested on: by a seed, so that neither a row nor a group is on two sides.

Two rules. Packaged texts are split by a hash of their document, which depends on no other document: the same for everybody. One's
own rows are split by count or share, with the classes in proportion; groups stay whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
MIN_PER_SPLIT = 10


def _size(size: float) -> float:
    if size >= 1 and float(size).is_integer():
        return int(size)
    if 0 < size < 1:
        return size
    raise ValueError(f"is a number of rows (a whole number of at least 1) or a share below 1, not {size:g}")


Size = Annotated[
    int | float, AfterValidator(_size)
]  # rows, or below 1 a share of them; a whole number stays one in a digest
Sizes = Mapping[str, "float | None"]  # of each split


def position(domain: str, document: str, seed: int) -> float:
    """A number in [0, 1) by which documents are put in order; it does not depend on other documents."""
    digest = hashlib.sha256(f"{seed}/{domain}/{document}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(domain: str, document: str, seed: int) -> str:
    """The split of a packaged document."""
    where = position(domain, document, seed)
    train = SHARES["train"]
    return "train" if where < train else "validation" if where < train + SHARES["validation"] else "test"


def divided(
    domain: str,
    labels: Sequence[Any],
    groups: Sequence[str],
    sizes: Sizes,
    seed: int,
    given: Sequence[str] = (),
) -> dict[str, list[int]]:
    """Row numbers of each split of one's own rows.

    Args:
        domain: how errors call them.
        labels: the class of each row.
        groups: what each row is a part of; no group is in two splits.
        sizes: rows of a split (exactly so many; of train at most), a share, or None: of validation a tenth and of test a fifth
            (and ten at least), of train the rest. Rows that complete a group beyond a number are left out.
        seed: of the order.
        given: the split that a row was given in ("train" is divided further), where some have a file of their own.

    Raises:
        ValueError: fewer rows than asked for or than a split needs, or a class that is tested and never trained on.
    """
    given = given or ["train"] * len(labels)
    found: dict[str, list[int]] = {}
    rest = [row for row, split in enumerate(given) if split == "train"]
    strata = _strata(domain, labels, groups, rest, seed)
    for split in ("test", "validation"):
        own = [row for row, name in enumerate(given) if name == split]
        size = sizes.get(split)
        if not own:
            share = SHARES[split] if SHARES[split] * len(rest) >= MIN_PER_SPLIT else MIN_PER_SPLIT
            found[split] = _taken(domain, split, strata, share if size is None else size, len(rest))
        elif size is None:
            found[split] = own
        elif size < 1:
            raise ValueError(
                f"{domain}: its {split} rows are given apart, so data.{split} is a number of them, not the share {size:g}"
            )
        else:
            found[split] = _taken(
                domain, split, _strata(domain, labels, groups, own, seed), size, len(own), last=False
            )
    size = sizes.get("train")
    kept = [row for groups_ in strata.values() for group in groups_ for row in group]
    if size is not None:
        count = int(size) if size >= 1 else round(size * len(rest))
        kept = _taken(domain, "train", strata, min(count, len(kept)), len(rest), last=False)
    found["train"] = kept
    check(domain, {split: [labels[row] for row in rows] for split, rows in found.items()})
    return {
        split: sorted(rows, key=lambda row: position(domain, f"{groups[row]}/{row}", seed))
        for split, rows in found.items()
    }


def check(domain: str, labels: Mapping[str, Sequence[Any]]) -> None:
    """Refuse splits that are too small, of one class, or that test a class which is never trained on.

    Rows that have no classes at all, as texts of a language model, have one and the same everywhere.

    Raises:
        ValueError: any of these.
    """
    every = {label for own in labels.values() for label in own}
    for split, own in labels.items():
        if len(own) < MIN_PER_SPLIT:
            raise ValueError(
                f"{domain} leaves {len(own)} rows for {split}; at least {MIN_PER_SPLIT} are needed: ask for others by "
                f"data.train, data.validation and data.test, or add rows or groups"
            )
        if len(set(own)) < 2 and len(every) > 1:
            raise ValueError(f"{domain}: all {len(own)} {split} rows are of one class, {own[0]!r}")
    for split in ("validation", "test"):
        strange = sorted(set(map(str, labels[split])) - set(map(str, labels["train"])))
        if strange:
            raise ValueError(
                f"{domain}: {split} rows have the class {strange[0]!r}, which none of the {len(labels['train'])} training rows has"
            )


def limited(domain: str, rows: Sequence[int], split: str, size: float | None) -> list[int]:
    """The first rows of a packaged split; exactly so many of validation and test.

    Raises:
        ValueError: there are fewer, or a share is asked for.
    """
    if size is None:
        return list(rows)
    if size < 1:
        raise ValueError(
            f"{domain}: packaged texts are split {', '.join(f'{name} {part:g}' for name, part in SHARES.items())}; "
            f"data.{split} is a number of rows, not the share {size:g}"
        )
    if split != "train" and len(rows) < size:
        raise ValueError(f"{domain} has {len(rows)} {split} rows, and data.{split} asks for {size:g}")
    return list(rows[: int(size)])


def _strata(
    domain: str, labels: Sequence[Any], groups: Sequence[str], rows: Iterable[int], seed: int
) -> dict[str, list[list[int]]]:
    """Most frequent class -> the rows of each group, in the seed's order."""
    members: dict[str, list[int]] = {}
    for row in rows:
        members.setdefault(groups[row], []).append(row)
    strata: dict[str, list[list[int]]] = {}
    for group in sorted(members, key=lambda group: position(domain, group, seed)):
        counts = Counter(str(labels[row]) for row in members[group])
        most = max(sorted(counts), key=lambda name: counts[name])
        strata.setdefault(most, []).append(members[group])
    return {name: strata[name] for name in sorted(strata)}


def _taken(
    domain: str, split: str, strata: dict[str, list[list[int]]], size: float, total: int, *, last: bool = True
) -> list[int]:
    """Take a split's rows out of the strata, from their ends (or starts), each stratum in proportion to its rows."""
    exact = size >= 1
    count = int(size) if exact else round(size * total)
    here = {name: sum(map(len, groups)) for name, groups in strata.items()}
    left = sum(here.values())
    if count > left:
        raise ValueError(
            f"{domain}: data.{split} asks for {count} rows, and {left} of {total} are left: ask for fewer"
        )
    quotas = {name: count * own / left for name, own in here.items()} if left else {}
    whole = {name: int(quota) for name, quota in quotas.items()}
    for name in sorted(quotas, key=lambda name: whole[name] - quotas[name])[: count - sum(whole.values())]:
        whole[name] += 1  # the largest remainders
    taken: list[int] = []
    for name, quota in whole.items():
        rows: list[int] = []
        while len(rows) < quota:
            rows += strata[name].pop(-1 if last else 0)
        taken += rows[:quota] if exact else rows
    return taken
