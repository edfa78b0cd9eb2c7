"""Rows of a linear router from prompts: a vector of each expert at each of its places.

The modes of mergekit-moe, so that its recipes give the same routers, and "seen", what a router at that place really gets to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import first_line
from gradmatch.mixture.request import RANDOM, Prompts
from gradmatch.models.loading import load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.models.checkpoint import Checkpoint

CONDITION = 5.0  # of a router's rows, above which some expert will hardly be chosen
AT_ONCE = 16  # prompts that are run together


def gate_vectors(
    base: Checkpoint,
    names: Sequence[str],
    prompts: Sequence[Prompts] | None,
    mode: str,
    *,
    layers: int,
    width: int,
    seed: int = 0,
) -> Tensor:
    """One row an expert and layer, as mergekit-moe makes them. Returns (layers, experts, width), float32 (or bfloat16, of "hidden").

    "hidden": states that enter each layer, of the last token, mean over the positive prompts minus that over the negative ones, with
    norm 1; the base is run in bfloat16. "hidden_avg": over all positions, padding too. "cheap_embed": sums of token embeddings.
    "random": standard normal. "uniform_random": uniform in +-1/sqrt(width).

    Args:
        base: the model that is run.
        names: of the experts.
        prompts: one an expert; not needed for the random modes.
        mode: one of the above.
        layers: of the base.
        width: of the base.
        seed: of the random modes.

    Raises:
        GradmatchError: prompts that are missing, the same for all experts, or longer than the model's context.
    """
    if mode in RANDOM:
        generator = torch.Generator().manual_seed(seed)
        shape = (layers, len(names), width)
        if mode == "random":
            return torch.randn(shape, generator=generator)
        flat: Tensor = (2 * torch.rand(shape, generator=generator) - 1) / width**0.5
        return flat
    prompts = checked(names, prompts, mode)
    tokens = Tokens(base, front=True)
    if mode == "cheap_embed":
        embedding = base["model.embed_tokens.weight"].float()

        def summed(texts: Sequence[Any]) -> Tensor:
            """sum of the embeddings of all tokens, with norm 1; (layers, width)"""
            batch = tokens(list(texts))
            states = embedding[batch["input_ids"]] * batch["attention_mask"][..., None]
            return _normed(states.sum((0, 1))).repeat(layers, 1)

        return normalised(prompts, summed)
    module: Any = load(base).eval()
    for parameter in (
        module.parameters()
    ):  # the frequencies of positions stay in float32, as when transformers loads it so
        parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def states(texts: Sequence[Any]) -> Tensor:
        """mean over the prompts of the states that enter each layer; (layers, width)"""
        found = module(**tokens(list(texts)), output_hidden_states=True, use_cache=False).hidden_states[:-1]
        stacked = torch.stack(found)  # (layers, prompts, positions, width)
        stacked = stacked.sum(2) / stacked.shape[2] if mode == "hidden_avg" else stacked[:, :, -1]
        mean: Tensor = stacked.sum(1) / stacked.shape[1]
        return mean

    return normalised(prompts, states)


def normalised(prompts: Sequence[Prompts], vector: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """(vector of the positive prompts - vector of the negative ones) / its norm. Returns (layers, experts, width)."""
    rows = []
    for one in prompts:
        row = vector(one.positive)
        if one.negative:
            row = row - vector(one.negative)
        rows.append(_normed(row))
    return torch.stack(rows, dim=1)


def _normed(row: Tensor) -> Tensor:
    unit: Tensor = row / row.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return unit


def seen_vectors(
    module: nn.Module,
    places: Sequence[str],
    base: Checkpoint,
    names: Sequence[str],
    prompts: Sequence[Prompts] | None,
) -> Tensor:
    """v_e - mean_s v_s with norm 1, where v_e is the mean over tokens and prompts of what enters a module, minus that of negative ones.

    The mean over the experts changes no choice before the norm is set (softmax is the same for a vector that all rows share), and
    without it the rows are nearly parallel, as the states of a network are.

    Args:
        module: the base, with its weights.
        places: modules whose input is taken; without a name ("") the pooled output of the embeddings is.
        base: whose tokenizer reads the prompts.
        names: of the experts.
        prompts: one an expert.

    Returns:
        (places, experts, width), float32.

    Raises:
        GradmatchError: see `gate_vectors`.
    """
    prompts = checked(names, prompts, "seen")
    tokens = (
        Tokens(base) if any(isinstance(t, str) for p in prompts for t in (*p.positive, *p.negative)) else None
    )

    def vector(given: Sequence[Any]) -> Tensor:
        sums, count = None, 0.0
        for batch in _batches(given, tokens):
            found = inputs_of(module, places, batch)
            mask = batch.get("attention_mask")
            for_all = []
            for states in found:
                kept = _mask_of(mask, states)
                for_all.append((states * kept[..., None]).sum((0, 1)))
            count += float(_mask_of(mask, found[0]).sum())
            stacked = torch.stack(for_all)
            sums = stacked if sums is None else sums + stacked
        assert sums is not None
        return sums / count

    rows = torch.stack(
        [vector(p.positive) - (vector(p.negative) if p.negative else 0) for p in prompts], dim=1
    )
    return _normed(rows - rows.mean(1, keepdim=True))


def _mask_of(mask: Tensor | None, states: Tensor) -> Tensor:
    """1 where a position counts; (rows, positions)."""
    if mask is None or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[:2])
    return mask.to(states.dtype)


@torch.no_grad()
def inputs_of(module: nn.Module, places: Sequence[str], batch: Mapping[str, Any]) -> list[Tensor]:
    """What enters some modules as a batch is run; each (rows, positions, width), float32."""
    found: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            found[place] = states.detach().float()

        return hook

    handles = [
        module.get_submodule(place).register_forward_pre_hook(keep(place), with_kwargs=True)
        for place in places
    ]
    try:
        module.eval()(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return [found[place] for place in places]


def _batches(given: Sequence[Any], tokens: Tokens | None) -> Iterator[Mapping[str, Any]]:
    """Batches of a model's inputs: texts are read by its tokenizer, what is a batch already stays one."""
    texts = [one for one in given if isinstance(one, str)]
    for first in range(0, len(texts), AT_ONCE):
        assert tokens is not None
        yield tokens(texts[first : first + AT_ONCE])
    yield from (one for one in given if not isinstance(one, str))


