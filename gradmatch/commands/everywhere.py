"""What every command has: --json, --quiet and --verbose, and the environment variable that stands for the latter two."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.progress import VARIABLE, verbosity

# for libraries that are not imported yet; those that are have been told otherwise
SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def add_everywhere(parser: argparse.ArgumentParser) -> None:
    """Declare what a command has not declared by itself. Commands with verbs of their own declare it for each verb."""
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        return
    group = parser.add_argument_group("what is told")
    for flag, text in (
        ("--json", "print the result as one JSON object on stdout; everything else goes to stderr"),
        ("--quiet", "results, warnings and errors alone"),
        ("--verbose", "every log line"),
    ):
        with contextlib.suppress(argparse.ArgumentError):
            group.add_argument(flag, action="store_true", help=text, dest=_AS.get(flag, flag[2:]))


_AS = {"--json": "json_result"}


@contextlib.contextmanager
def told(args: argparse.Namespace) -> Iterator[None]:
    """Logs and libraries as loud as asked, by flag or by variable, for as long as a command runs.

    Raises:
        ValueError: a level that is none, or two of them.
    """
    quiet, verbose = getattr(args, "quiet", False), getattr(args, "verbose", False)
    if quiet and verbose:
        raise GradmatchError("--quiet and --verbose do not go together", "bad_arguments")
    level = "quiet" if quiet else "verbose" if verbose else verbosity()
    args.quiet = level == "quiet"
    wanted = {VARIABLE: level, **(SILENT if level == "quiet" else {})}
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("gradmatch")
    threshold, handler = logger.level, logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    os.environ.update(wanted)
    logger.setLevel({"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}[level])
    alone = not logging.getLogger().handlers and not logger.handlers
    if alone:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(threshold)
        if alone:
            logger.removeHandler(handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def as_json(args: argparse.Namespace) -> Iterator[None]:
    """With --json, what a command prints goes to stderr, and `args.result` to stdout at its end.

    A command that keeps no result gives the lines that it printed, as {"lines": [...]}. An error is an object too.
    """
    if not getattr(args, "json_result", False):
        yield
        return
    out, lines = sys.stdout, io.StringIO()
    try:
        with contextlib.redirect_stdout(lines):
            yield
    except Exception as error:
        print(json.dumps({"error": problem(error)}, indent=1), file=out)
        raise
    result = getattr(args, "result", None)
    if result is None:
        result = {"lines": lines.getvalue().splitlines()}
    elif not args.quiet:
        sys.stderr.write(lines.getvalue())
    print(json.dumps(plain(result), indent=1, default=str, allow_nan=False), file=out)


def problem(error: BaseException) -> dict[str, str]:
    """An error as values: its message, and of our own the code, the place and the remedy."""
    return {
        "kind": type(error).__name__,
        "message": getattr(error, "message", None) or str(error),
        **{key: getattr(error, key, "") for key in ("code", "where", "remedy")},
    }


def plain(value: Any) -> Any:
    """Values as JSON has them: numbers that it cannot spell are null, keys are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
