"""Time and memory of merging, side by side with plain file copies (the floor) and, where it is there, mergekit.

    make bench-merge                                     everything (25 GB of disk, 20 minutes; without mergekit 15)
    python -m experiments.bench.merge --parts warm       one table: warm, cold, growth (30M / 125M / 500M, 2 / 4 / 8 models)
    python -m experiments.bench.merge --mergekit PATH    PATH: the mergekit-yaml command of another environment

Every measurement is a process of its own; contenders alternate, and medians over the repeats are printed. *engine* is the
call of `merge` in a process that has imported torch already, *torch* the same without the compiled extension
(GRADMATCH_KERNEL=0), *command* the whole `gradmatch merge` from start to exit. The floor reads every input once and writes
the output once by plain file copies, synced to disk as ours is. *cold* means that the inputs' pages were dropped from the
page cache before. Anonymous memory of *engine* and *torch* is counted above the process with torch imported, of whole commands
it is all of it; mapped pages of the inputs, which the kernel can take back, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from experiments.bench.llamas import SIZES, generate

Measured = tuple[float, float, float, float]  # seconds, CPU seconds, peak anonymous MB, peak mapped MB
METHODS = ("task_arithmetic", "ties", "gradient_matching")
PARTS = ("warm", "cold", "growth")
DTYPES = ("float32", "bfloat16")
LONG = 20.0  # seconds: what takes longer runs once
BLOCK = 1 << 20
ROOT = Path(__file__).parents[2]

ENGINE = """
import json, sys, threading, time
import torch
from gradmatch import Task, merge
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1e3 for line in status if line.startswith("RssAnon"))
job = json.loads(sys.argv[1])
tasks = [Task(model, curvature, weight=0.4) for model, curvature in zip(job["models"][1:], job["curvatures"][1:] or [None] * 99)]
known = {"base_curvature": job["curvatures"][0]} if job["curvatures"] else {}
before = anonymous()
start, cpu = time.perf_counter(), time.process_time()
merge(job["models"][0], tasks, method=job["method"], out=job["out"], allow_mismatch=True, **known)
done = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "before": before}
print(json.dumps(done))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "results" / "bench-merge", help="for the generated models"
    )
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the mergekit-yaml command")
    parser.add_argument("--repeats", type=int, default=5, help="of warm runs; others run up to three times")
    parser.add_argument("--size", choices=SIZES, default="125M")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--generate", action="store_true", help="only make the models")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    groups = [group for part in args.parts for group in parts(part, args)]
    inputs = [generate(args.folder, size, dtype, count + 1) for size, dtype, count, *_ in groups]
    if args.generate:
        return
    print(machine(), file=sys.stderr)
    records = startup(inputs[0], min(3, args.repeats))
    for (size, dtype, count, methods, names, cache, repeats), made in zip(groups, inputs, strict=True):
        for method in methods:
            told = {"size": size, "dtype": dtype, "models": count, "method": method, "cache": cache}
            records += compare(
                job_of(made, count, method, args.folder / "out"), names, cache, repeats, told, args
            )
    with (args.folder / "records.jsonl").open("a") as file:
        for record in records:
            file.write(json.dumps({**record, "machine": machine()}) + "\n")
    print(table(records))


def parts(part: str, args: argparse.Namespace) -> list[tuple]:
    """(size, dtype, fine-tunes, methods, contenders, cache, repeats) of the groups of one part."""
    few = min(3, args.repeats)
    if part == "growth":
        plain = [method for method in METHODS if method != "ties"]
        cases = [(size, 3) for size in SIZES] + [("125M", count) for count in (2, 4, 8)]
        return [(size, "float32", count, plain, ("floor", "engine"), "warm", few) for size, count in cases]
    if part == "cold":
        return [(args.size, dtype, 3, METHODS, ("floor", "engine"), "cold", few) for dtype in DTYPES]
    return [(args.size, dtype, 3, METHODS, tuple(CONTENDERS), "warm", args.repeats) for dtype in DTYPES]


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores of {names[0] if names else 'unknown'}, load {os.getloadavg()[0]:.1f}"


def job_of(inputs: dict, count: int, method: str, out: Path) -> dict:
    """What the contenders are given."""
    curvatures = inputs["curvatures"][: count + 1] if method == "gradient_matching" else []
    return {
        "models": inputs["models"][: count + 1],
        "curvatures": curvatures,
        "method": method,
        "out": str(out),
    }


def compare(
    job: dict, names: Sequence[str], cache: str, repeats: int, told: dict, args: argparse.Namespace
) -> list[dict]:
    """Alternate the contenders; a record for each, with medians."""
    skipped = () if args.mergekit and not job["curvatures"] else ("mergekit",)
    used: dict[str, list[Measured]] = {name: [] for name in names if name not in skipped}
    for _ in range(repeats):
        for name, found in used.items():
            if found and found[0][0] > LONG:
                continue
            drop(job) if cache == "cold" else warm_up(job)
            shutil.rmtree(job["out"], ignore_errors=True)
            found.append(CONTENDERS[name](job, args))
    lowest = statistics.median(run[0] for run in used["floor"])
    records = []
    for name, found in used.items():
        seconds, cpu, anonymous, mapped = (list(column) for column in zip(*found, strict=True))
        median = statistics.median(seconds)
        records.append({
            **told, "contender": name, "seconds": median, "all": seconds, "ratio": median / lowest,
            "cpu_seconds": statistics.median(cpu), "anonymous_mb": max(anonymous), "mapped_mb": max(mapped),
        })  # fmt: skip
        print(json.dumps(records[-1]), file=sys.stderr)
    return records


