"""A flag for every option of every rule and transform, from what the options say of themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import RULES, Rule
from gradmatch.rules.after import AFTER, After
from gradmatch.rules.edits import TRANSFORMS, Transform

PREFIX = "option "  # of the names under which argparse keeps the values


def add_options(parser: argparse.ArgumentParser, rules: Iterable[Rule] | None = None) -> None:
    """Declare the options of some rules (None: all) and of the transforms, but for flags that the command has already."""
    group = parser.add_argument_group(
        "options of the method and the transforms",
        "each a value, a list over the depth such as '[0.2, 0.8]', or values by name such as '{\"*mlp*\": 0.7, \"*\": 0.3}'",
    )
    chosen = RULES.values() if rules is None else list(rules)
    owners: dict[str, Rule | Transform | After] = {
        name: rule for name, rule in RULES.items() if rule in chosen
    }
    told: dict[str, dict[str, list[str]]] = {}
    for owner, part in (owners | TRANSFORMS | AFTER).items():
        for one in fields(part.options):
            if one.metadata["flag"]:
                said = one.metadata["help"] + (
                    f" (default {_spelt(one.default)})" if one.default is not None else ""
                )
                told.setdefault(one.name, {}).setdefault(said, []).append(owner)
    for name, helps in told.items():
        text = "; ".join(f"{', '.join(names)}: {said}" for said, names in helps.items())
        try:
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=PREFIX + name,
                metavar="VALUE",
                help=text.replace("%", "%%"),
            )
        except argparse.ArgumentError:  # --seed, or a flag that takes its place
            continue


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given by flags or as --option KEY=VALUE.

    Raises:
        ValueError: an --option without a value, or a value that is not YAML.
    """
    from gradmatch.common.yamltext import load_yaml

    found = {
        name.removeprefix(PREFIX): load_yaml(
            value, f"--{name.removeprefix(PREFIX).replace('_', '-')} {value!r}"
        )
        for name, value in vars(args).items()
        if name.startswith(PREFIX) and value is not None
    }
    for text in args.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise GradmatchError(f"--option {text!r} is not KEY=VALUE", "bad_arguments", text)
        found[key] = load_yaml(value, f"--option {text!r}")
    return found


def _spelt(default: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
