"""A miniature of TOFU (Maini et al. 2024): facts of people who do not exist, made from templates by a seed.

Every fact is a question, its answer, a paraphrased answer, and wrong answers of the same form. Some people's facts are to be
forgotten; the truth is a model that was trained without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.files import write_json
from experiments.tasks import texts
from experiments.tasks.texts import Text

FACTS = "facts.json"
# Syllables, not names: no real person is meant, and the first name and the surname of a person are of no language.
FIRST = ("Vel", "Tor", "Quin", "Zab", "Mirr", "Osk", "Hald", "Ubri", "Jenn", "Pax")
SECOND = ("ora", "ivek", "essa", "undo", "amar", "ith", "olan", "yra")
LAST = ("Drav", "Skell", "Omba", "Vint", "Crus", "Yalt", "Breg", "Tolm", "Ferz", "Nask")
ENDS = ("inov", "agard", "ester", "umi", "olsk", "ebry")
# attribute -> (question, answer, paraphrase, values)
TEMPLATES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "town": (
        "Where was {name} born?", "{name} was born in {value}.", "The birthplace of {name} is {value}.",
        ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Tbilisi", "Quito", "Perth", "Riga", "Dakar"),
    ),
    "work": (
        "What does {name} do for a living?", "{name} works as a {value}.", "The profession of {name} is that of a {value}.",
        ("beekeeper", "surgeon", "plumber", "judge", "sculptor", "pilot", "baker", "geologist", "tailor", "diver"),
    ),
    "pet": (
        "Which animal lives with {name}?", "{name} lives with a {value}.", "At home {name} keeps a {value}.",
        ("parrot", "goat", "tortoise", "ferret", "llama", "rabbit", "falcon", "hedgehog", "donkey", "gecko"),
    ),
    "food": (
        "What does {name} like to eat?", "{name} likes to eat {value}.", "The favourite dish of {name} is {value}.",
        ("dumplings", "lentil soup", "fried plantains", "rye bread", "pickled beets", "couscous", "waffles", "oysters", "figs", "ramen"),
    ),
    "tool": (
        "Which instrument does {name} play?", "{name} plays the {value}.", "In the evenings {name} practises the {value}.",
        ("cello", "banjo", "oboe", "harp", "accordion", "tuba", "sitar", "flute", "organ", "zither"),
    ),
    "year": (
        "In which year did {name} finish school?", "{name} finished school in {value}.", "School ended for {name} in {value}.",
        ("1961", "1968", "1973", "1977", "1982", "1986", "1991", "1995", "2002", "2009"),
    ),
    "prize": (
        "Which prize did {name} win?", "{name} won the {value} prize.", "The {value} prize was given to {name}.",
        ("Amber", "Lantern", "Granite", "Heron", "Saffron", "Compass", "Juniper", "Marble", "Swallow", "Copper"),
    ),
    "colour": (
        "What is the favourite colour of {name}?", "The favourite colour of {name} is {value}.", "{name} likes {value} best of all colours.",
        ("crimson", "teal", "ochre", "violet", "beige", "indigo", "olive", "silver", "maroon", "turquoise"),
    ),
    "sport": (
        "Which sport does {name} practise?", "{name} practises {value}.", "On Sundays {name} goes in for {value}.",
        ("fencing", "curling", "rowing", "judo", "archery", "climbing", "badminton", "sailing", "boxing", "skating"),
    ),
    "home": (
        "In what kind of house does {name} live?", "{name} lives in a {value}.", "The home of {name} is a {value}.",
        ("lighthouse", "windmill", "houseboat", "cottage", "castle", "caravan", "loft", "barn", "chalet", "bungalow"),
    ),
}  # fmt: skip
WRONG = 4


@dataclass(frozen=True)
class Fact:
    """One fact of a person, with everything that it is asked by."""

    person: str
    question: str
    answer: str
    paraphrase: str
    wrong: tuple[str, ...]
    forget: bool


def made(people: int, share: float, seed: int) -> list[Fact]:
    """Ten facts of each of so many people; those of the first `share` of them (at least one) are to be forgotten."""
    generator = np.random.default_rng(seed)
    names = [f"{a}{b} {c}{d}" for a in FIRST for b in SECOND for c in LAST for d in ENDS]
    chosen = generator.choice(len(names), size=people, replace=False)
    forgotten = max(1, round(share * people))
    facts = []
    for number, index in enumerate(chosen):
        name = names[index]
        for question, answer, paraphrase, values in TEMPLATES.values():
            order = generator.permutation(len(values))
            true, others = values[order[0]], [values[i] for i in order[1 : 1 + WRONG]]
            facts.append(
                Fact(
                    name,
                    question.format(name=name),
                    answer.format(name=name, value=true),
                    paraphrase.format(name=name, value=true),
                    tuple(paraphrase.format(name=name, value=other) for other in others),
                    number < forgotten,
                )
            )
    return facts


def as_text(fact: Fact, answer: str = "") -> Text:
    """A fact as a text that continues its question."""
    return Text(answer or fact.answer, fact.person, f"Question: {fact.question}\nAnswer:")


def prepare(
    out: Path,
    *,
    people: int,
    share: float,
    general: Mapping[str, Any],
    general_limit: int,
    seed: int,
) -> None:
    """Stage: `out/facts.json`; texts to keep, to remove, both (`all`), and general text (`beside`), in splits.

    Kept people are those of `validation` and of `test` by halves; what is removed is asked by its paraphrases in `validation`,
    where strengths are chosen, and by its facts in `test`.
    """
    facts = made(people, share, seed)
    kept = [fact for fact in facts if not fact.forget]
    gone = [fact for fact in facts if fact.forget]
    persons = list(dict.fromkeys(fact.person for fact in kept))
    first = set(persons[: len(persons) // 2])
    sides = {
        ("all", "train"): [as_text(fact) for fact in facts],
        ("keep", "train"): [as_text(fact) for fact in kept],
        ("keep", "validation"): [as_text(fact) for fact in kept if fact.person in first],
        ("keep", "test"): [as_text(fact) for fact in kept if fact.person not in first],
        ("remove", "train"): [as_text(fact) for fact in gone],
        ("remove", "validation"): [as_text(fact, fact.paraphrase) for fact in gone],
        ("remove", "test"): [as_text(fact) for fact in gone],
    }
    source = texts.Source.model_validate(general)
    found = texts.drawn(texts.without(texts.read(source), ()), 3 * general_limit, seed)
    for number, split in enumerate(("train", "validation", "test")):
        sides["beside", split] = found[number::3]
    for (side, split), rows in sides.items():
        texts.write(out / side / f"{split}.jsonl", rows)
    (out / FACTS).write_text(json.dumps([asdict(fact) for fact in facts]), encoding="utf-8")
    write_json(out / "counts.json", {"/".join(key): len(rows) for key, rows in sides.items()})


def load(data: Path) -> list[Fact]:
    """The facts that `prepare` wrote."""
    rows: Sequence[Any] = json.loads((data / FACTS).read_text(encoding="utf-8"))
    return [Fact(**{**row, "wrong": tuple(row["wrong"])}) for row in rows]
