"""The form of every mixture that no architecture of transformers has: the tensors of `gradmatch.mixture.building.make`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.building import (
    MODEL_TYPE,
    Place,
    family_of,
    layer_count,
    linears_of,
    places_of,
    stack_of,
    trunk_names,
    width_of,
)
from gradmatch.mixture.modules import as_mlp, sizes_of
from gradmatch.mixture.prompts import gate_vectors, near_equal, seen_vectors
from gradmatch.mixture.request import RANDOM, Request
from gradmatch.mixture.sources import Sources
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.loading import load
from gradmatch.models.stores import MemoryStore, Renamed, equal
from gradmatch.models.structure import structure
from gradmatch.models.tokenizers import check_tokenizers

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.stores import Store

NOISE = 1e-3  # of the largest singular value of all task vectors at a place, below which a direction is noise
START = 0.02  # standard deviation of a router that starts at random


class OwnForm:
    """Names, config and tensors of a mixture for `gradmatch.mixture.load`; attributes as `gradmatch.mixture.native.NativeForm` has them.

    Args:
        sources: base and experts.
        request: what was asked for.

    Raises:
        GradmatchError: models that cannot be mixed at this level.
    """

    def __init__(self, sources: Sources, request: Request) -> None:
        self.sources, self.request = sources, request
        base = sources.base
        known = structure(base)
        if known is None or known.module is None or family_of(base) == "":
            raise GradmatchError(
                f"{base.where}: its config names no architecture of transformers with an answer (a head), and a mixture is built from that",
                "bad_model",
                base.where,
            )
        self.module, where = known.module, base.where
        self.top_k = request.experts_at_once(len(sources.experts))
        self.notes: list[str] = []
        if (
            request.routing == "token"
            and request.level != "ffn"
            and not _predicts(base)
            and request.rank is None
        ):
            raise GradmatchError(
                f"a choice for every token of whole {request.level}s is one of many answers, and {where} gives one a sample; choose "
                "routing='sample'",
                "bad_setting",
                "routing",
            )
        layers = layer_count(self.module, where)
        self.dense = request.dense(layers)
        mixed = [n for n in range(layers) if n not in self.dense]
        names = [name for name in base.store if name not in base.aliases]
        self.places: list[Place] = []
        self.trunk: list[str] = []
        if request.level == "model":
            self._whole_models(names)
        else:
            self.places = places_of(self.module, request.level, mixed, where)
            inside = {n for n in names if any(p.expert(n, 0) for p in self.places)}
            if request.rank:
                tops = {path for place in self.places for path in linears_of(self.module, place)}
                inside = {name for name in inside if name.rpartition(".")[0] in tops}
            self.inside = [name for name in names if name in inside]
            self.outside = [name for name in names if name not in inside]
            self.merged = names if request.rank else self.outside
        self.settings: dict[str, Any] = {
            "level": request.level, "routing": request.routing, "router": request.router, "top_k": self.top_k,
            "dense_layers": self.dense, "rank": request.rank, "gate_rank": request.gate_rank, "gate_mode": self._mode, "seed": request.seed,
        }  # fmt: skip
        self._shared: dict[str, str] = {}

    def _whole_models(self, names: Sequence[str]) -> None:
        """What is merged and mixed where experts are whole models."""
        if self.dense != list(range(len(self.dense))):
            raise GradmatchError(
                f"dense_layers is {self.dense}: of whole models the first layers alone can be merged; give a number",
                "bad_setting",
                "dense_layers",
            )
        base = self.sources.base
        for expert in self.sources.experts:
            check_answers(base, expert.model, expert.name)
        trunk = trunk_names(self.module, len(self.dense), base.where)
        self.trunk = [name for name in trunk if name in base]
        held = set(self.trunk) if self.dense else set()
        self.merged = self.outside = [name for name in names if name in held]
        self.inside = [
            name for name in names if name not in held and all(name in e.model for e in self.sources.experts)
        ]

    @property
    def _mode(self) -> str:
        if self.request.router == "spectral":
            return "spectral"
        told = self.sources.experts[0].prompts is not None
        return self.request.gate_mode if told or self.request.gate_mode != "seen" else "random"

    @property
    def config(self) -> dict[str, Any]:
        """config.json; transformers does not know its model type, and says so."""
        told = {
            **self.settings, "experts": self.sources.names, "trunk": _plain(self.sources.base), "shared": self._shared,
        }  # fmt: skip
        if self.request.level == "model":
            told |= {
                "models": [_plain(one.model) for one in self.sources.experts],
                "first": len(self.dense),
                "trunk_names": self.trunk,
            }
        return {"model_type": MODEL_TYPE, "architectures": ["GradmatchMixture"], "mixture": told}

    def store(self, merged: Checkpoint) -> tuple[Store, Store]:
        """All tensors but the routers, and the routers; what is the same in several experts is stored once."""
        request, base = self.request, self.sources.base
        table: dict[str, tuple[Checkpoint, str]] = {}
        if request.level == "model":
            table |= {f"trunk.{name}": (merged, name) for name in self.trunk}
            fixed = set(self.outside)
            for number, expert in enumerate(self.sources.experts):
                for name in expert.model.store:
                    if name not in expert.model.aliases:
                        table[f"experts.{number}.{name}"] = (merged if name in fixed else expert.model, name)
        elif request.rank:
            lows = {path for place in self.places for path in linears_of(self.module, place)}
            for name in self.merged:
                path, _, leaf = name.rpartition(".")
                table[f"{path}.base.{leaf}" if path in lows else name] = merged, name
        else:
            table |= {name: (merged, name) for name in self.outside}
            for place in self.places:
                for number, expert in enumerate(self.sources.experts):
                    for name in base.store:
                        new = place.expert(name, number) if name not in base.aliases else None
                        if new is not None:
                            table[new] = expert.model, name
        stored = self._once(table)
        more = self._low_rank(merged) if request.rank else {}
        stored |= {name: (MemoryStore({name: value}), name) for name, value in more.items()}
        return Renamed(stored), MemoryStore(self._routers())

    def _once(self, table: Mapping[str, tuple[Checkpoint, str]]) -> dict[str, tuple[Store, str]]:
        """The tensors that have to be stored; the others are found under another name (see `_shared`)."""
        stored: dict[str, tuple[Store, str]] = {}
        seen: dict[Any, list[str]] = {}
        for new, (model, name) in table.items():
            held = model.aliases.get(name, name)
            key = (name, model.spec(name))
            for other in seen.get(key, []):
                there = table[other]
                here = (model.store, held)
                if (model is there[0]) or (
                    model.sample(name) == there[0].sample(there[1])
                    and equal(*here, there[0].store, there[0].aliases.get(there[1], there[1]))
                ):
                    self._shared[new] = other
                    break
            else:
                stored[new] = model.store, held
                seen.setdefault(key, []).append(new)
        return stored

    def sizes(self, store: Store) -> dict[str, int]:
        """Weights of the output, of the base, and of one answer."""
        base = self.sources.base
        output = sum(store.spec(name).numel for name in store)
        count = sum(base.spec(name).numel for name in base.store if name not in base.aliases)
        one = sum(base.spec(name).numel for name in self.inside)
        if self.request.rank:
            return {"output": output, "base": count, "active": output}
        held = sum(store.spec(name).numel for name in store if not name.startswith("trunk."))
        active = count - one + self.top_k * one if self.request.level != "model" else self.top_k * count
        return {"output": output, "base": count, "active": min(active + output - held, output)}

    def _routers(self) -> dict[str, Tensor]:
        if self.request.router == "spectral":
            return self._spectral()
        count, level = len(self.sources.experts), self.request.level
        if level == "model":
            stack = stack_of(self.module, self.sources.base.where)
            reads, keys = [f"{stack}.{len(self.dense)}"], ["gate.router"]
            width = width_of(self.module, places_of(self.module, "block", [len(self.dense)], "")[0])
        else:
            reads, keys = [p.reads for p in self.places], [f"{p.path}.router" for p in self.places]
            width = width_of(self.module, self.places[0])
        mode = self._mode
        if mode in RANDOM:
            generator = torch.Generator().manual_seed(self.request.seed)
            rows = START * torch.randn((len(keys), count, width), generator=generator)
            self.notes.append(
                "the routers start at random: train them (gradmatch mix train-router), or give prompts"
            )
            warn(self.notes[-1])
        elif mode == "seen":
            told = [one.prompts for one in self.sources.experts if one.prompts is not None]
            rows = seen_vectors(load(self.sources.base), reads, self.sources.base, self.sources.names, told)
        else:
            if level == "model" or not _predicts(self.sources.base):
                raise GradmatchError(
                    f"gate_mode={mode!r} gives a row for every layer of a model of text; choose gate_mode='seen'",
                    "bad_setting",
                    "gate_mode",
                )
            told = [one.prompts for one in self.sources.experts if one.prompts is not None]
            layers = layer_count(self.module, "")
            rows = gate_vectors(
                self.sources.base,
                self.sources.names,
                told,
                mode,
                layers=layers,
                width=width,
                seed=self.request.seed,
            )
            rows = rows[[place.layer for place in self.places]].float()
        for note in near_equal(rows, self.sources.names) if mode not in RANDOM else []:
            self.notes.append(note)
            warn(note)
        found: dict[str, Tensor] = {}
        for key, row in zip(keys, rows, strict=True):
            parts = as_mlp(row) if self.request.router == "mlp" else {"weight": row}
            found |= {f"{key}.{leaf}": value.contiguous() for leaf, value in parts.items()}
        return found

    def _spectral(self) -> dict[str, Tensor]:
        """Leading right singular vectors of each expert's task vectors, of the matrices that read what the router sees."""
        base, rank = self.sources.base, self.request.gate_rank
        groups: dict[str, list[str]] = {}
        if self.request.level == "model":
            layers = range(len(self.dense), layer_count(self.module, base.where))
            places = places_of(self.module, "block", [*layers], base.where)
            everything = [path for place in places for path in self._readers(place)]
            groups["gate.router.v"] = everything
            if any(
                set(e.model.store) != set(self.sources.experts[0].model.store) for e in self.sources.experts
            ):
                raise GradmatchError(
                    "router='spectral' compares the experts with the base weight by weight, and these are models of several architectures; "
                    "choose router='linear' with prompts, or train one",
                    "models_differ",
                )
        elif self.request.rank:
            groups = {
                f"{path}.router.v": [path] for place in self.places for path in linears_of(self.module, place)
            }
        else:
            groups = {f"{place.path}.router.v": self._readers(place) for place in self.places}
        found: dict[str, Tensor] = {}
        idle = set(self.sources.names)
        for key, paths in groups.items():
            width = sizes_of(self.module.get_submodule(paths[0]))[0]
            if rank >= width:
                note = f"gate_rank={rank} reaches every direction of states of width {width}, so that all scores are equal; choose a smaller one"
                self.notes += [] if note in self.notes else [note]
                warn(note)
            squares, vectors = [], []
            for expert in self.sources.experts:
                gram = torch.zeros(width, width, dtype=torch.float64)
                for path in paths:
                    tau = self._matrix(expert.model, path) - self._matrix(base, path)
                    gram += tau.T @ tau
                values, basis = torch.linalg.eigh(gram)
                squares.append(values.flip(0)[:rank].clamp(min=0))
                vectors.append(basis.flip(1)[:, :rank].T)
            largest = max(float(one.max()) for one in squares)
            v = torch.zeros(len(squares), rank, width)
            for number, (square, vector) in enumerate(zip(squares, vectors, strict=True)):
                kept = square > NOISE**2 * largest
                v[number, : len(vector)] = (vector * kept[:, None]).float()
                idle -= {self.sources.names[number]} if kept.any() else set()
            found[key] = v
        for name in self.sources.names:
            if name in idle:
                self.notes.append(
                    f"{name} does not differ from the base where the spectral router looks, so that it is never preferred"
                )
                warn(self.notes[-1])
        return found

    def _readers(self, place: Place) -> list[str]:
        """Linear layers of a place that read states of the network's width; the last of an ffn writes them."""
        width = width_of(self.module, place)
        paths = [
            p for p in linears_of(self.module, place) if sizes_of(self.module.get_submodule(p))[0] == width
        ]
        ffn = self.request.level == "ffn" and len(paths) > 1
        return paths[:-1] if ffn and paths[-1] == linears_of(self.module, place)[-1] else paths

    def _matrix(self, model: Checkpoint, path: str) -> Tensor:
        """The weight of a linear layer, (out, in), float64."""
        value = model[f"{path}.weight"].double()
        return value if isinstance(self.module.get_submodule(path), torch.nn.Linear) else value.T

    def _low_rank(self, merged: Checkpoint) -> dict[str, Tensor]:
        """U, V and b of every linear layer: theta_e - theta_merged = U V at the best rank, and the difference of the bias."""
        rank = self.request.rank
        assert rank is not None
        found: dict[str, Tensor] = {}
        kept = {name: [0.0, 0.0] for name in self.sources.names}
        for place in self.places:
            for path in linears_of(self.module, place):
                us, vs, bs = [], [], []
                for expert in self.sources.experts:
                    delta = self._matrix(expert.model, path) - self._matrix(merged, path)
                    u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
                    size = min(rank, len(s))
                    low = torch.zeros(rank, delta.shape[0]), torch.zeros(rank, delta.shape[1])
                    low[0][:size] = (u[:, :size] * s[:size]).T
                    low[1][:size] = vh[:size]
                    us.append(low[0])
                    vs.append(low[1])
                    bias = f"{path}.bias"
                    bs.append(
                        expert.model[bias].float() - merged[bias].float()
                        if bias in merged
                        else torch.zeros(delta.shape[0])
                    )
                    kept[expert.name][0] += float(s[:size].square().sum())
                    kept[expert.name][1] += float(s.square().sum())
                found |= {
                    f"{path}.u": torch.stack(us),
                    f"{path}.v": torch.stack(vs),
                    f"{path}.b": torch.stack(bs),
                }
        for name, (part, whole) in kept.items():
            share = (part / whole) ** 0.5 if whole else 1.0
            self.notes.append(
                f"{name}: rank {rank} holds {share:.1%} of its difference from the merged weights (2-norm)"
            )
        return found


