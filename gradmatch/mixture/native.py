"""The form of a mixture of ffns that transformers loads by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradmatch.common.settings import layer_of
from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.request import RANDOM, Request
from gradmatch.mixture.sources import Expert, Noisy, Sources
from gradmatch.mixture.targets import (
    PROJECTIONS,
    TARGETS,
    check_target,
    ffn_name,
    target_config,
    target_for,
)
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import MemoryStore, Renamed, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.stores import Store


def native_target(sources: Sources, request: Request) -> tuple[str, str]:
    """The architecture of transformers that holds a mixture, and why there is none; ("", "") where none was to be expected.

    Raises:
        GradmatchError: one was asked for that cannot hold it.
    """
    usual = (request.level, request.routing, request.router, request.rank) == ("ffn", "token", "linear", None)
    if request.form == "own" or (request.form == "auto" and not usual):
        return "", ""
    if not usual:
        raise GradmatchError(
            f"form={request.form!r} holds ffns that a linear router chooses by token, not level={request.level!r}, routing={request.routing!r}, "
            f"router={request.router!r}; leave form='auto'",
            "bad_target",
            "form",
        )
    layers = int((sources.base.config or {}).get("num_hidden_layers", 0))
    shared = sources.shared is not None
    name, why = target_for(request.form, sources.base, request.dense(layers) if layers else [], shared)
    if not name and (shared or any(e.noise_scale or e.residual_scale != 1 for e in sources.experts)):
        raise GradmatchError(
            f"{why}, and a shared expert, noise_scale and residual_scale are for such alone; leave them out",
            "bad_target",
            "form",
        )
    return name, why if (sources.base.config or {}).get("model_type") in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    ) else ""


class NativeForm:
    """Names, config and tensors of a Mixtral, Qwen2-MoE or Qwen3-MoE.

    Args:
        sources: base and experts.
        request: what was asked for.
        target: name of the architecture.

    Attributes:
        merged: tensors of the base that are merged.
        outside: those that are not mixed.
        inside: those that are.
        config: of config.json.
        settings: for the report.
        notes: what a reader should know.
    """

    def __init__(self, sources: Sources, request: Request, target: str) -> None:
        self.sources, self.request, self.target = sources, request, TARGETS[target]
        base = sources.base
        self.layers = int((base.config or {})["num_hidden_layers"])
        dense = request.dense(self.layers)
        self.top_k = request.experts_at_once(len(sources.experts))
        self.mixed = [layer for layer in range(self.layers) if layer not in dense]
        self.inside = [ffn_name(layer, p) for layer in self.mixed for p in PROJECTIONS]
        mixed = set(self.inside)
        self.merged = self.outside = [
            name for name in base.store if name not in mixed and name not in base.aliases
        ]
        width = sources.shared.model.spec(self.inside[0]).shape[0] if sources.shared else None
        self.config = target_config(target, base, len(sources.experts), self.top_k, dense, width)
        self.settings = {
            "level": "ffn", "routing": "token", "router": "linear", "top_k": self.top_k, "dense_layers": dense,
            "gate_mode": self._mode, "form": target, "seed": request.seed,
        }  # fmt: skip
        self.notes: list[str] = []

    @property
    def _mode(self) -> str:
        """How the routers come about: at random where there is nothing to make them of."""
        told = self.sources.experts[0].prompts is not None
        return self.request.gate_mode if told or self.request.gate_mode != "seen" else "random"

    def store(self, merged: Checkpoint) -> tuple[Store, Store]:
        """All tensors but the routers, and the routers."""
        table: dict[str, tuple[Store, str]] = {name: (merged.store, name) for name in self.outside}
        held = [(one, self._changed(one)) for one in self.sources.experts]
        for layer in self.mixed:
            for number, (expert, store) in enumerate(held):
                for projection in PROJECTIONS:
                    name = ffn_name(layer, projection)
                    key = expert.model.aliases.get(name, name)
                    table[self.target.expert(layer, number, projection)] = store, key
        routers = self._routers()
        if self.target.shared:
            table |= self._shared()
        everything = Checkpoint(
            Renamed({**table, **{name: (routers, name) for name in routers}}), config=self.config
        )
        check_target(self.config, everything)
        return Renamed(table), routers

    def sizes(self, store: Store) -> dict[str, int]:
        """Weights of the output, of the base, and of one answer."""
        base = self.sources.base
        one = sum(base.spec(name).numel for name in self.inside)
        output = sum(store.spec(name).numel for name in store)
        idle = (len(self.sources.experts) - self.top_k) * one
        count = sum(base.spec(name).numel for name in base.store if name not in base.aliases)
        return {"output": output, "base": count, "active": output - idle}

    def _changed(self, expert: Expert) -> Store:
        """The weights of an expert, with its noise and scale."""
        if not expert.noise_scale and expert.residual_scale == 1:
            return expert.model.store
        factors = {
            ffn_name(layer, p): expert.residual_scale if p == "down_proj" else 1.0
            for layer in self.mixed
            for p in PROJECTIONS
        }
        return Noisy(expert.model.store, factors, expert.noise_scale, self.request.seed)

    def _routers(self) -> MemoryStore:
        """Every layer's router, and the shared expert's gate, in the base's dtype."""
        from gradmatch.mixture.prompts import near_equal

        rows = self._rows()
        experts = len(self.sources.experts)
        if self._mode in RANDOM:
            self.notes.append(
                "the routers start at random: train them (gradmatch mix train-router), or give prompts"
            )
            if self.request.gate_mode == "seen":
                warn(self.notes[-1])
        else:
            for note in near_equal(rows, [*self.sources.names, "the shared expert"]):
                self.notes.append(note)
                warn(note)
        dtype = torch_dtype(self.sources.base.spec(self.inside[0]).dtype)
        found: dict[str, Tensor] = {}
        for layer in self.mixed:
            found[self.target.gate(layer)] = rows[layer, :experts].to(dtype).contiguous()
            if rows.shape[1] > experts:
                found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = (
                    rows[layer, experts:].to(dtype).contiguous()
                )
        return MemoryStore(found)

    def _rows(self) -> Tensor:
        """(layers, experts, width); one more row where a shared expert has a gate."""
        from gradmatch.mixture.prompts import gate_vectors, seen_vectors
        from gradmatch.models.loading import load

        base, mode = self.sources.base, self._mode
        everyone = [*self.sources.experts, *([self.sources.shared] if self.sources.shared else [])]
        names = [one.name for one in everyone]
        prompts = [one.prompts for one in everyone if one.prompts is not None] or None
        if mode == "seen":
            rows = seen_vectors(
                load(base),
                [f"model.layers.{layer}.mlp" for layer in range(self.layers)],
                base,
                names,
                prompts,
            )
        else:
            width = int((base.config or {})["hidden_size"])
            rows = gate_vectors(
                base, names, prompts, mode, layers=self.layers, width=width, seed=self.request.seed
            )
        return rows

    def _shared(self) -> Mapping[str, tuple[Store, str]]:
        """The expert that takes part in every answer; zeros where there is none."""
        import torch

        base, table = self.sources.base, {}
        if self.sources.shared:
            store = self._changed(self.sources.shared)
            for name in self.inside:
                layer, projection = layer_of(name), name.split(".")[-2]
                table[f"model.layers.{layer}.mlp.shared_expert.{projection}.weight"] = store, name
            return table
        width, zeros = int((base.config or {})["hidden_size"]), {}
        dtype = torch_dtype(base.spec(self.inside[0]).dtype)
        shapes = {"shared_expert.gate_proj": (1, width), "shared_expert.up_proj": (1, width)}
        shapes |= {"shared_expert.down_proj": (width, 1), "shared_expert_gate": (1, width)}
        for layer in self.mixed:
            for part, shape in shapes.items():
                zeros[f"model.layers.{layer}.mlp.{part}.weight"] = torch.zeros(shape, dtype=dtype)
        store = MemoryStore(zeros)
        return {name: (store, name) for name in store}
