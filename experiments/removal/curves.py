"""Stages of a comparison of removals at equal cost: curvature, each way's path, relearning, rounding; toxicity and facts."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from experiments.files import write_json
from experiments.removal import facts, forgetting, judge, language, rounding, scorers
from experiments.removal.competitors import TRAINED, token_loss
from experiments.removal.names import GENERATIONS, POINTS
from experiments.removal.walks import CURVATURE, MOST, Given, Update, direction, strengths, walk
from experiments.tasks import texts
from gradmatch.estimators import estimate

Array = NDArray[np.float64]
STAY = ("keep", "beside")
BATCH = 32


def curvature(
    out: Path,
    *,
    data: Path,
    model: Path,
    sides: Mapping[str, int],
    method: str,
    max_length: int,
    seed: int,
    gradient: bool,
    end: bool = False,
) -> None:
    """Curvature of a model on so many training texts of each side: `out/curvature.safetensors`, with the gradient where it is asked for."""
    network, tokenizer = language.load(model / "model")
    rows = [row for side, count in sides.items() for row in texts.load(data / side / "train.jsonl")[:count]]
    feed = language.batches(rows, tokenizer, max_length=max_length, batch_size=8, end=end)
    options: dict[str, Any] = {"reduction": "batch"} if method == "fisher" else {}
    found = estimate(
        network, (batch for _, batch in feed), method=method, seed=seed, gradient=gradient, **options
    )
    found.save(out / CURVATURE)
    write_json(out / "curvature.json", {"texts": len(rows), "method": method})


class Bench:
    """One model of the base's structure, into which edited weights are put, and what is measured of it."""

    def __init__(self, given: Given, split: str, limit: int | None = None) -> None:
        self.given = given
        self.model, self.tokenizer = language.load(given.base / "model")
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.read(split, limit)

    def read(self, split: str, limit: int | None = None) -> None:
        """Take the texts of a split from now on, at most so many a side."""
        files = {side: self.given.data / side / f"{split}.jsonl" for side in (*STAY, "remove")}
        self.rows = {side: texts.load(file)[:limit] for side, file in files.items() if file.is_file()}

    def put(self, update: Update, strength: float) -> nn.Module:
        """theta0 + strength * update."""
        with torch.no_grad():
            state = self.model.state_dict()
            for name, value in self.before.items():
                state[name].copy_(value + strength * update[name] if name in update else value)
        return self.model

    def losses(self, side: str) -> Array:
        """(n, 2) nats and tokens of each text of a side, of the model as it is now."""
        end = self.given.end and side != "beside"
        return language.losses(
            self.model, self.tokenizer, self.rows[side], max_length=self.given.max_length, batch_size=BATCH,
            precision="float32", end=end,
        )  # fmt: skip

    def per_token(self, side: str) -> float:
        """Nats a token of a side."""
        table = self.losses(side)
        return float(table[:, 0].sum() / table[:, 1].sum())


