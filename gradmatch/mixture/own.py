"""The form of every mixture that no architecture of transformers has: the tensors of `gradmatch.mixture.building.make`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.answers import check_answers, plain_config, predicts
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
from gradmatch.mixture.prompts import gate_vectors, near_equal, seen_vectors
from gradmatch.mixture.request import RANDOM, Request
from gradmatch.mixture.routers import as_mlp
from gradmatch.mixture.sources import Sources
from gradmatch.mixture.spectral import directions, low_rank, readers
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.loading import load
from gradmatch.models.stores import MemoryStore, Renamed, equal
from gradmatch.models.structure import structure

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.stores import Store

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
        if request.routing == "token" and request.level == "model" and not predicts(base):
            raise GradmatchError(
                f"a choice for every token is one of many answers, and {where} gives one a sample; choose routing='sample'",
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
            name
            for name in names
            if name not in held and all(_like(e.model, base, name) for e in self.sources.experts)
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
            **self.settings, "experts": self.sources.names, "trunk": plain_config(self.sources.base), "shared": self._shared,
        }  # fmt: skip
        if self.request.level == "model":
            told |= {
                "models": [plain_config(one.model) for one in self.sources.experts],
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
        more: dict[str, Tensor] = {}
        if request.rank:
            more, notes = low_rank(self.sources, self.module, self.places, merged, request.rank)
            self.notes += notes
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
            if level == "model" or not predicts(self.sources.base):
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
        """The directions that a spectral router looks along, at each of its places."""
        base, where = self.sources.base, self.sources.base.where
        groups: dict[str, list[str]] = {}
        if self.request.level == "model":
            layers = range(len(self.dense), layer_count(self.module, where))
            places = places_of(self.module, "block", [*layers], where)
            groups["gate.router.v"] = [
                path for place in places for path in readers(self.module, place, "block")
            ]
            names = [path + ".weight" for path in groups["gate.router.v"]]
            if not all(_like(one.model, base, name) for one in self.sources.experts for name in names):
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
            groups = {f"{p.path}.router.v": readers(self.module, p, self.request.level) for p in self.places}
        found, notes = directions(self.sources, self.module, groups, self.request.gate_rank)
        self.notes += notes
        return found


def _like(model: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Whether a model has a tensor of the base in its shape."""
    return name in model and model.spec(name).shape == base.spec(name).shape
