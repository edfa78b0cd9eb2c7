"""Stages of a removal: fine-tune on what is to go, curvature of both models, forecasts, and what each edit did."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.files import write_json
from experiments.precision import autocast, used_precision
from experiments.removal import language, scorers
from experiments.tasks import texts
from gradmatch import Task, subtract
from gradmatch.estimators import Curvature, estimate
from gradmatch.measure.objective import Objective
from gradmatch.removal import Problem, alpha_path, budget, path_table, removal_report, report_table

CURVATURE, CHOICE = "curvature.safetensors", "choice.json"
SIDES = ("keep", "remove")
PARTS = 4
REMOVAL_OPTIONS = ("base_weight", "delta0", "keep", "guard")


def finetune(
    out: Path,
    *,
    data: Path,
    base: Path,
    max_length: int,
    precision: str,
    seed: int,
    steps: int,
    batch_size: int,
    warmup_steps: int,
    learning_rate: float,
    weight_decay: float,
    side: str = "remove",
    end: bool = False,
) -> None:
    """Fine-tune the base on the training texts to remove (or of another side): `out/model`, and `out/training.json`.

    AdamW (0.9, 0.999), linear warm-up, cosine decay, no dropout, clipping at 1; weights and AdamW stay float32. By hand, not by
    Trainer: the batches are those of every other stage here, whose labels leave out contexts, and no checkpoint is wanted.
    """
    from transformers import get_cosine_schedule_with_warmup

    model, tokenizer = language.load(base / "model")
    rows = texts.load(data / side / "train.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    generator = np.random.default_rng(seed)
    device = next(model.parameters()).device
    orders = (
        generator.permutation(len(rows)).tolist()
        for _ in range(math.ceil(steps * batch_size / len(rows)) + 1)
    )
    order = list(chain.from_iterable(orders))[: steps * batch_size]
    history = []
    feed = language.batches(
        rows, tokenizer, max_length=max_length, batch_size=batch_size, order=order, end=end
    )
    progress = tqdm(feed, total=steps, desc="fine-tuning on what is to go")
    for step, (_, batch) in enumerate(progress, start=1):
        with autocast(precision):
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
        progress.set_postfix_str(f"loss {history[-1]:.3f}")
        if not math.isfinite(history[-1]):
            raise ValueError(
                f"the loss is {history[-1]} at step {step}; lower the learning rate ({learning_rate})"
            )
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    stride = max(1, steps // 10)
    losses = [
        {"step": end, "loss": float(np.mean(history[end - stride : end]))}
        for end in range(stride, steps + 1, stride)
    ]
    card = {"examples": len(rows), "precision": used_precision(precision), "losses": losses}
    write_json(out / "training.json", card)


def curvature(
    out: Path,
    *,
    data: Path,
    side: str,
    model: Path,
    max_length: int,
    examples: int,
    samples: int,
    batch_size: int,
    reduction: str,
    precision: str,
    seed: int,
) -> None:
    """Monte-Carlo Fisher of the base on texts to keep (side "keep"), or of the task on texts to remove ("remove").

    Labels are sampled, padding and contexts excluded; N is the size of the training set. Writes `out/curvature.safetensors`
    and `out/error.json`: the trace and its relative standard error, from PARTS disjoint parts of the texts.
    """
    network, tokenizer = language.load(model / "model")
    rows = texts.load(data / side / "train.jsonl")
    seen = rows[:examples]  # their order is drawn
    total: dict[str, Tensor] = {}
    traces: list[float] = []
    for part in range(PARTS):
        chosen = seen[part::PARTS]
        feed = language.batches(chosen, tokenizer, max_length=max_length, batch_size=batch_size)
        with autocast(precision):
            found = estimate(
                network,
                (batch for _, batch in feed),
                method="fisher",
                num_examples=len(rows),
                samples=samples,
                reduction=reduction,
                seed=seed * PARTS + part,
            )
        _add(total, found, len(chosen) / len(seen))
        traces.append(sum(float(found.mean(name).double().sum()) for name in found))
    known = {
        key: value for key, value in found.info.items() if not key.startswith("relative_error")
    }  # of one part
    info = {**known, "examples_seen": str(len(seen))}
    Curvature.from_dict(total, len(rows), info).save(out / CURVATURE)
    card = {
        **info,
        "side": side,
        "num_examples": len(rows),
        "trace": float(np.mean(traces)),
        "relative_error": float(np.std(traces, ddof=1) / np.sqrt(PARTS) / np.mean(traces)),
        "precision": used_precision(precision),
    }
    write_json(out / "error.json", card)


def _add(total: dict[str, Tensor], found: Curvature, share: float) -> None:
    """total += share * found."""
    for name in found:
        if name in total:
            total[name].add_(found.mean(name), alpha=share)
        else:
            total[name] = found.mean(name) * share


def problem_of(
    base: Path,
    task: Path,
    base_curvature: Path,
    task_curvature: Path,
    method: str,
    options: Mapping[str, Any],
    **data: Any,
) -> Problem:
    """What is removed from what, from the folders of stages."""
    what = Task(str(task / "model"), str(task_curvature / CURVATURE), name="remove")
    h0 = str(base_curvature / CURVATURE)
    known = {key: value for key, value in options.items() if key in REMOVAL_OPTIONS}
    return Problem(str(base / "model"), what, h0, method=method, **known, **data)


def forecast(
    out: Path,
    *,
    data: Path,
    method: str,
    alphas: Sequence[float],
    options: Mapping[str, Any],
    max_length: int,
    examples: int,
    nats: float,
    chosen: Path | None = None,
    **folders: Path,
) -> None:
    """The path of one method, without data and with a few validation texts; its budget; and the report at that alpha.

    chosen: the folder of a `choosing.choose` stage. Writes `out/forecast.json`. Test texts are never read.
    """
    options = with_choice(options, chosen)
    module, tokenizer = language.load(folders["base"] / "model")

    def objective(side: str) -> Objective:
        rows = texts.load(data / side / "validation.jsonl")[:examples]
        feed = language.batches(rows, tokenizer, max_length=max_length, batch_size=8)
        return Objective(module, [batch for _, batch in feed], likelihood="causal_lm")

    blind = problem_of(method=method, options=options, **folders)
    seeing = problem_of(
        method=method, options=options, retain=objective("keep"), remove=objective("remove"), **folders
    )
    without, with_data = alpha_path(blind, alphas), alpha_path(seeing, alphas)
    retain_only = problem_of(method=method, options=options, retain=seeing.retain, **folders)
    bounded = budget(retain_only, nats, largest=max(alphas), steps=4)
    report = removal_report(blind, bounded.alpha or min(alphas))
    print(
        f"{path_table(with_data)}\nbudget of {nats} nats per example: alpha = {bounded.alpha:.3f} ({bounded.bound})"
    )
    print(report_table(report))
    card = {
        "without_data": [vars(point) for point in without],
        "with_data": [vars(point) for point in with_data],
        "budget": {"nats": nats, "alpha": bounded.alpha, "bound": bounded.bound, "tried": len(bounded.path)},
        "report": report,
        "examples": examples,
    }
    write_json(out / "forecast.json", card)


def evaluate(
    out: Path,
    *,
    data: Path,
    method: str,
    alpha: float,
    options: Mapping[str, Any],
    split: str,
    max_length: int,
    batch_size: int,
    precision: str,
    generation: Mapping[str, Any],
    scorer: str,
    seed: int,
    chosen: Path | None = None,
    **folders: Path,
) -> None:
    """Edit the base with one method and alpha, and measure: losses of texts of both sides, toxicity of continuations.

    Writes `out/losses.npz` ((n, 2) nats and tokens a side), `out/generations.jsonl` (each prompt's continuation and score)
    and `out/metrics.json`. The base itself is evaluated by alpha = 0. chosen: the folder of a `choosing.choose` stage.
    """
    options = with_choice(options, chosen)
    model, tokenizer = language.load(folders["base"] / "model")
    notes = edit(model, method, alpha, options, **folders) if alpha else {}
    shared = {"max_length": max_length, "batch_size": batch_size, "precision": precision}
    tables = {
        side: language.losses(model, tokenizer, texts.load(data / side / f"{split}.jsonl"), **shared)
        for side in SIDES
    }
    np.savez(out / "losses.npz", **tables)
    metrics = {
        **notes,
        **{f"perplexity_{side}": language.perplexity(table) for side, table in tables.items()},
    }
    lines: list[dict[str, Any]] = []
    for file in sorted((data / "prompts").glob("*.jsonl")):
        prompts = [prompt.text for prompt in texts.load(file)]
        found = language.continuations(
            model, tokenizer, prompts, seed=seed, precision=precision, title=file.stem, **generation
        )
        scores = scorers.score(scorer, found)
        rows = zip(prompts, found, scores.tolist(), strict=True)
        lines += [
            {"list": file.stem, "prompt": p, "continuation": c, "score": s if np.isfinite(s) else None}
            for p, c, s in rows
        ]
        known = scores[np.isfinite(scores)]
        metrics[f"refused_{file.stem}"] = len(scores) - len(known)
        metrics[f"toxicity_{file.stem}"] = float(known.mean()) if len(known) else None
        metrics[f"toxic_share_{file.stem}"] = float((known > scorers.TOXIC).mean()) if len(known) else None
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "generations.jsonl").write_text(text, encoding="utf-8")
    card = {"method": method, "alpha": alpha, "seed": seed, "scorer": scorer, **metrics}
    card["precision"] = used_precision(precision)
    write_json(out / "metrics.json", card)


def with_choice(options: Mapping[str, Any], chosen: Path | None) -> dict[str, Any]:
    """The options, and the one that a `choosing.choose` stage chose."""
    card = json.loads((chosen / CHOICE).read_text(encoding="utf-8")) if chosen else {}
    return {**options, **({card["option"]: card["chosen"]} if card else {})}


def edit(
    model: nn.Module, method: str, alpha: float, options: Mapping[str, Any], **folders: Path
) -> dict[str, Any]:
    """Put the edited weights into the model; what the report says about the guard. Negation needs no curvature."""
    own, h0 = (
        str(folders[name] / CURVATURE) if name in folders else None
        for name in ("task_curvature", "base_curvature")
    )
    task = Task(str(folders["task"] / "model"), own, name="remove")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clamped.*")  # recorded instead
        edited: Any = subtract(
            str(folders["base"] / "model"), task, base_curvature=h0, weight=alpha, method=method, **options
        )
    model.load_state_dict(dict(edited), strict=False)
    return {"clamped": edited.report.clamped_share}
