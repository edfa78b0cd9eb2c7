"""Mixtures of ffns that transformers loads by itself: which architecture holds a family's weights, its config and its names in files.

The score of a router is softmax over all experts in float32, then the top k, then divided by their sum (Mixtral always; Qwen's by
norm_topk_prob). Names and keys are those that transformers 5 reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.sources import SILENT
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.structure import Structure, build

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """An architecture of transformers with a mixture in place of each ffn.

    Attributes:
        kind: class of transformers.
        families: model types whose attention and norms it has, in place of which it stands.
        prefix: of a layer's mixture in files.
        projections: name in files of each projection of an expert.
        shared: it has an expert that takes part in every answer.
        dense: it can leave layers without a mixture.
    """

    kind: str
    families: tuple[str, ...]
    prefix: str
    projections: Mapping[str, str]
    shared: bool = False
    dense: bool = True

    def expert(self, layer: int, expert: int, projection: str) -> str:
        """Name in files of one projection of one expert."""
        return f"model.layers.{layer}.{self.prefix}.experts.{expert}.{self.projections[projection]}.weight"

    def gate(self, layer: int) -> str:
        """Name in files of a layer's router."""
        return f"model.layers.{layer}.{self.prefix}.gate.weight"


SAME = {name: name for name in PROJECTIONS}
TARGETS = {
    "mixtral": Target(
        "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        dense=False,
    ),
    "qwen2_moe": Target("Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"), "mlp", SAME, shared=True),
    "qwen3_moe": Target("Qwen3MoeForCausalLM", ("qwen3",), "mlp", SAME),
}  # fmt: skip
SHARED = 1  # width of a shared expert that adds nothing


def ffn_name(layer: int, projection: str) -> str:
    """Name of a projection in the models that are mixed."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def target_for(form: str, base: Checkpoint, dense: Sequence[int], shared: bool) -> tuple[str, str]:
    """The architecture that holds a family's mixture ("" for none), and why there is none.

    Raises:
        GradmatchError: an architecture that was asked for and cannot hold it; the key or tensor is named.
    """
    family = str((base.config or {}).get("model_type"))
    asked = [form] if form not in ("auto", "own") else list(TARGETS)
    why = f"transformers has no mixture of {family} models"
    for name in asked:
        target = TARGETS[name]
        problem = ""
        if family not in target.families:
            problem = f"{name} holds mixtures of {', '.join(target.families)}, not of {family}"
        elif dense and not target.dense:
            problem = f"{name} mixes every layer and cannot leave {list(dense)} dense; qwen2_moe can"
        elif shared and not target.shared:
            problem = f"{name} has no shared expert"
        else:
            problem = _unheld(name, base)
        if not problem:
            return name, ""
        if form not in ("auto", "own") or family in target.families:
            why = problem
    if form not in ("auto", "own"):
        raise GradmatchError(
            f"{why}; form='own' holds it, which gradmatch.mixture.load reads", "bad_target", form
        )
    return "", why


def _unheld(name: str, base: Checkpoint) -> str:
    """What of a base the architecture has no place for; "" where there is nothing."""
    source = _config(base)
    plain = type(source)().to_dict()
    known = {*_kind(name).config_class().to_dict(), "max_window_layers", "use_sliding_window", "head_dim"}
    for key, value in source.to_dict().items():
        if key in known or key in SILENT or value == plain.get(key) or key in ("mlp_bias", "attention_bias"):
            continue
        if key == "layer_types" and (set(value) == {"full_attention"} or name == "qwen2_moe"):
            continue
        return f"{name} has no {key}, which is {value!r} in {base.where}"
    for tensor in base.store:
        if tensor.endswith(".bias") and not (
            (name == "qwen2_moe" and tensor.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")))
            or (name == "qwen3_moe" and ".self_attn." in tensor)
        ):
            return f"{name} has no place for {tensor!r} {base.spec(tensor)} of {base.where}"
    return ""


def _kind(name: str) -> Any:
    import transformers

    return getattr(transformers, TARGETS[name].kind)


def _config(base: Checkpoint) -> Any:
    """The base's config as transformers understands it, with old spellings brought to the new."""
    from transformers import CONFIG_MAPPING

    config = dict(base.config or {})
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def target_config(
    name: str, base: Checkpoint, experts: int, top_k: int, dense: Sequence[int], shared_width: int | None
) -> dict[str, Any]:
    """config.json of the mixture: the base's settings, as far as the architecture has them, and the mixture's."""
    source = _config(base)
    held = _kind(name).config_class()
    found = {key: value for key, value in source.to_dict().items() if key in held.to_dict()}
    if getattr(source, "head_dim", None):
        found["head_dim"] = (
            source.head_dim
        )  # of Qwen2-MoE too, where no field has it and the shapes are checked
    biased = "model.layers.0.self_attn.q_proj.bias" in base.store
    window = getattr(source, "sliding_window", None)
    if name == "mixtral":
        found |= {"num_local_experts": experts, "sliding_window": window}
    else:
        layers = source.num_hidden_layers
        types = getattr(source, "layer_types", None)
        if types is None:
            types = ["sliding_attention" if window else "full_attention"] * layers
        found |= {
            "num_experts": experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(dense),
            "moe_intermediate_size": source.intermediate_size,
            "norm_topk_prob": True,
            "use_sliding_window": bool(window),
            "sliding_window": window,
        }
        if name == "qwen2_moe":
            found |= {
                "layer_types": list(types),
                "max_window_layers": getattr(source, "max_window_layers", layers),
                "qkv_bias": biased,
                "shared_expert_intermediate_size": shared_width or SHARED,
            }
        else:
            found["attention_bias"] = bool(getattr(source, "attention_bias", False))
    found |= {"num_experts_per_tok": top_k, "output_router_logits": False}
    made = _kind(name).config_class.from_dict(found).to_dict()
    if name == "qwen3_moe":
        made |= {
            "num_experts": experts,
            "num_local_experts": experts,
        }  # readers before transformers 5 know the first
    return {**made, "architectures": [TARGETS[name].kind], "model_type": name}


def check_target(config: Mapping[str, Any], written: Checkpoint) -> None:
    """Compare every tensor with what the architecture has: all of it is given, nothing is left over.

    Raises:
        GradmatchError: a tensor that is missing, left over or of another shape.
    """
    import torch

    name = str(config["model_type"])
    with torch.device("meta"):
        known = Structure(build(_kind(name), config))
    names = known.names(written)
    given = {key: written.spec(old).shape for key, old in names.plain.items()}
    given |= {key: spec.shape for group in names.groups for key, spec in group.targets.items()}
    ties = {other for key in given if key in known.ties for other in known.ties[key]}
    for key in sorted({*given, *known.tensors}):
        wanted = tuple(known.tensors[key].shape) if key in known.tensors else None
        if given.get(key) != wanted and not (key not in given and key in ties):
            raise GradmatchError(
                f"{name}: {key!r} is {_told(wanted)} there and {_told(given.get(key))} in these models; form='own' holds it, which "
                "gradmatch.mixture.load reads",
                "bad_target",
                key,
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else str(list(shape))
