"""`gradmatch schema`: the JSON Schema of recipes, for editors and programs."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """
example:
  gradmatch schema -o recipe.schema.json

Editors that know YAML schemas complete and check a recipe whose first line is
# yaml-language-server: $schema=recipe.schema.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch schema`."""
    parser.add_argument("-o", "--out", metavar="FILE", help="write it there instead of printing it")


def run(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    from gradmatch.estimators.files import write_atomically
    from gradmatch.recipes.schema import recipe_schema

    args.result = recipe_schema()
    text = json.dumps(args.result, indent=1)
    if args.out:
        write_atomically(args.out, text + "\n")
        print(f"written: {args.out}")
    else:
        print(text)
    return 0
