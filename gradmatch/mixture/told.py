"""What making a mixture has to say: how it is built, what each expert keeps and loses, how large it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Made:
    """The report of `mix` and `stack`.

    Attributes:
        what: "a mixture of 3 experts at the ffn level", in words.
        form: the architecture that loads it, or "own": `gradmatch.mixture.load`.
        experts: names, in the order of the router's rows.
        settings: what was asked for, defaults filled in.
        weights: numbers in the output; of the base; that take part in one answer.
        lost: by expert, what is not kept of it (see `gradmatch.mixture.sources.losses`).
        notes: what a reader should know.
    """

    what: str
    form: str
    experts: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """For people.

        >>> print(Made("a stack of 6 layers", "LlamaForCausalLM", weights={"output": 200, "base": 100}).summary())
        a stack of 6 layers; loaded by LlamaForCausalLM
        200 weights, 2.00 x the base
        """
        lines = [f"{self.what}; loaded by {self.form if self.form != 'own' else 'gradmatch.mixture.load'}"]
        if self.experts:
            lines.append(f"experts: {', '.join(self.experts)}")
        if self.weights:
            output, base = self.weights["output"], self.weights["base"]
            line = f"{output:,} weights, {output / base:.2f} x the base"
            if "active" in self.weights:
                line += f"; {self.weights['active'] / base:.2f} x take part in one answer"
            lines.append(line)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def readme(made: Made, base: str, models: Sequence[str]) -> str:
    """README.md of the folder."""
    how = (
        "`transformers.AutoModelForCausalLM.from_pretrained` loads it."
        if made.form != "own"
        else "`gradmatch.mixture.load(folder)` loads it; no code lies in this folder."
    )
    listed = [f"- {name}: `{model}`" for name, model in zip(made.experts, models, strict=False)]
    lines = [f"# {made.what[0].upper()}{made.what[1:]}", "", f"Base: `{base}`. {how}", "", *listed]
    if made.lost:
        lines += ["", "| expert | mixed (2-norm to the base) | lost outside | most in |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {one['mixed']:.4g} | {one['lost']:.4g} ({one['share']:.0%}) | {one['most'] or '-'} |"
            for name, one in made.lost.items()
        ]
    return "\n".join([*lines, "", *(f"- {note}" for note in made.notes)]) + "\n"