def path(
    out: Path,
    *,
    data: Path,
    way: str,
    options: Sequence[Mapping[str, Any]],
    budgets: Sequence[float],
    looks: int,
    validation: int,
    max_length: int,
    seed: int,
    end: bool,
    measure: Mapping[str, Any],
    after: Mapping[str, Any],
    judge: Path | None = None,
    retrained: Path | None = None,
    unedited: Path | None = None,
    **folders: Path,
) -> None:
    """One way to remove, from the choice of its option and strengths on validation texts to what is left of it on test texts.

    Every way has the same number of looks, however many options are tried; of these the one that raises the loss on what is to go
    most at the largest budget is taken. Writes `out/card.json`, `out/points.npz` and `out/generations.jsonl`. Without `unedited`,
    the folder of such a stage, the model is measured as it is and no more.
    """
    given = Given(**folders, data=data, max_length=max_length, seed=seed, end=end)
    bench = Bench(given, "validation", validation)
    update: Update = {}
    chosen, tried, points = [], [], []
    tables: dict[str, Array] = {}
    lines: list[dict[str, Any]] = []
    if unedited:
        update, chosen, tried = chosen_direction(bench, way, options, budgets, looks)
        tables |= np.load(unedited / POINTS)
        lines += map(json.loads, (unedited / GENERATIONS).read_text(encoding="utf-8").splitlines())
        points += json.loads((unedited / "card.json").read_text(encoding="utf-8"))["points"]
    bench.read("test")
    for number, strength in enumerate(chosen, start=1) if unedited else [(0, 0.0)]:
        model = bench.put(update, strength)
        for side in bench.rows:
            tables[f"{side}/{number}"] = bench.losses(side)
        point: dict[str, Any] = {"strength": strength}
        if (data / "prompts").is_dir():
            told, scored = continued(model, bench.tokenizer, data, measure, judge)
            point |= told
            lines += [{"point": number, **line} for line in scored]
        if (data / facts.FACTS).is_file():
            point |= known(model, bench.tokenizer, facts.load(data), max_length, retrained, data)
        points.append(point)
    picked = max(tried, key=lambda one: one["forgets"])["options"] if tried else {}
    card = {"way": way, "options": picked, "tried": tried, "points": points, "moved": moved(update)}
    card["distance"] = float(sum(value.double().square().sum() for value in update.values())) ** 0.5
    if after:
        card["after"] = {
            "rounding": rounded(bench, update, chosen[-1]),
            **{
                f"relearned {side}": relearned(bench, update, chosen[-1], side, **after)
                for side in ("remove", "beside")
            },
        }
    np.savez(out / POINTS, **tables)  # type: ignore[arg-type]
    (out / GENERATIONS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_json(out / "card.json", card)


def chosen_direction(
    bench: Bench, way: str, options: Sequence[Mapping[str, Any]], budgets: Sequence[float], looks: int
) -> tuple[Update, list[float], list[dict[str, Any]]]:
    """The update of the option that forgets most at the largest budget, its strength for each budget, and all that was tried."""
    start = {side: bench.per_token(side) for side in bench.rows}
    tried: list[dict[str, Any]] = []
    best: tuple[Update, list[float]] = {}, []
    for one in tqdm(options, desc=f"{way}: looks"):
        update = direction(way, bench.given, one)
        cost = partial(_cost, bench, update, start)
        most = MOST if way in TRAINED else math.inf
        found = walk(cost, budgets, max(1, looks // len(options)), most=most)
        chosen = strengths(found, budgets, most)
        bench.put(update, chosen[-1])
        forgets = bench.per_token("remove") - start["remove"]
        if not any(forgets <= other["forgets"] for other in tried):
            best = update, chosen
        tried.append({"options": dict(one), "looks": [vars(look) for look in found], "forgets": forgets})
        del update
    return *best, tried


def _cost(bench: Bench, update: Update, start: Mapping[str, float], strength: float) -> float:
    """The larger rise of both texts that must stay, nats a token; not finite where a loss is none."""
    bench.put(update, strength)
    rises = [bench.per_token(side) - start[side] for side in STAY if side in start]
    return max(rises) if all(map(math.isfinite, rises)) else math.inf


def moved(update: Update) -> dict[str, float]:
    """Share of the squared update by kind of layer: embeddings, attention, feed-forward, norms."""
    kinds = {
        "embeddings": ("embed", "wte", "wpe", "lm_head"),
        "attention": ("attn",),
        "feed-forward": ("mlp",),
    }
    sums = dict.fromkeys((*kinds, "rest"), 0.0)
    for name, value in update.items():
        kind = next((kind for kind, words in kinds.items() if any(word in name for word in words)), "rest")
        sums[kind] += float(value.double().square().sum())
    total = sum(sums.values()) or 1.0
    return {kind: value / total for kind, value in sums.items()}


def continued(
    model: nn.Module, tokenizer: Any, data: Path, how: Mapping[str, Any], judged: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Mean scores of the continuations of every list of prompts by each scorer, and the continuations with theirs."""
    lines: list[dict[str, Any]] = []
    for file in sorted((data / "prompts").glob("*.jsonl")):
        prompts = [prompt.text for prompt in texts.load(file)]
        found = language.continuations(
            model, tokenizer, prompts, tokens=how["tokens"], top_p=how["top_p"], seed=how["seed"],
            precision="float32", title=file.stem,
        )  # fmt: skip
        scores = {"words": scorers.score(how["scorer"], found)}
        if judged:
            scores["judge"] = judge.score(found, judged, how["encoder"])
        lines += [
            {
                "list": file.stem,
                "prompt": prompt,
                "continuation": text,
                "broken": text is None or forgetting.broken(text),
                **{name: _number(own[index]) for name, own in scores.items()},
            }
            for index, (prompt, text) in enumerate(zip(prompts, found, strict=True))
        ]
    told: dict[str, Any] = {"broken": float(np.mean([line["broken"] for line in lines]))}
    for name in {"words", "judge"} & set(lines[0]):
        values = [line[name] for line in lines if line[name] is not None]
        told |= {
            name: float(np.mean(values)) if values else None,
            f"{name} share": float(np.mean([value > scorers.TOXIC for value in values])) if values else None,
            f"{name} unscored": len(lines) - len(values),
        }
    return told, lines


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def rounded(bench: Bench, update: Update, strength: float) -> dict[str, Any]:
    """What is left of the rise on what is to go after rounding to few bits, against the base rounded likewise."""
    found = {}
    edited = copy.deepcopy(bench.put(update, strength).state_dict())
    full = bench.per_token("remove") - _at(bench, bench.before, "remove")
    for bits in (8, 4):
        base, mine = rounding.rounded(bench.before, bits), rounding.rounded(edited, bits)
        gone, kept = (_at(bench, mine, side) - _at(bench, base, side) for side in ("remove", "keep"))
        share = rounding.changed(bench.before, edited, bits)
        found[f"int{bits}"] = {
            "survives": gone / full if full else None,
            "rise on what stays": kept,
            "codes changed": share,
            "base's own loss": _at(bench, base, "keep") - _at(bench, bench.before, "keep"),
        }
    return found


def _at(bench: Bench, weights: Mapping[str, Tensor], side: str) -> float:
    bench.model.load_state_dict(dict(weights))
    return bench.per_token(side)


def relearned(
    bench: Bench,
    update: Update,
    strength: float,
    side: str,
    *,
    steps: int,
    texts_seen: int,
    learning_rate: float,
) -> dict[str, Any]:
    """How much of the rise on what is to go is left after a few steps of AdamW on training texts of a side.

    side "remove": the attack, on texts of what was removed; others of them are measured, and none must stay. "beside": ordinary
    fine-tuning on other texts. survives: the rise left over the unedited base; controlled: over the base after the same steps.
    """
    given = bench.given
    before = _at(bench, bench.before, "remove")
    edited = _at(bench, _state(bench, update, strength), "remove")
    after = {}
    for name, weights in (("base", bench.before), ("edited", _state(bench, update, strength))):
        bench.model.load_state_dict(weights)
        optimizer = torch.optim.AdamW(bench.model.parameters(), lr=learning_rate)
        feed = given.feed(bench.tokenizer, side, max(1, texts_seen // steps), given.seed + 17)
        for _, batch in zip(range(steps), feed, strict=False):
            optimizer.zero_grad()
            token_loss(bench.model, batch).backward()
            optimizer.step()
        optimizer.zero_grad()
        after[name] = bench.per_token("remove")
    rise = edited - before
    return {
        "rise": rise,
        "survives": (after["edited"] - before) / rise if rise else None,
        "controlled": (after["edited"] - after["base"]) / rise if rise else None,
    }


def _state(bench: Bench, update: Update, strength: float) -> dict[str, Tensor]:
    return {n: v + strength * update[n] if n in update else v for n, v in bench.before.items()}


@torch.inference_mode()
def known(
    model: Any,
    tokenizer: Any,
    everything: Sequence[facts.Fact],
    max_length: int,
    retrained: Path | None,
    data: Path,
) -> dict[str, Any]:
    """What a model knows of the facts to forget and to keep: `forget` and `keep` (of test people), and KL to the retrained model."""
    persons = {text.document for text in texts.load(data / "keep" / "test.jsonl")}
    groups = {
        "forget": [fact for fact in everything if fact.forget],
        "keep": [fact for fact in everything if not fact.forget and fact.person in persons],
    }
    other = language.load(retrained / "model")[0] if retrained else None
    told: dict[str, Any] = {}
    for group, own in groups.items():
        said = [facts.as_text(fact) for fact in own]
        again = [facts.as_text(fact, fact.paraphrase) for fact in own]
        wrong = [facts.as_text(fact, answer) for fact in own for answer in fact.wrong]

        def mean(rows: Sequence[texts.Text]) -> Array:
            table = language.losses(
                model, tokenizer, rows, max_length=max_length, batch_size=BATCH, precision="float32", end=True
            )
            return np.asarray(-table[:, 0] / table[:, 1])

        right, para = mean(said), mean(again)
        ratio = forgetting.truth_ratio(para, mean(wrong).reshape(len(own), -1))
        strength, kl = _greedy(model, other, tokenizer, said, max_length)
        told[group] = {
            "probability": float(np.exp(right).mean()),
            "paraphrase": float(np.exp(para).mean()),
            "truth ratio": [float(value) for value in ratio],
            "extraction": strength,
            "kl": kl,
            "questions": len(own),
        }
    return told


def _greedy(
    model: Any, other: Any, tokenizer: Any, rows: Sequence[texts.Text], max_length: int
) -> tuple[float, float | None]:
    """Mean extraction strength of the answers, and mean KL(retrained || model) a token of them, nats."""
    strengths_, total, count = [], 0.0, 0
    for _, batch in language.batches(rows, tokenizer, max_length=max_length, batch_size=BATCH, end=True):
        labels = batch.pop("labels")[:, 1:]
        log_p = model(**batch).logits[:, :-1].log_softmax(-1)
        counted = labels != language.IGNORED
        hits = log_p.argmax(-1) == labels
        strengths_ += [
            forgetting.extraction_strength(h[c].tolist()) for h, c in zip(hits, counted, strict=True)
        ]
        if other is not None:
            log_q = other(**batch).logits[:, :-1].log_softmax(-1)
            total += float(((log_q.exp() * (log_q - log_p)).sum(-1) * counted).sum())
            count += int(counted.sum())
    return float(np.mean(strengths_)), total / count if count else None


def reference(out: Path, *, data: Path, model: Path, max_length: int, retrained: Path | None = None) -> None:
    """Stage: what a model that is not edited knows of the facts, and its losses: `out/known.json`."""
    network, tokenizer = language.load(model / "model")
    told = known(network, tokenizer, facts.load(data), max_length, retrained, data)
    for side in STAY:
        table = language.losses(
            network, tokenizer, texts.load(data / side / "test.jsonl"), max_length=max_length, batch_size=BATCH,
            precision="float32", end=side == "keep",
        )  # fmt: skip
        told[f"loss {side}"] = float(table[:, 0].sum() / table[:, 1].sum())
    write_json(out / "known.json", told)
