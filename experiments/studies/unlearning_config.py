"""What a comparison of removals is told: what is to go and what must stay, the ways, the budgets, and the attack afterwards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from experiments.config import Count, Seeds, Strict, Study, Training, different, nearest
from experiments.removal.names import WAYS
from experiments.tasks.texts import Source


class Texts(Strict):
    """What is to go and what must stay as lists of texts, and the prompts that are continued."""

    remove: Source
    keep: Source
    beside: Source
    prompts: dict[str, Source] = Field(default_factory=dict)
    train: Count = 600
    validation: Count = 48
    test: Count = 96


class Facts(Strict):
    """Invented people, ten facts each; a share of them is to be forgotten; general text beside them."""

    people: int = Field(default=20, ge=3)
    share: float = Field(default=0.1, gt=0, lt=1)
    general: Source = Source(source="encyclopedic")
    general_limit: Count = 32


class Judge(Strict):
    """The second scorer: a file with pairs of a toxic text and its neutral rewrite, two columns."""

    source: str
    toxic: str = "toxic"
    neutral: str = "neutral1"
    pairs: int = Field(default=2000, ge=20)
    encoder: str = "encoder"


class Way(Strict):
    """One way to remove, and the options to choose from on validation texts (`gradmatch.subtract`'s, or of a fine-tuning)."""

    way: str
    options: tuple[dict[str, Any], ...] = ({},)

    @model_validator(mode="after")
    def _known(self) -> Way:
        if self.way not in WAYS:
            raise ValueError(f"{self.way!r} is no way to remove{nearest(self.way, WAYS)}")
        if not self.options:
            raise ValueError("options: an empty list; leave it out for the defaults")
        return self


class Relearning(Strict):
    """The attack: so many steps of AdamW over so many texts of what was removed."""

    steps: Count = 8
    texts_seen: Count = 96
    learning_rate: float = Field(default=2e-5, gt=0)


class Config(Study):
    """Keys of the config: `texts` or `facts`, the ways, and the budgets in nats a token at which they are compared.

    bad: models made independently from each seed to be taken away (with texts). looks: evaluations on validation texts that every
    way has, whatever its options. relearn: which ways are attacked and rounded afterwards.
    """

    experiment: Literal["unlearning"]
    seeds: Seeds = Field(default=(0,), min_length=1)
    model: str = "smollm2"
    texts: Texts | None = None
    facts: Facts | None = None
    max_length: int = Field(default=48, gt=4)
    learning: Training | None = None  # of the facts, before anything is removed
    training: Training  # of the bad model
    bad: Count = 1
    guard: Count = 128  # texts of the guard's curvature
    gradient: Count = 128  # texts of the gradient of what is to go
    budgets: Annotated[tuple[float, ...], AfterValidator(different)] = (0.05, 0.1)
    looks: Count = 6
    ways: dict[str, Way] = Field(min_length=1)
    relearn: tuple[str, ...] = ()
    relearning: Relearning = Relearning()
    scorer: str = "proxy"
    judge: Judge | None = None
    tokens: Count = 20
    top_p: float = Field(default=0.9, gt=0, le=1)
    compare: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.texts is None) == (self.facts is None):
            raise ValueError("give `texts` or `facts`, one of them")
        if self.facts and not self.learning:
            raise ValueError("`facts` needs `learning`: how the model learns them before they are removed")
        if not all(budget > 0 for budget in self.budgets):
            raise ValueError(f"budgets must be positive, got {list(self.budgets)}")
        for name in (*self.relearn, *(name for pair in self.compare for name in pair)):
            if name not in self.ways:
                raise ValueError(f"{name!r} is none of the ways {', '.join(self.ways)}")
        most = max(len(way.options) for way in self.ways.values())
        if self.looks < most:
            raise ValueError(f"looks is {self.looks}, and a way has {most} options: each needs one at least")
        return self
