"""The training loop: AdamW on a few parameters of a large model, in data-parallel processes, exactly resumable.

Everything random in a step, the order of records and dropout, is drawn from the seed and the step's number. Processes
share the records of a step and add up their gradients, so that their number changes rounding and dropout alone.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn import functional

from slimgraph.errors import ModelError, NumericsError
from slimgraph.finetune.checkpoints import Checkpoints, Counters
from slimgraph.finetune.processes import Processes
from slimgraph.finetune.records import IGNORED, Batch, Example, collate
from slimgraph.finetune.settings import FinetuneSettings
from slimgraph.progress import Progress

__all__ = ["Training", "learning_rate", "loss_sum", "seed_of"]

T = TypeVar("T")


class Training:
    """Trains the parameters of a model that need gradients.

    Args:
        model: called with `input_ids`, `attention_mask` and `use_cache`; returns an output with `.logits`.
        trained: its parameters that are trained, by name.
        settings: of the run.
        processes: that share the work.
        progress: shows the steps.
        teacher: a model with the same vocabulary to learn from as well, in evaluation mode.

    Attributes:
        counters: how far the run is.
        micro_batch: records that go through the model at once: the setting, or what memory left of it.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        settings: FinetuneSettings,
        processes: Processes,
        progress: Progress,
        teacher: nn.Module | None = None,
    ) -> None:
        self.counters = Counters()
        self.micro_batch = settings.micro_batch
        self._model = model
        self._trained = trained
        self._settings = settings
        self._processes = processes
        self._progress = progress
        self._teacher = teacher
        self._optimiser = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)

    def run(self, examples: Sequence[Example], checkpoints: Checkpoints, *, resume: bool = False) -> None:
        """Train on all examples for the epochs of the settings. Changes PyTorch's global generator.

        Args:
            examples: to be learned.
            checkpoints: where the run's own are written.
            resume: go on from the last of these.

        Raises:
            NumericsError: the loss or a gradient is NaN or infinite.
            ModelError: one record alone does not fit into memory.
            CheckpointError: a checkpoint cannot be written, or not be resumed from.
        """
        per_epoch = math.ceil(len(examples) / self._settings.batch)
        total = per_epoch * self._settings.epochs
        if resume:
            self.counters = checkpoints.restore(self._trained, self._optimiser)
        before, start = self.counters.seconds, time.perf_counter()
        with self._progress("fine-tune", total=total - self.counters.step) as tick:
            while self.counters.step < total:
                epoch, place = divmod(self.counters.step, per_epoch)
                rows = self._rows(len(examples), epoch, place)
                self._step([examples[row] for row in rows], learning_rate(self._settings, self.counters.step, total))
                self.counters.step += 1
                self.counters.seconds = before + time.perf_counter() - start
                every = self._settings.save_steps
                due = every and (self.counters.step % every == 0 or self.counters.step == total)
                if due and self._processes.first:
                    checkpoints.save(self.counters, self._trained, self._optimiser)
                tick()

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], model: nn.Module | None = None) -> float | None:
        """Mean loss per learned token, without teacher and dropout; None where there are no examples.

        Args:
            examples: to be predicted.
            model: another one than the one that is trained, such as the same with its adapters merged. It is left in
                evaluation mode.

        Raises:
            NumericsError: it is NaN or infinite.
            ModelError: one record alone does not fit into memory.
        """
        if not examples:
            return None
        subject = (model or self._model).eval()
        mine = _longest_first(examples[self._processes.rank :: self._processes.size])

        def total() -> Tensor:
            sums = []
            with self._progress("held-out loss", total=len(mine)) as tick:
                for batch in self._batches(mine):
                    sums.append(float(loss_sum(_logits(subject, batch), batch.labels)))
                    tick(len(batch.ids))
            return torch.tensor(sums, dtype=torch.float64).sum()

        loss = float(self._processes.sum(self._within_memory(total))) / sum(example.learned for example in examples)
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss on the held-out records is {loss}, expected a finite number: check the weights for NaN and "
                "infinity, and run in float32 or bfloat16 where float16 overflows"
            )
        return loss

    def _rows(self, count: int, epoch: int, place: int) -> list[int]:
        """Numbers of the examples of one step."""
        generator = torch.Generator().manual_seed(seed_of(self._settings.seed, epoch))
        order = torch.randperm(count, generator=generator)
        found: list[int] = order[place * self._settings.batch : (place + 1) * self._settings.batch].tolist()
        return found

    def _step(self, examples: Sequence[Example], rate: float) -> None:
        learned = sum(example.learned for example in examples)
        mine = _longest_first(examples[self._processes.rank :: self._processes.size])
        self._model.train()
        loss = self._within_memory(lambda: self._gradients(mine, learned))
        self._add_up()
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._settings.gradient_norm)
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            raise NumericsError(
                f"in step {self.counters.step + 1} the loss is {loss} and the norm of the gradients {float(norm)}, "
                "expected finite numbers: ask for a lower learning rate, or for float32 or bfloat16 instead of float16"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self.counters.tokens += sum(len(example.ids) for example in examples)

    def _gradients(self, examples: Sequence[Example], learned: int) -> float:
        """Gradients of this process's part of the mean loss over `learned` tokens; returns that part."""
        torch.manual_seed(seed_of(self._settings.seed, self.counters.step, self._processes.rank))
        self._optimiser.zero_grad()
        total = 0.0
        for batch in self._batches(examples):
            guide = None if self._teacher is None else _logits(self._teacher, batch, no_grad=True)
            logits = _logits(self._model, batch)
            loss = loss_sum(logits, batch.labels, guide, self._settings.distillation, self._settings.temperature)
            torch.autograd.backward(loss / learned)
            total += float(loss.detach()) / learned
        return total

    def _add_up(self) -> None:
        """Gradients over all processes, in one message. A projection that nothing went through has none: zero."""
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._processes.size == 1:
            return
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        summed = self._processes.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, piece in zip(gradients, torch.split(summed, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        size = self.micro_batch
        return [collate(examples[i : i + size], self._processes.device) for i in range(0, len(examples), size)]

    def _within_memory(self, work: Callable[[], T]) -> T:
        """Do the work, again with half the micro-batch each time that memory does not suffice."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                if self.micro_batch == 1:
                    raise ModelError(
                        f"one record alone does not fit into the memory of {self._processes.device}, besides the model "
                        f"({str(error).splitlines()[0] if str(error) else 'out of memory'}); ask for a smaller cutoff, "
                        "a narrower dtype, or leave out the teacher"
                    ) from error
            # Out here, where the error no longer holds on to what was being computed.
            self.micro_batch //= 2
            self._optimiser.zero_grad()
            gc.collect()
            if self._processes.device.type == "cuda":
                torch.cuda.empty_cache()


def loss_sum(
    logits: Tensor, labels: Tensor, guide: Tensor | None = None, weight: float = 0.5, temperature: float = 2.0
) -> Tensor:
    """Loss of a batch, summed over its learned tokens, in float32 (float64 for logits in float64).

    With a guide it is `(1 - weight) CE + weight T² KL(guide ‖ logits)`, both distributions softened by `T` (Hinton et
    al., arXiv 1503.02531).

    Args:
        logits: (examples, tokens, vocabulary) of the model.
        labels: (examples, tokens) int64, `IGNORED` for what is not learned; a label is predicted one token before.
        guide: (examples, tokens, vocabulary) of the teacher.
        weight: of the divergence.
        temperature: `T`.

    Raises:
        ModelError: the teacher has another vocabulary.
    """
    learned = labels[:, 1:] != IGNORED
    predicted = _wide(logits[:, :-1][learned])
    own = functional.cross_entropy(predicted, labels[:, 1:][learned], reduction="sum")
    if guide is None:
        return own
    if guide.shape != logits.shape:
        raise ModelError(
            f"the teacher knows {guide.shape[-1]} tokens and the model {logits.shape[-1]}, expected the same "
            "vocabulary; give the dense model that the pruned one was made from"
        )
    wanted = _wide(guide[:, :-1][learned])
    divergence = functional.kl_div(
        (predicted / temperature).log_softmax(-1),
        (wanted / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    return (1 - weight) * own + weight * temperature**2 * divergence


def learning_rate(settings: FinetuneSettings, step: int, total: int) -> float:
    """Of a step counted from 0: a linear rise in the warm-up, then a linear fall to 0 after the last step."""
    warmup = min(settings.warmup_steps, total // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * (total - step) / (total - warmup)


def seed_of(*numbers: int) -> int:
    """A seed from several numbers, far from those of their neighbours."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _logits(model: nn.Module, batch: Batch, *, no_grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not no_grad):
        output: Any = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _longest_first(examples: Sequence[Example]) -> list[Example]:
    """Those of about the same length side by side, for little padding; and what needs most memory first."""
    return sorted(examples, key=lambda example: len(example.ids), reverse=True)
