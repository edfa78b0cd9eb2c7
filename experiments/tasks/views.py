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
from experiments.tasks.splits import SPLITS, divided, limited, split_of


def view(out: Path, *, data: Path, split: str, sizes: Mapping[str, Mapping[str, Any]], seed: int) -> None:
    """`out/<domain>/<split>` of each domain, and `out/data.json` with the rows of each class.

    sizes: domain -> split -> rows, share or None, see `splits.divided`.
    """
    card = json.loads((data / CARD).read_text(encoding="utf-8"))
    for domain, own in card["domains"].items():
        rows = _load(data / domain)
        rows["labels"] = [own["classes"][number] for number in rows["labels"]]
        chosen = chosen_rows(domain, rows, split, sizes[domain], seed, packaged=own["packaged"])
        counts = Counter(rows["labels"][row] for row in chosen)
        own["counts"] = {name: counts[name] for name in own["classes"]}
        (out / domain).mkdir(parents=True)
        rows["save"](chosen, out / domain / split)
    write_json(out / CARD, card)


def chosen_rows(
    domain: str, rows: Mapping[str, Any], split: str, sizes: Mapping[str, Any], seed: int, *, packaged: bool
) -> list[int]:
    """The numbers of a split's rows, in an order that the seed decides."""
    if not packaged:
        return divided(domain, rows["labels"], rows["groups"], sizes, seed, rows["split"])[split]
    own = [row for row, name in enumerate(rows["split"]) if name == split]
    own.sort(key=lambda row: hashlib.sha256(f"{seed}/{rows['text'][row]}".encode()).digest())
    counts = Counter(rows["split"])
    if min(counts[name] for name in SPLITS) < 10:
        few = min(SPLITS, key=lambda name: counts[name])
        raise ValueError(f"domain {domain!r} leaves {counts[few]} examples for {few}; 10 are needed")
    return limited(domain, own, split, sizes.get(split))


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
