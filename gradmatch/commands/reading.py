"""How commands read data: the same options in each of them, and what was read is said."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from gradmatch.estimators.errors import GradmatchError

LEAST = {"examples": 1, "batch_size": 1, "max_length": 2}


def add_reading(parser: Any, *, examples: int | None, max_length: int | None = None, more: str = "") -> None:
    """Declare the options of reading data, with a command's defaults.

    Args:
        parser: or a group of it.
        examples: drawn of each source; None: all.
        max_length: tokens a text; None: what the model takes, at most 512.
        more: on the size of a batch.
    """
    parser.add_argument(
        "--text-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of the texts, twice (or A,B) for pairs (default: a known pair, else text, sentence, review, ...)",
    )
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: label, ...)")
    parser.add_argument("--split", default="train", help="of a folder or hub set (default: train)")
    parser.add_argument(
        "--examples",
        "--limit",
        type=int,
        default=examples,
        metavar="N",
        help=f"so many of each source, drawn at random (default: {examples or 'all'})",
    )
    parser.add_argument(
        "--batch-size", type=int, help=f"examples a batch, a matter of memory and speed{more} (default 8)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=max_length,
        help=f"tokens of each text, at most what the model takes (default {max_length or 512})",
    )


def check_reading(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, before anything is opened.

    Raises:
        ValueError: such a number.
    """
    for option, least in LEAST.items():
        value = getattr(args, option)
        if value is not None and value < least:
            raise GradmatchError(
                f"--{option.replace('_', '-')} must be at least {least}, got {value}", "out_of_range"
            )


def read_source(args: argparse.Namespace, source: str, model: Any, whose: str = "", **options: Any) -> Any:
    """Batches of one source by a command's options; its columns are said on stderr, unless that shall be quiet.

    `whose` is the task that the data are of; a column may be meant for it alone: --text-column amazon=review.
    """
    from gradmatch.measure.data import read

    text = [name for given in _of_task(args.text_column, whose) for name in given.split(",")]
    label = _of_task([args.label_column] if args.label_column else [], whose)
    options |= {"text": text, "label": label[0] if label else None, "split": args.split}
    options |= {"limit": args.examples, "seed": args.seed or 0, "max_length": args.max_length}
    batches = read(source, model, batch_size=args.batch_size or 8, **options)
    if not getattr(args, "quiet", False):
        say(batches, sys.stderr)
    return batches


def say(batches: Any, out: TextIO) -> None:
    """What was read: the columns, and rows that were left out."""
    for note in getattr(batches, "notes", ()):
        print(note, file=out, flush=True)


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Progress bars of transformers, shown or not."""
    from transformers.utils import logging

    known = logging.is_progress_bar_enabled()
    logging.enable_progress_bar() if shown else logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar() if known else logging.disable_progress_bar()


def _of_task(given: list[str], task: str) -> list[str]:
    """What is given as TASK=NAME for this task, else what is given for all."""
    own = [text.partition("=")[2] for text in given if task and text.startswith(f"{task}=")]
    return own or [text for text in given if "=" not in text]
