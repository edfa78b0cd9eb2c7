"""`gradmatch completion`: a script that completes commands, flags and files in a shell."""

from __future__ import annotations

import argparse

from gradmatch.estimators.errors import GradmatchError

EXAMPLES = """
examples:
  gradmatch completion bash > ~/.local/share/bash-completion/completions/gradmatch
  gradmatch completion zsh > ~/.zfunc/_gradmatch          with ~/.zfunc in fpath before compinit

It is made by shtab: pip install "gradmatch[completion]".
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="of the script")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise GradmatchError(
            'shtab is not installed, which writes such scripts: pip install "gradmatch[completion]"',
            "bad_arguments",
        ) from error
    from gradmatch.cli import build_parser

    parser = build_parser([], whole=True)
    for command in commands(parser):
        for action in command._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.shell))
    return 0


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and all those of its commands and their verbs."""
    below = [
        own
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for sub in action.choices.values()
        for own in commands(sub)
    ]
    return [parser, *below]
