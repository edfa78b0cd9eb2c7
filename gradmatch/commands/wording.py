"""Messages in the words of whoever reads them: arguments of Python come out as the command's flags and its recipe's keys."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

# name='value', name=True, name=0.5, name=... or name= alone; not within the words of a command line, as x,weight=1
ARGUMENT = re.compile(
    r"""(?<![\w.,'"`=-])(?P<name>[a-z][a-z0-9_]*)=(?:(?P<quote>['"])(?P<word>[\w.-]*)(?P=quote)|"""
    r"""(?P<plain>True|False|None|-?\d[\d.e+-]*\d|\d)|\.\.\.)?(?![\w='"{])"""
)
OTHERWISE = {"text": "text_column", "label": "label_column", "limit": "examples"}  # named otherwise in Python
PHRASES = {
    "Task(model, curvature=...)": "--task MODEL,curvature=FILE",
    "Task(..., name=...)": "--task MODEL,name=NAME",
}


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Argument of Python -> the flag that stands for it."""
    found = {action.dest: action for action in parser._actions if action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):  # the verbs of a command
            for verb in action.choices.values():
                found |= flags(verb)
    return found | {name: found[dest] for name, dest in OTHERWISE.items() if dest in found}


def in_flags(text: str, known: Mapping[str, argparse.Action], recipe: str | None = None) -> str:
    """A message with its arguments as flags; where a recipe was given, also as the recipe's keys.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--heads"), parser.add_argument("--allow-mismatch", action="store_true")
    >>> in_flags("choose heads='base', or pass allow_mismatch=True", flags(parser))
    'choose --heads base, or pass --allow-mismatch'
    >>> in_flags("choose heads='base'", flags(parser), "recipe.yaml")
    'choose --heads base (in recipe.yaml: `heads: base`)'
    """

    def replaced(found: re.Match[str]) -> str:
        action = known.get(found["name"])
        if action is None:
            return found[0]
        value = (found["word"] or found["plain"] or "").strip(".")
        name = next(option for option in action.option_strings if option.startswith("--"))
        flag = name if action.nargs == 0 or not value else f"{name} {value}"
        if recipe is None or not value or found["name"] in OTHERWISE:
            return flag
        return f"{flag} (in {recipe}: `{found['name']}: {value.lower() if found['plain'] else value}`)"

    for phrase, words in PHRASES.items():
        text = text.replace(phrase, words)
    return ARGUMENT.sub(replaced, text)
