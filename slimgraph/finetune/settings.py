"""How a model is fine-tuned, as data: the keys of a `finetune` section in a run file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from slimgraph.errors import RecipeError

__all__ = ["FinetuneSettings"]


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a LoRA run. The defaults are the published ones (SlimLLM, and LLM-Pruner where it leaves them open).

    Attributes:
        epochs: passes over the records.
        learning_rate: at its highest, after the warm-up; it falls linearly to 0 from there.
        batch: records of one optimiser step, over all processes.
        micro_batch: records that go through the model at once in one process; halved by itself where memory is short.
            It does not change what is computed, up to rounding and the draws of dropout.
        rank: of the two factors of an adapter.
        alpha: an adapter's output is scaled by `alpha / rank`.
        dropout: share of an adapter's input features that is set to zero in training.
        cutoff: tokens of a record; what is longer is cut off.
        warmup_steps: steps in which the learning rate rises linearly, at most a tenth of all steps.
        gradient_norm: gradients are scaled down to this norm.
        mask_prompt: learn the answers only, not the instructions.
        train_biases: train the biases of the adapted projections too, those that a refit added among them.
        records: use the first so many records only; None for all.
        held_out: share of the records, drawn at random, that is kept for measuring the loss.
        save_steps: steps between two checkpoints of the run; 0 for none.
        seed: of the held-out draw, the order of records, the adapters and dropout.
        distillation: with a teacher, weight of its divergence in the loss; the records' own loss has the rest.
        temperature: with a teacher, that both distributions are softened by.
    """

    epochs: int = 2
    learning_rate: float = 1e-4
    batch: int = 64
    micro_batch: int = 4
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    cutoff: int = 256
    warmup_steps: int = 100
    gradient_norm: float = 1.0
    mask_prompt: bool = True
    train_biases: bool = False
    records: int | None = None
    held_out: float = 0.04
    save_steps: int = 100
    seed: int = 0
    distillation: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "micro_batch", "rank", "alpha", "records"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "gradient_norm", "temperature"):
            value = getattr(self, name)
            _check(name, value, 0 < value < float("inf"), "a number above 0")
        for name in ("warmup_steps", "save_steps", "seed"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("dropout", "held_out"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share, 0 <= share < 1")
        _check("distillation", self.distillation, 0 <= self.distillation <= 1, "a weight from 0 to 1")
        _check("cutoff", self.cutoff, self.cutoff >= 2, "at least 2 tokens")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FinetuneSettings:
        """Read the keys of a `finetune` section; keys that are left out have their default.

        Raises:
            RecipeError: an unknown key, or a value of the wrong type or out of range.
        """
        adapter = TypeAdapter(with_config(ConfigDict(extra="forbid"))(cls))
        try:
            return adapter.validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise RecipeError(f"finetune: {where}: {first['msg']} (found {first['input']!r})") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, which `from_dict` reads."""
        return asdict(self)


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise RecipeError(f"finetune: {name} is {value}; expected {expected}")