def _predicts(model: Checkpoint) -> bool:
    """Whether a model answers at every position."""
    return family_of(model) in ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")


def _plain(model: Checkpoint) -> dict[str, Any]:
    """A config as JSON has it."""
    content: dict[str, Any] = json.loads(json.dumps(dict(model.config or {}), default=str))
    return content


def check_answers(base: Checkpoint, model: Checkpoint, name: str) -> None:
    """Refuse whole models that do not read and answer alike.

    Raises:
        GradmatchError: another kind of answer, other labels or another vocabulary; both are named.
    """
    text = {"LMHeadModel": "ForCausalLM"}
    kinds = [text.get(family_of(one), family_of(one)) for one in (base, model)]
    if kinds[0] != kinds[1]:
        raise GradmatchError(
            f"{name} is a model {kinds[1] or 'without a head'}, the base one {kinds[0]}; whole models are mixed where they answer alike",
            "models_differ",
            name,
        )
    ours, theirs = _plain(base), _plain(model)
    if kinds[0] in ("ForCausalLM", "ForMaskedLM") and ours.get("vocab_size") != theirs.get("vocab_size"):
        raise GradmatchError(
            f"{name} has a vocabulary of {theirs.get('vocab_size')}, the base one of {ours.get('vocab_size')}; give models of one vocabulary",
            "vocabulary",
            name,
        )
    try:
        check_tokenizers(base, model)
    except ValueError as error:
        raise GradmatchError(f"{name}: {error}", "vocabulary", name) from error
    labels = [one.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"} for one in (ours, theirs)]
    if "Classification" in kinds[0] and labels[0] != labels[1]:
        raise GradmatchError(
            f"{name} has the labels {_listed(labels[1])}, the base {_listed(labels[0])}; whole models are mixed where they answer alike",
            "models_differ",
            name,
        )


def _listed(labels: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(labels.values())[:5])) + (", ..." if len(labels) > 5 else "")
