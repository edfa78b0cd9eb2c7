"""Time and memory of the rules of singular values on one layer of a 7B model: 4096 x 14336, four tasks, float32.

    python -m experiments.bench.spectral                                  minutes each, on one thread
    python -m experiments.bench.spectral --part 2 tsv_m svc              of both sides a half: a fourth of the memory, an eighth of the time

Every rule is a process of its own that reads five files (of 235 MB) and writes one. Memory is the largest anonymous memory above that
of the process with torch imported; pages of the inputs, which the kernel can take back, are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, COLUMNS, TASKS = 4096, 14336, 4
CALLS = {"svc": {"method": "task_arithmetic", "after": ["svc"]}}  # else the name is the method's

PROGRAM = """
import json, sys, threading, time
import torch
from gradmatch import Task, merge
from gradmatch.merging import prepare
from gradmatch.plan.printed import peak_bytes
folder, call = sys.argv[1], json.loads(sys.argv[2])
files = [f"{folder}/{name}.safetensors" for name in ["base", *"0123"]]
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1e6 for line in status if line.startswith("RssAnon"))
def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.01)
torch.set_num_threads(1)
peaks, before = [], anonymous()
threading.Thread(target=watch, daemon=True).start()
start, cpu = time.perf_counter(), time.process_time()
merge(files[0], [Task(file) for file in files[1:]], out=f"{folder}/out", overwrite=True, **call)
told = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "gb": max(peaks) - before}
told["printed_gb"] = peak_bytes(prepare(files[0], [Task(file) for file in files[1:]], **call)) / 1e9
print(json.dumps(told))
"""


def make(folder: Path, rows: int, columns: int) -> None:
    """A base and fine-tunes of it whose task vectors share a part, with singular values that fall over four decades."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = 0.02 * drawn(rows, columns)
    save_file({"w": base}, folder / "base.safetensors")
    size = torch.logspace(0, -4, rows) / (rows * columns) ** 0.5
    shared = drawn(rows, rows)
    for task in range(TASKS):
        tau = ((shared + drawn(rows, rows)) * size) @ drawn(rows, columns)
        save_file({"w": base + tau}, folder / f"{task}.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Measure each and print one line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rules", nargs="*", default=["tsv_m", "iso_c", "iso_cts", "svc"])
    parser.add_argument("--part", type=int, default=1, help="divide both sides by this")
    args = parser.parse_args(argv)
    shape = ROWS // args.part, COLUMNS // args.part
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), *shape)
        for name in args.rules:
            call = CALLS.get(name, {"method": name})
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, place, json.dumps(call)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            told = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"rule": name, "shape": shape, **told}), flush=True)


if __name__ == "__main__":
    main()
