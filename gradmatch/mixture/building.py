"""The module of a mixture from its config: which parts of a network are experts' places, and the network with experts in them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from gradmatch.common.settings import FIRST
from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.caches import shift
from gradmatch.mixture.modules import LowRank, Mixed, sizes_of
from gradmatch.mixture.routers import Context, make_router
from gradmatch.mixture.whole import ModelMixture, Stop
from gradmatch.models.structure import architecture, build

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint

MODEL_TYPE = "gradmatch_mixture"
FFNS = ("mlp", "ffn", "feed_forward", "feedforward")
MOST = 0.5  # of the largest stack's weights, from which a second one is a second stack


@dataclass(frozen=True)
class Place:
    """Where experts stand in a network.

    Attributes:
        path: of the module that they replace.
        parts: (name within an expert, path of a module of the network that it is made of); one without a name: the expert itself.
        through: modules that let their input pass, since the experts hold what they did.
        layer: number of the layer.
        reads: module of the network whose input the router sees.
    """

    path: str
    parts: tuple[tuple[str, str], ...]
    through: tuple[str, ...]
    layer: int
    reads: str

    def expert(self, name: str, number: int) -> str | None:
        """Name, in the mixture, of a network's tensor as an expert has it; None where it is none of this place's."""
        for inner, path in self.parts:
            if name.startswith(path + "."):
                rest = name[len(path) + 1 :]
                return ".".join(filter(None, (self.path, "experts", str(number), inner, rest)))
        return None


def stack_of(module: nn.Module, where: str) -> str:
    """The path of a network's layers.

    Raises:
        GradmatchError: none, or two of about one size (an encoder and a decoder).
    """
    found: dict[str, int] = {}
    for path, one in module.named_modules():
        alike = isinstance(one, nn.ModuleList) and len({type(layer) for layer in one}) == 1
        if alike and not any(path.startswith(f"{other}.") for other in found):
            found[path] = sum(p.numel() for p in one.parameters())
    ordered = sorted(found, key=lambda path: -found[path])
    if not ordered or (len(ordered) > 1 and found[ordered[1]] > MOST * found[ordered[0]]):
        raise GradmatchError(
            f"{where} has {len(ordered)} stacks of layers ({', '.join(ordered[:3]) or 'none'}), and a mixture needs one",
            "bad_model",
            where,
        )
    return ordered[0]


def places_of(module: nn.Module, level: str, layers: Sequence[int], where: str) -> list[Place]:
    """The places of experts in the given layers.

    Raises:
        GradmatchError: layers whose ffn is no module of its own, or is a mixture already.
    """
    stack = stack_of(module, where)
    found = []
    for layer in layers:
        path = f"{stack}.{layer}"
        if level == "block":
            found.append(Place(path, (("", path),), (), layer, path))
            continue
        block = module.get_submodule(path)
        name = next((name for name in FFNS if isinstance(getattr(block, name, None), nn.Module)), None)
        if name is not None:
            if any("experts" in inner for inner, _ in block.get_submodule(name).named_modules()):
                raise GradmatchError(
                    f"{where} is a mixture already: {path}.{name} has experts; level='model' mixes it",
                    "bad_model",
                    where,
                )
            found.append(Place(f"{path}.{name}", (("", f"{path}.{name}"),), (), layer, f"{path}.{name}"))
        elif hasattr(block, "intermediate") and hasattr(getattr(block, "output", None), "dense"):
            first, second = f"{path}.intermediate", f"{path}.output.dense"
            found.append(Place(second, (("0", first), ("1", second)), (first,), layer, first))
        else:
            raise GradmatchError(
                f"the ffn of {where} is no module of its own in {type(block).__name__} ({', '.join(n for n, _ in block.named_children())}); "
                "level='block' or 'model' can mix it",
                "bad_model",
                path,
            )
    return found


def linears_of(module: nn.Module, place: Place) -> list[str]:
    """Paths of the linear layers in a place."""
    found = []
    for _, path in place.parts:
        for inner, one in module.get_submodule(path).named_modules():
            if isinstance(one, nn.Linear) or type(one).__name__ == "Conv1D":
                found.append(".".join(filter(None, (path, inner))))
    return found


def layer_count(module: nn.Module, where: str) -> int:
    """Number of layers of a network."""
    return len(module.get_submodule(stack_of(module, where)))  # type: ignore[arg-type]


def trunk_names(module: nn.Module, layer: int, where: str) -> list[str]:
    """Tensors that states go through before they enter a layer: the embeddings, and the layers below."""
    stack = stack_of(module, where)
    below = tuple(f"{stack}.{n}." for n in range(layer))
    return [
        name
        for name in module.state_dict()
        if name.startswith(below) or (not name.startswith(f"{stack}.") and FIRST.search(name))
    ]


def make(settings: Mapping[str, Any]) -> nn.Module:
    """A mixture's module with new values; the model of transformers with experts in its places, or a `ModelMixture`.

    Args:
        settings: what config.json says under "mixture".
    """
    routed = {"top_k": settings["top_k"], "sample": settings["routing"] == "sample"}
    count = len(settings["experts"])

    def router(width: int) -> nn.Module:
        return make_router(settings["router"], count, width, settings["gate_rank"])

    trunk: Any = build(architecture(settings["trunk"]), settings["trunk"]).float()
    where = str(settings["trunk"].get("model_type"))
    if settings["level"] == "model":
        width = trunk.config.hidden_size if hasattr(trunk.config, "hidden_size") else trunk.config.n_embd
        cut(trunk, settings["first"], settings["trunk_names"], where)
        experts = [build(architecture(config), config).float() for config in settings["models"]]
        return ModelMixture(experts, trunk, router=router(width), place="model", **routed)
    context = Context()
    context.configs = [trunk.config] * count
    layers = layer_count(trunk, where)
    mixed = [n for n in range(layers) if n not in settings["dense_layers"]]
    for place in places_of(trunk, settings["level"], mixed, where):
        if settings["rank"]:
            for path in linears_of(trunk, place):
                base = trunk.get_submodule(path)
                gate = router(sizes_of(base)[0])
                low = LowRank(
                    base, settings["rank"], router=gate, place=path, experts=count, context=context, **routed
                )
                trunk.set_submodule(path, low)
            continue
        parts = [trunk.get_submodule(path) for _, path in place.parts]
        expert = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        width = width_of(trunk, place)
        experts = [expert, *(copy.deepcopy(expert) for _ in range(count - 1))]
        for number, one in enumerate(experts):
            shift(one, number * layers)
        for path in place.through:
            trunk.set_submodule(path, nn.Identity())
        one_choice = Mixed(
            experts,
            settings["level"] == "block",
            router=router(width),
            place=place.path,
            context=context,
            **routed,
        )
        trunk.set_submodule(place.path, one_choice)
    trunk.register_forward_pre_hook(context.enter, with_kwargs=True)
    trunk.gradmatch_context = context
    module: nn.Module = trunk
    return module


def width_of(module: nn.Module, place: Place) -> int:
    """Width of the states that enter a place: what its first linear layer takes."""
    return sizes_of(module.get_submodule(linears_of(module, place)[0]))[0]


def cut(trunk: nn.Module, layer: int, kept: Sequence[str], where: str) -> None:
    """End a network before a layer, and drop the parameters behind it."""
    stack = trunk.get_submodule(stack_of(trunk, where))
    assert isinstance(stack, nn.ModuleList)
    del stack[layer:]
    stack.append(Stop())
    wanted = set(kept)
    for path, one in list(trunk.named_modules()):
        for leaf in list(one._parameters):
            if ".".join(filter(None, (path, leaf))) not in wanted:
                one._parameters[leaf] = None


def family_of(checkpoint: Checkpoint) -> str:
    """What a model answers with: the end of its class's name."""
    kind = architecture(checkpoint.config)
    name = kind.__name__ if kind else ""
    return (
        "For" + name.partition("For")[2]
        if "For" in name
        else "LMHeadModel"
        if name.endswith("LMHeadModel")
        else ""
    )
