"""Time and memory of merging, side by side with plain file copies (the floor) and, where it is there, mergekit.

    make bench-merge                                    the table: 125M parameters, three fine-tunes
    python -m experiments.bench.merge --growth          also 30M / 125M / 500M parameters and 2 / 4 / 8 models (40 GB of disk)
    python -m experiments.bench.merge --mergekit PATH   PATH: the mergekit-yaml command of another environment

Every measurement is a process of its own; contenders alternate, and medians over the repeats are printed. *engine* is the
call of `merge` in a process that has imported torch already, *command* the whole `gradmatch merge` from start to exit. The
floor reads every input once and writes the output once by plain file copies, synced to disk as ours is. *cold* means that
the inputs' pages were dropped from the page cache before. Anonymous memory of *engine* is counted above the process with
torch imported, of whole commands it is all of it; mapped pages of the inputs, which the kernel can take back, stand beside it.
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
from pathlib import Path

SIZES = {  # hidden, intermediate, layers, vocabulary: Llama-like
    "30M": (384, 1024, 8, 20_000),
    "125M": (768, 2048, 12, 32_000),
    "500M": (1536, 4096, 14, 32_000),
}
Measured = tuple[float, float, float, float]  # seconds, CPU seconds, peak anonymous MB, peak mapped MB
METHODS = ("task_arithmetic", "ties", "gradient_matching")
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="125M")
    parser.add_argument("--growth", action="store_true", help="also the growth in size and number of models")
    parser.add_argument(
        "--cold", action="store_true", help="also with the inputs dropped from the page cache"
    )
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    records = []
    print(machine(), file=sys.stderr)
    for dtype in ("float32", "bfloat16"):
        inputs = generate(args.folder, args.size, dtype, 4)
        records += compare(inputs, args.size, dtype, 3, args)
    if args.growth:
        for size in SIZES:
            inputs = generate(args.folder, size, "float32", 4)
            records += compare(
                inputs,
                size,
                "float32",
                3,
                args,
                methods=("task_arithmetic", "gradient_matching"),
                peers=False,
            )
        for count in (2, 4, 8):
            inputs = generate(args.folder, "125M", "float32", count + 1)
            records += compare(
                inputs,
                "125M",
                "float32",
                count,
                args,
                methods=("task_arithmetic", "gradient_matching"),
                peers=False,
            )
    with (args.folder / "records.jsonl").open("a") as file:
        for record in records:
            file.write(json.dumps({**record, "machine": machine()}) + "\n")
    print(table(records))


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores of {names[0] if names else 'unknown'}, load {os.getloadavg()[0]:.1f}"


def generate(folder: Path, size: str, dtype: str, count: int) -> dict[str, list[str]]:
    """Base and fine-tunes of a random Llama-like model with their curvature files; kept for the next run."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers, vocabulary = SIZES[size]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "dtype": dtype,
    }  # fmt: skip
    models, curvatures = [], []
    for number in range(count):
        target, known = folder / f"{size}-{dtype}-{number}", folder / f"{size}-{number}.curvature.safetensors"
        models.append(str(target))
        curvatures.append(str(known))
        if not (target / "config.json").is_file():
            generator = torch.Generator()
            target.mkdir(exist_ok=True)
            tensors = {}
            for name, shape in shapes.items():
                base = 0.02 * torch.randn(shape, generator=generator.manual_seed(hash_of(name)))
                noise = (
                    torch.randn(shape, generator=generator.manual_seed(hash_of(name) + number))
                    if number
                    else 0.0
                )
                tensors[name] = (base + 1e-3 * noise).to(getattr(torch, dtype))
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text(json.dumps(config))
        if not known.is_file():
            generator = torch.Generator().manual_seed(1000 + number)
            mean = {f"mean/{n}": 1e-5 * torch.rand(s, generator=generator).pow(4) for n, s in shapes.items()}
            save_file(
                mean, known, metadata={"format_version": "1", "num_examples": "10000", "estimator": "fisher"}
            )
    os.sync()
    return {"models": models, "curvatures": curvatures}


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def compare(
    inputs: dict, size: str, dtype: str, count: int, args, methods=METHODS, peers: bool = True
) -> list[dict]:
    """Alternate the contenders; a record for each, with medians."""
    records = []
    for method in methods:
        curved = method == "gradient_matching"
        job = {
            "models": inputs["models"][: count + 1],
            "curvatures": inputs["curvatures"][: count + 1] if curved else [],
            "method": method,
            "out": str(args.folder / "out"),
        }
        contenders = {"floor": floor, "engine": engine}
        if peers:
            contenders["command"] = command
            if args.mergekit and not curved:
                contenders["mergekit"] = mergekit
        for cache in ("warm", "cold") if args.cold else ("warm",):
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            used: dict[str, list[Measured]] = {name: [] for name in contenders}
            warm_up(job)
            for repeat in range(args.repeats):
                for name, contender in contenders.items():
                    if name == "mergekit" and (repeat or cache == "cold"):
                        continue  # up to a minute a run: once tells enough
                    if cache == "cold":
                        drop(job)
                    elif name == "mergekit" or repeat == 0:
                        warm_up(job)
                    shutil.rmtree(job["out"], ignore_errors=True)
                    used[name].append(contender(job, args))
                    seconds[name].append(used[name][-1][0])
            lowest = statistics.median(seconds["floor"])
            for name in (name for name in contenders if seconds[name]):
                median = statistics.median(seconds[name])
                _, cpu, anonymous, mapped = zip(*used[name], strict=True)
                records.append({
                    "size": size, "dtype": dtype, "models": count, "method": method, "cache": cache, "contender": name,
                    "seconds": median, "all": seconds[name], "ratio": median / lowest, "cpu_seconds": statistics.median(cpu),
                    "anonymous_mb": max(anonymous), "mapped_mb": max(mapped),
                })  # fmt: skip
                print(json.dumps(records[-1]), file=sys.stderr)
    return records


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


def engine(job: dict, args) -> Measured:
    _, _, anonymous, mapped, output = watched([sys.executable, "-c", ENGINE, json.dumps(job)])
    told = json.loads(output.splitlines()[-1])
    return told["seconds"], told["cpu"], anonymous - told["before"], mapped


def command(job: dict, args) -> Measured:
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
    return watched(words)[:4]


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


def watched(words: list[str]) -> tuple[float, float, float, float, str]:
    """Run a process to its end: what `Measured` holds, and its stdout."""
    start, cpu = time.perf_counter(), children_cpu()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
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
    for r in records:
        memory = f"{r['anonymous_mb']:.0f} | {r['mapped_mb']:.0f}" if r["contender"] != "floor" else "- | -"
        lines.append(
            f"| {r['size']} | {r['dtype']} | {r['models']} | {r['method']} | {r['cache']} | {r['contender']} | {r['seconds']:.2f} "
            f"| {r['ratio']:.2f} | {r['cpu_seconds']:.2f} | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
