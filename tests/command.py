"""A command as it is typed in a terminal."""

import shlex

from gradmatch.cli import main


def run(line):
    """The exit code of `gradmatch LINE`."""
    return main(shlex.split(line))