class Tokens:
    """Texts as a model's inputs.

    Args:
        base: whose tokenizer it is.
        front: as mergekit-moe reads prompts: the text of the first token in front, no other special tokens, padding on the left.

    Raises:
        GradmatchError: no tokenizer, or a text longer than the model's context.
    """

    def __init__(self, base: Checkpoint, front: bool = False) -> None:
        from transformers import AutoTokenizer

        self.front, self.where, self.config = front, base.where, base.config or {}
        if base.tokenizer is None:
            raise GradmatchError(
                f"{base.where} has no tokenizer beside it to read prompts with; give the base as a folder",
                "no_tokenizer",
                base.where,
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(base.tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise GradmatchError(
                f"{base.where} has no tokenizer to read prompts with: {first_line(error)}",
                "no_tokenizer",
                base.where,
            ) from error
        if front:
            self.tokenizer.padding_side = "left"
            self.tokenizer.pad_token = self.tokenizer.bos_token or self.tokenizer.eos_token
        elif self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One padded batch."""
        begin = (self.tokenizer.bos_token or "") if self.front else ""
        batch = dict(
            self.tokenizer(
                [begin + text for text in texts],
                padding=len(texts) > 1 or self.front,
                add_special_tokens=not self.front,
                return_tensors="pt",
            )
        )
        batch.pop("token_type_ids", None) if self.front else None
        limit = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        lengths = batch["attention_mask"].sum(1)
        if limit and int(lengths.max()) > limit:
            row = int(lengths.argmax())
            raise GradmatchError(
                f"the prompt {texts[row]!r:.60} has {int(lengths[row])} tokens, and {self.where} takes {limit}; shorten it",
                "bad_prompts",
                self.where,
            )
        if int(lengths.min()) < 1:
            row = int(lengths.argmin())
            raise GradmatchError(
                f"the prompt {texts[row]!r:.60} has no token in the tokenizer of {self.where}; remove it",
                "bad_prompts",
                self.where,
            )
        return batch


def checked(names: Sequence[str], prompts: Sequence[Prompts] | None, mode: str) -> Sequence[Prompts]:
    """Prompts from which experts can be told apart.

    Raises:
        GradmatchError: an expert without prompts, or the same for all.
    """
    if prompts is None or len(prompts) < len(names):
        raise GradmatchError(
            f"gate_mode={mode!r} makes a router from prompts, and there are none; give prompts=..., one entry an expert, or gate_mode='random' "
            "and train the router",
            "bad_prompts",
            "prompts",
        )
    known = [_key(one) for one in prompts]
    if len(set(known)) == 1:
        raise GradmatchError(
            "the prompts of all experts are the same, so that nothing tells a router whom to choose; give each its own",
            "bad_prompts",
            "prompts",
        )
    for place, key in enumerate(known):
        if known.index(key) < place:
            warn(
                f"{names[known.index(key)]} and {names[place]} have the same prompts: their rows of the router are equal, and the first is "
                "chosen where both would be"
            )
    return prompts


def _key(one: Prompts) -> tuple[Any, ...]:
    return tuple(
        tuple(t if isinstance(t, str) else id(t) for t in part) for part in (one.positive, one.negative)
    )


def near_equal(rows: Tensor, names: Sequence[str]) -> list[str]:
    """Layers whose rows of a router are so alike that some expert will hardly be chosen, in words. rows: (layers, experts, width)."""
    bad = []
    for layer, one in enumerate(rows.float()):
        condition = float(torch.linalg.cond(one))
        if not condition <= CONDITION:
            unit = one / one.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            alike = (unit @ unit.T - 2 * torch.eye(len(one))).flatten().argmax()
            found = divmod(int(alike), len(one))
            bad.append((layer, condition, [names[i] for i in found if i < len(names)]))
    if not bad:
        return []
    layer, condition, pair = max(bad, key=lambda one: one[1])
    return [
        f"the rows of the router are nearly the same in {len(bad)} of {len(rows)} layers (condition number {condition:.3g} in layer {layer}, "
        f"{' and '.join(pair)}): the prompts hardly tell these experts apart, and some will rarely be chosen; give other prompts, or "
        "train the router"
    ]
