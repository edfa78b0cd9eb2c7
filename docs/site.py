"""What the documentation takes from the code when it is built: reference pages, examples, and the figures of the records."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "experiments/results"
GENERATED = {}  # page -> the function that writes what follows the page's own text


def page(name: str) -> Any:
    """Register a function that writes a page."""
    return lambda write: GENERATED.setdefault(name, write)


@page("reference/python.md")
def python() -> str:
    """Every public name of the package, from where it is defined."""
    import gradmatch
    from gradmatch import plots

    names = [f"{gradmatch.EXPORTS[name]}.{name}" for name in gradmatch.__all__]
    drawings = [f"gradmatch.plots.{name}" for name in plots.__all__]
    lines = [f"::: {name}\n" for name in names]
    return "\n".join([*lines, "# Drawings\n", *(f"::: {name}\n" for name in drawings)])


@page("reference/estimators.md")
def estimators() -> str:
    """The names of `gradmatch.estimators` that are not on the page before."""
    import gradmatch
    from gradmatch import estimators as package

    own = [name for name in package.__all__ if name not in gradmatch.__all__ or name == "estimate"]
    return "\n".join(f"::: {package._WHERE[name]}.{name}\n" for name in own)


@page("reference/commands.md")
def commands() -> str:
    """Every command and its flags, a table each."""
    from gradmatch.cli import COMMANDS, build_parser

    parser = build_parser([], whole=True)
    made = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = ["# Commands", "", f"{parser.description}", "", "```text", str(parser.epilog), "```", ""]
    for name, sub in made.choices.items():
        lines += [f"## gradmatch {name}", "", f"{COMMANDS[name][1][0].upper()}{COMMANDS[name][1][1:]}.", ""]
        lines += [*usage(sub), *flags(sub)]
        for action in sub._actions:
            if isinstance(action, argparse._SubParsersAction):
                for verb, own in action.choices.items():
                    lines += [f"### gradmatch {name} {verb}", "", str(own.description or ""), "", *flags(own)]
    return "\n".join(lines)


def usage(parser: argparse.ArgumentParser) -> list[str]:
    """The examples of a command."""
    told = (parser.epilog or "").strip()
    return ["```text", told, "```", ""] if told else []


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """A table of a parser's arguments."""
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(
            action, (argparse._HelpAction, argparse._SubParsersAction)
        ):
            continue
        name = (
            ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
        )
        value = "" if action.nargs == 0 or not action.option_strings else str(action.metavar or "")
        choices = ", ".join(map(str, action.choices)) if action.choices else value
        said = (action.help or "").replace("%%", "%")
        rows.append(f"| {name} | {f'`{cell(choices)}`' if choices else ''} | {cell(said)} |")
    return ["| argument | value | meaning |", "| --- | --- | --- |", *rows, ""] if rows else []


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("[", "\\[")


@page("reference/recipes.md")
def recipes() -> str:
    """Every key of a recipe, and every option of every rule with its range."""
    from gradmatch.recipes.schema import recipe_schema

    schema = recipe_schema()
    lines = [
        "# Recipes",
        "",
        "A recipe is a YAML file, `gradmatch merge recipe.yaml OUT`; paths are taken from its folder. `gradmatch schema` prints its JSON",
    ]
    lines += [
        "Schema, by which editors complete and check it; mergekit's recipes are understood as they are.",
        "",
    ]
    lines += ["| key | values | default |", "| --- | --- | --- |"]
    for name, told in schema["properties"].items():
        if name not in ("options", "method"):
            lines.append(f"| `{name}` | {cell(values(told))} | `{told.get('default', '')}` |")
    lines += [
        "",
        "An option is one value; or a list over the depth, from the first layer to the last; or values by pattern of the",
        'tensor\'s name: `{"*mlp*": 0.7, "*": 0.3}`.',
        "",
    ]
    lines += [
        "## Options by rule",
        "",
        "| method | option | values | default | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for branch in schema["allOf"]:
        method = branch["if"]["properties"]["method"]["const"]
        own = branch["then"]["properties"]["options"]["properties"]
        for name, told in own.items():
            lines.append(
                f"| `{method}` | `{name}` | {cell(values(told))} | `{told.get('default', '')}` | {cell(told.get('description', ''))} |"
            )
        if not own:
            lines.append(f"| `{method}` | | | | |")
    return "\n".join([*lines, ""])


def values(told: dict[str, Any]) -> str:
    """What a schema takes, in words."""
    if "enum" in told:
        return ", ".join(f"`{value}`" for value in told["enum"] if value is not None)
    if "anyOf" in told:
        parts = [values(one) for one in told["anyOf"] if "$ref" not in one and one.get("type") != "null"]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if "const" in told:
        return f"`{told['const']}`"
    low = told.get("minimum", told.get("exclusiveMinimum"))
    high = told.get("maximum", told.get("exclusiveMaximum"))
    kind = {"array": "list", "object": "table"}.get(str(told.get("type", "")), str(told.get("type", "")))
    if low is None and high is None:
        return kind
    left = "(" if "exclusiveMinimum" in told or low is None else "["
    right = ")" if "exclusiveMaximum" in told or high is None else "]"
    ends = ("-inf" if low is None else f"{low:g}", "inf" if high is None else f"{high:g}")
    return f"{kind} in {left}{ends[0]}, {ends[1]}{right}"


@page("reference/examples.md")
def examples() -> str:
    """The files of examples/, which the tests run."""
    lines = [
        "# Examples",
        "",
        "Each runs by itself in seconds, on tiny models that it makes: `python examples/NAME.py`. The test suite runs them all.",
        "",
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(text)) or ""
        lines += [f"## {path.stem}", "", said.splitlines()[0], "", "```python", text.strip(), "```", ""]
    return "\n".join(lines)


def figures() -> Iterator[Path]:
    """Figures and tables of the records, relative to the root."""
    for path in sorted((ROOT / RECORDS).rglob("*")):
        if path.suffix in (".png", ".md", ".jsonl"):
            yield path.relative_to(ROOT)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and the figures that pages show."""
    from mkdocs.structure.files import File

    for name in GENERATED:
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=""))
    for path in figures():
        target = str(path).replace(RECORDS, "records")
        files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What a page has of its own, and what is made; links to records and to the repository's files point into the site."""
    name = page.file.src_uri
    if name in GENERATED:
        markdown = f"{markdown}\n\n{GENERATED[name]()}"
    if name.startswith("records/"):
        return re.sub(r"\]\(\.\./[^)]*\)", "]", markdown)
    up = "../" * name.count("/")
    markdown = markdown.replace(f"](../{RECORDS})", f"]({up}records/README.md)")
    return markdown.replace(f"](../{RECORDS}", f"]({up}records")
