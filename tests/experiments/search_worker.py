"""A worker of a shared study, for the tests: python search_worker.py URL SAMPLER TRIALS SEED SECONDS LOG."""

import sys
import time
from pathlib import Path

from experiments.search import run_trials

SPACE = {"x": {"values": [-2.0, -1.0, 0.5, 1.0, 3.0]}}


def main(url: str, sampler: str, trials: str, seed: str, seconds: str, log: str) -> None:
    def objective(chosen: dict[str, float]) -> float:
        with Path(log).open("a") as file:
            file.write(f"{chosen['x']}\n")
        time.sleep(float(seconds))
        return chosen["x"] ** 2

    run_trials(url, "shared", objective, SPACE, sampler, int(trials), int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
