"""Folders of text files as sentiment corpora are given away: zip files of reviews, or a file a class with a text a line."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from experiments.tasks.sentiment import Example, clean

RATING = re.compile(r"\[([+-]\d)\]")
ENDINGS = {".neg": "0", ".pos": "1", ".0": "0", ".1": "1"}  # of files with a text a line


def of_folder(folder: Path) -> Iterator[Example]:
    """The examples of zip files with neg/ and pos/ or with rated sentences, and of files whose ending tells the class."""
    for file in sorted(folder.iterdir()):
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".txt"):
                        yield from _of_member(name, archive.read(name).decode("utf-8", errors="replace"))
        elif file.suffix in ENDINGS:
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")):
                yield Example(clean(line), ENDINGS[file.suffix], f"{file.name}/{number}")


def _of_member(name: str, text: str) -> Iterator[Example]:
    """A review in the folder of its class (Pang & Lee), or a product's sentences with their ratings (Hu & Liu)."""
    folder = Path(name).parent.name
    if folder in ("neg", "pos"):
        yield Example(clean(text), str(int(folder == "pos")), name)
        return
    review = 0
    for line in text.splitlines():
        review += line.startswith("[t]")
        rated, mark, sentence = line.partition("##")
        rating = sum(map(int, RATING.findall(rated)))
        if mark and rating:  # sentences with no opinion, or with opinions that cancel, are left out
            yield Example(clean(sentence), str(int(rating > 0)), f"{name}/{review}")
