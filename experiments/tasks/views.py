"""Stage: one split of prepared data, so that what reads one split does not depend on how large another is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import CARD, write_json
from experiments.tasks.sentiment import Example
from experiments.tasks.splits import MIN_PER_SPLIT, SPLITS, divided, limited, split_of


def view(out: Path, *, data: Path, split: str, sizes: Mapping[str, Mapping[str, Any]], seed: int) -> None:
    """`out/<domain>/<split>` of each domain, and `out/data.json` with the rows of each class.

    sizes: domain -> split -> rows, share or None, see `splits.divided`.
    """
    card = json.loads((data / CARD).read_text(encoding="utf-8"))
    for domain, own in card["domains"].items():
        rows = _load(data / domain)
        rows["labels"] = [own["classes"][number] for number in rows["labels"]]
        chosen = divisions(domain, rows, {split: sizes[domain]}, seed, packaged=own["packaged"])[split]
        own["counts"] = _counted([rows["labels"][row] for row in chosen], own["classes"])
        (out / domain).mkdir(parents=True)
        rows["save"](chosen, out / domain / split)
    write_json(out / CARD, card)


def divisions(
    domain: str, rows: Mapping[str, Any], sizes: Mapping[str, Any], seed: int, *, packaged: bool
) -> dict[str, list[int]]:
    """The numbers of the rows of each split that `sizes` names, in an order that the seed decides."""
    if not packaged:
        own = next(iter(sizes.values()))  # says all splits, and is the same for each
        return divided(domain, rows["labels"], rows["groups"], own, seed, rows["split"])
    counts = Counter(rows["split"])
    if min(counts[name] for name in SPLITS) < MIN_PER_SPLIT:
        few = min(SPLITS, key=lambda name: counts[name])
        raise ValueError(
            f"domain {domain!r} leaves {counts[few]} examples for {few}; {MIN_PER_SPLIT} are needed"
        )
    found = {}
    for split, limits in sizes.items():
        members = [row for row, name in enumerate(rows["split"]) if name == split]
        members.sort(key=lambda row: hashlib.sha256(f"{seed}/{rows['text'][row]}".encode()).digest())
        found[split] = limited(domain, members, split, limits.get(split))
    return found


def counts(
    domain: str,
    rows: Mapping[str, Any],
    classes: Sequence[str],
    sizes: Mapping[str, Any],
    seed: int,
    *,
    packaged: bool = False,
) -> dict[str, dict[str, int]]:
    """How many rows of each class every split will have: split -> class -> rows. For what is told before a run."""
    found = divisions(domain, rows, sizes, seed, packaged=packaged)
    return {split: _counted([rows["labels"][row] for row in found[split]], classes) for split in SPLITS}


def _counted(labels: Sequence[Any], classes: Sequence[str]) -> dict[str, int]:
    found = Counter(labels)
    return {name: found[name] for name in classes}


def rows_of(domain: str, examples: Sequence[Example], *, packaged: bool, seed: int) -> dict[str, Any]:
    """What decides the splits of examples, as `chosen_rows` takes it."""
    return {
        "labels": [example.label for example in examples],
        "groups": [example.document for example in examples],
        "split": [split_of(domain, e.document, seed) if packaged else e.split for e in examples],
        "text": [example.text for example in examples],
    }


def _load(folder: Path) -> dict[str, Any]:
    """Labels, groups and given splits of a domain's rows, and a function that saves some of them."""
    file = folder / "images.safetensors"
    if file.is_file():
        from safetensors.torch import load_file, save_file

        saved = load_file(file)
        labels = saved["labels"].tolist()
        groups = (folder / "groups.txt").read_text(encoding="utf-8").split()
        given = (folder / "splits.txt").read_text(encoding="utf-8").split()

        def save_images(rows: Sequence[int], path: Path) -> None:
            part = {name: saved[name][list(rows)].contiguous() for name in ("images", "labels")}
            save_file(part, path.with_suffix(".safetensors"))

        return {"labels": labels, "groups": groups, "split": given, "save": save_images}
    from datasets import disable_progress_bars, load_from_disk

    disable_progress_bars()
    table: Any = load_from_disk(str(folder))

    def save_texts(rows: Sequence[int], path: Path) -> None:
        table.select(list(rows)).remove_columns(["text", "split"]).save_to_disk(path)

    own = {"labels": table["labels"][:], "groups": table["document"][:], "split": table["split"][:]}
    return {**own, "text": table["text"][:], "save": save_texts}
