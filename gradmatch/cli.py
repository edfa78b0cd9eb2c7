"""The `gradmatch` command. Each subcommand's work is imported when it is called, so that help answers at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# name -> (module, what it does in one line)
COMMANDS = {
    "estimate": (
        "gradmatch.commands.estimate",
        "estimate a model's curvature from data, into a file to merge with",
    ),
    "merge": ("gradmatch.commands.merge", "merge fine-tuned models, by a recipe or by flags"),
    "mix": ("gradmatch.commands.mix", "let models work side by side, with a router that decides"),
    "stack": ("gradmatch.commands.stack", "stack layers of models in depth, and train what was added"),
    "subtract": ("gradmatch.commands.subtract", "remove what a task taught a model (Eq. 13)"),
    "unmerge": ("gradmatch.commands.unmerge", "take a task out of a merge again, by the posterior beside it"),
    "align": ("gradmatch.commands.align", "bring a model of another beginning into a base's order of units"),
    "budget": (
        "gradmatch.commands.budget",
        "what removing a task will cost, and the largest weight within a budget",
    ),
    "diagnose": ("gradmatch.commands.diagnose", "find out why a merge failed, or whether it will"),
    "forecast": (
        "gradmatch.commands.forecast",
        "what a merge will cost each task, and the weights that cost least",
    ),
    "evaluate": ("gradmatch.commands.evaluate", "measure models before and after a merge, on each task"),
    "inspect": ("gradmatch.commands.inspect", "show what a checkpoint or curvature file holds"),
    "schema": ("gradmatch.commands.schema", "print the JSON Schema of recipes, for editors"),
    "completion": ("gradmatch.commands.completion", "print a script that completes commands in a shell"),
    "push": ("gradmatch.commands.push", "publish a model with its curvature and card on the hub"),
    "zoo": ("gradmatch.commands.zoo", "which of many models to merge, with what weights, for what price"),
}
EPILOG = """Results go to stdout, logs to stderr; every command takes --json, --quiet and --verbose (GRADMATCH_VERBOSITY=quiet|verbose).
Exit codes: 0 done, 1 the answer is no, 2 refused or failed, with what to do, 130 interrupted. `gradmatch COMMAND --help` explains a command."""


def build_parser(argv: Sequence[str], *, whole: bool = False) -> argparse.ArgumentParser:
    """The parser; only the subcommand that is called declares its arguments (`whole`: all of them)."""
    parser = argparse.ArgumentParser(
        prog="gradmatch",
        description="Merge fine-tuned networks by their uncertainty, find out why a merge failed, remove what a model should not know.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in argv if word in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        if find_spec(module) is None:
            continue
        sub = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if whole or name == called:
            from gradmatch.commands.everywhere import add_everywhere

            command = import_module(module)
            sub.epilog = getattr(command, "EXAMPLES", None)
            command.add_arguments(sub)
            add_everywhere(sub)
    return parser


class _Version(argparse.Action):
    """`--version`, looked up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"gradmatch {version('gradmatch')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 where the answer is no, 2 for an error that names what to do, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(argv).parse_args(argv)
    from gradmatch.commands.everywhere import as_json, told

    module = import_module(COMMANDS[args.command][0])
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, args)
        try:
            with as_json(args), told(args):
                code: int = module.run(args)
        except KeyboardInterrupt:
            print("gradmatch: interrupted; the same command continues where it stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:
            return 0
        except Exception as error:
            if args.debug:
                raise
            if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)):
                print(f"gradmatch: error: {_worded(error, args)}", file=sys.stderr)
            else:  # nothing that we raise to tell the user something
                print(f"gradmatch: error: {type(error).__name__}: {error}", file=sys.stderr)
                print(
                    "gradmatch: this is a fault of gradmatch; --debug shows where, please report it",
                    file=sys.stderr,
                )
            return 2
    return code


def _worded(message: Warning | BaseException | str, args: argparse.Namespace) -> str:
    """A message with the flags of the command that was called in place of Python's arguments."""
    from gradmatch.commands.wording import flags, in_flags

    parser = argparse.ArgumentParser()
    import_module(COMMANDS[args.command][0]).add_arguments(parser)
    recipe = Path(getattr(args, "recipe", None) or "")
    return in_flags(str(message), flags(parser), recipe.name if recipe.suffix in (".yaml", ".yml") else None)


def _show_warning(args: argparse.Namespace, message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the place in the code."""
    print(f"gradmatch: warning: {_worded(message, args)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
