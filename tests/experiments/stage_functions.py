"""Small stages for the tests of the pipeline: each says in a log that it ran."""

import time
from pathlib import Path

from tqdm import tqdm


def count(out: Path, *, log: str, name: str, parent: Path | None = None, value: int = 0) -> None:
    """Write parent's number + value."""
    with Path(log).open("a") as file:
        file.write(name + "\n")
    before = int((parent / "number").read_text()) if parent else 0
    (out / "number").write_text(str(before + value))


def add(out: Path, *, parents: dict[str, Path], log: str) -> None:
    """Sum of the parents' numbers."""
    total = sum(int((folder / "number").read_text()) for folder in parents.values())
    count(out, log=log, name="add", value=total)


def fail(out: Path, **ignored: object) -> None:
    """Write half a result, then fail."""
    (out / "number").write_text("half")
    raise ArithmeticError("no number today")


def interrupt(out: Path, **ignored: object) -> None:
    """Write half a result, then be interrupted."""
    (out / "number").write_text("half")
    raise KeyboardInterrupt


def slow(out: Path, *, seconds: float, log: str, name: str) -> None:
    """Take a while."""
    with Path(log).open("a") as file:
        file.write(name + "\n")
    (out / "number").write_text("half")
    time.sleep(seconds)
    (out / "number").write_text("1")


def progress(out: Path, *, log: str, name: str) -> None:
    """Show a bar for a while."""
    for _ in tqdm(range(20)):
        time.sleep(0.05)
    count(out, log=log, name=name)


def wait(out: Path, *, stop: str, log: str, name: str) -> None:
    """Until there is a file `stop`."""
    with Path(log).open("a") as file:
        file.write(name + "\n")
    while not Path(stop).exists():
        time.sleep(0.1)