def startup(inputs: dict, repeats: int) -> list[dict]:
    """Seconds of `gradmatch --help` and of a dry run over the first models: the best of some."""
    program = [sys.executable, "-m", "gradmatch.cli"]
    dry = [*command_words(job_of(inputs, 3, "task_arithmetic", Path("nowhere"))), "--dry-run"]
    return [
        {"startup": name, "seconds": min(watched(words)[0] for _ in range(repeats))}
        for name, words in (("--help", [*program, "--help"]), ("merge --dry-run", dry))
    ]


def files_of(job: dict) -> list[str]:
    return [f"{model}/model.safetensors" for model in job["models"]] + job["curvatures"]


def warm_up(job: dict) -> None:
    for path in files_of(job):
        read(path)


def drop(job: dict) -> None:
    """Take the inputs out of the page cache; needs no privilege."""
    for path in files_of(job):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read(path: str) -> None:
    buffer = bytearray(BLOCK)
    fd = os.open(path, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


def floor(job: dict, args) -> Measured:
    """Read every input but the base, copy the base (which has the output's size), sync."""
    start, cpu = time.perf_counter(), time.process_time()
    for path in files_of(job)[1:]:
        read(path)
    os.makedirs(job["out"])
    source, target = (
        os.open(files_of(job)[0], os.O_RDONLY),
        os.open(f"{job['out']}/copy", os.O_WRONLY | os.O_CREAT),
    )
    buffer = bytearray(BLOCK)
    while got := os.readv(source, [buffer]):
        os.write(target, memoryview(buffer)[:got])
    os.fsync(target)
    os.close(source)
    os.close(target)
    return time.perf_counter() - start, time.process_time() - cpu, 0.0, 0.0


def engine(job: dict, args, kernel: str | None = None) -> Measured:
    known = {} if kernel is None else {"GRADMATCH_KERNEL": kernel}
    _, _, anonymous, mapped, output = watched([sys.executable, "-c", ENGINE, json.dumps(job)], known)
    told = json.loads(output.splitlines()[-1])
    return told["seconds"], told["cpu"], anonymous - told["before"], mapped


def command(job: dict, args) -> Measured:
    return watched(command_words(job))[:4]


def command_words(job: dict) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "gradmatch.cli",
        "merge",
        "--quiet",
        "--method",
        job["method"],
        "--base",
        job["models"][0],
    ]
    words += ["--allow-mismatch", "-o", job["out"]]
    for number, model in enumerate(job["models"][1:], 1):
        known = f",curvature={job['curvatures'][number]}" if job["curvatures"] else ""
        words += ["--task", f"{model}{known},weight=0.4"]
    if job["curvatures"]:
        words += ["--base-curvature", job["curvatures"][0]]
    return words


def mergekit(job: dict, args) -> Measured:
    parameters = {"weight": 0.4, **({"density": 0.2} if job["method"] == "ties" else {})}
    dtype = json.loads(Path(job["models"][0], "config.json").read_text())["dtype"]
    recipe = {
        "merge_method": job["method"], "base_model": job["models"][0], "dtype": dtype,
        "models": [{"model": model, "parameters": parameters} for model in job["models"][1:]],
    }  # fmt: skip
    path = args.folder / "mergekit.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return watched([args.mergekit, str(path), job["out"]])[:4]


CONTENDERS: dict[str, Callable[..., Measured]] = {
    "floor": floor, "engine": engine, "torch": partial(engine, kernel="0"), "command": command, "mergekit": mergekit,
}  # fmt: skip


def watched(words: list[str], more: dict[str, str] | None = None) -> tuple[float, float, float, float, str]:
    """Run a process to its end: what `Measured` holds, and its stdout."""
    start, cpu = time.perf_counter(), children_cpu()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(more or {})}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    anonymous = mapped = 0.0
    while process.poll() is None:
        try:
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            anonymous = max(anonymous, int(status["RssAnon"].split()[0]) / 1e3)
            mapped = max(mapped, int(status["RssFile"].split()[0]) / 1e3)
        except (OSError, KeyError):
            pass
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{words[:4]} failed: {errors[-2000:]}")
    return seconds, children_cpu() - cpu, anonymous, mapped, output


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(records: list[dict]) -> str:
    lines = [
        "| parameters | dtype | fine-tunes | method | cache | contender | seconds | x floor | CPU seconds | anonymous MB | mapped MB |",
        "|" + "---|" * 11,
    ]
    for r in (record for record in records if "contender" in record):
        memory = f"{r['anonymous_mb']:.0f} | {r['mapped_mb']:.0f}" if r["contender"] != "floor" else "- | -"
        lines.append(
            f"| {r['size']} | {r['dtype']} | {r['models']} | {r['method']} | {r['cache']} | {r['contender']} | {r['seconds']:.2f} "
            f"| {r['ratio']:.2f} | {r['cpu_seconds']:.2f} | {memory} |"
        )
    started = [f"`gradmatch {r['startup']}`: {r['seconds']:.2f} s" for r in records if "startup" in r]
    return "\n".join([*lines, "", *started])


if __name__ == "__main__":
    main()
