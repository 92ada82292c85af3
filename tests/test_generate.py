"""Samples that the model writes itself, and how they join the given ones."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from decoders import VOCABULARY, Toy, decoder, logits, make, own_graph, tokens
from torch import Tensor, nn

import slimgraph
from slimgraph import distributed
from slimgraph.errors import CalibrationError, EvaluationError, NumericsError, PlanError, RecipeError
from slimgraph.generate import _draw, can_generate, generate
from slimgraph.passes import Magnitude, SelfCalibration, Sweep, UniformAllocation
from slimgraph.recipe import Recipe, method
from slimgraph.state import State, attach, state_of

IDS = tokens(6, 9, seed=3)
SAME_START = torch.cat([torch.full((6, 1), 7), IDS[:, 1:]], 1)
every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])


def model_with(family: str = "llama", **settings: Any) -> Any:
    model: Any = make(family)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    return model


# -- what is written --------------------------------------------------------------------------------------------------


@every_family
def test_a_cold_model_writes_what_is_likeliest(family: str) -> None:
    model = model_with(family, eos_token_id=None)
    written = generate(model, SAME_START, 3, temperature=1e-6)
    expected = SAME_START[:3, :1]
    for _ in range(IDS.shape[1] - 1):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert written.equal(expected)


def test_a_model_that_keeps_no_cache_reads_all_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with()
    written, forward = generate(model, SAME_START, 4), model.forward
    monkeypatch.setattr(model, "forward", lambda **given: forward(**{**given, "use_cache": False}))
    assert generate(model, SAME_START, 4).equal(written)


def test_samples_follow_the_models_distribution() -> None:
    """The second token's frequencies are its probabilities."""
    model = model_with(eos_token_id=None)
    count = 4000
    written = generate(model, SAME_START[:, :2], count, seed=1)
    probabilities = logits(model, SAME_START[:1, :1])[0, -1].softmax(-1)
    found = torch.bincount(written[:, 1], minlength=VOCABULARY) / count
    assert float((found - probabilities).abs().sum()) < 0.12
    assert float((found - 1 / VOCABULARY).abs().sum()) > 0.2  # and are not just any


def test_a_drawn_token_is_drawn_as_often_as_it_is_likely() -> None:
    """Over a vocabulary of several blocks, of which the last is not full."""
    size, count = 700, 200_000
    wanted = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 2
    never = [5, 699]
    dice = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(count // 4000):
        shares = torch.rand(4000, generator=dice, dtype=torch.float64)
        drawn.append(_draw(wanted.expand(4000, size).clone(), 1.0, never, shares).flatten())
    found = torch.bincount(torch.cat(drawn), minlength=size)
    wanted[never] = -torch.inf
    expected = wanted.softmax(-1) * count
    assert not found[never].any()
    assert (((found - expected).square() / expected)[expected > 5] < 25).all()  # five deviations


def test_a_common_first_token_stays_the_first() -> None:
    assert (generate(model_with(bos_token_id=3), SAME_START, 5)[:, 0] == 7).all()


def test_of_one_sample_only_the_start_token_stays_the_first() -> None:
    assert (generate(model_with(bos_token_id=7), SAME_START[:1], 5)[:, 0] == 7).all()
    cold = generate(model_with(bos_token_id=3, eos_token_id=None), SAME_START[:1], 5, temperature=1e-6)
    assert (cold[:, 0] == logits(make(), torch.tensor([[3]]))[0, -1].argmax()).all()


def test_a_start_token_is_not_among_the_samples() -> None:
    model = model_with(bos_token_id=3, eos_token_id=None)
    written = generate(model, IDS, 4, temperature=1e-6)
    after = logits(model, torch.tensor([[3]]))[0, -1].argmax()
    assert written.shape == (4, IDS.shape[1])
    assert (written[:, 0] == after).all()


@pytest.mark.parametrize("start", [None, VOCABULARY])
def test_without_a_start_token_samples_begin_with_given_tokens(start: int | None) -> None:
    given = IDS % 5
    given[0, 0] = 4
    given[1, 0] = 0
    written = generate(model_with(bos_token_id=start), given, 40)
    assert set(written[:, 0].tolist()) == set(given.flatten().tolist())


@pytest.mark.parametrize("end", [11, [11, 12]])
def test_no_sample_ends_early(end: int | list[int]) -> None:
    model = model_with(eos_token_id=end)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token as likely as the end
    written = generate(model, SAME_START, 70)
    assert written.shape == (70, IDS.shape[1])
    assert not torch.isin(written, torch.tensor(end)).any()
    assert torch.isin(generate(model_with(eos_token_id=None), SAME_START, 70), torch.tensor(end)).any()


def test_no_token_is_the_end_where_that_is_minus_1() -> None:
    """Configurations say so that there is none."""
    last = model_with().config.vocab_size - 1
    logits = torch.zeros(1, last + 1)
    assert _draw(logits, 1.0, [-1], torch.tensor([0.9999], dtype=torch.float64)).item() == last
    assert _draw(logits, 1.0, [last], torch.tensor([0.9999], dtype=torch.float64)).item() == last - 1


def test_the_seed_decides_and_nothing_else_changes() -> None:
    model = model_with().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    first, again, other = (generate(model, SAME_START, 4, seed=seed) for seed in (5, 5, 6))
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.random.get_rng_state().equal(state)
    assert model.training
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("given", [SAME_START, IDS])
@pytest.mark.parametrize("start", [3, None])
def test_some_of_the_samples_are_what_they_are_among_all(given: Tensor, start: int | None) -> None:
    model = model_with(bos_token_id=start)
    only = torch.tensor([4, 1])
    assert generate(model, given, 6, only=only).equal(generate(model, given, 6)[only])


def test_a_low_precision_writes_text_too() -> None:
    written = generate(model_with().float(), SAME_START, 4, dtype=torch.bfloat16)
    assert written.shape == (4, IDS.shape[1])


def test_a_model_that_does_not_run_in_a_low_precision_writes_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with().float()
    own, forward = generate(model, SAME_START, 8), type(model).forward
    tried: list[torch.dtype] = []

    def picky(self: Any, **given: Any) -> Any:
        tried.append(next(self.parameters()).dtype)
        if tried[-1] == torch.bfloat16:
            raise RuntimeError("mixed dtype (CPU): expect parameter to have scalar type of Float")
        return forward(self, **given)

    monkeypatch.setattr(type(model), "forward", picky)
    assert generate(model, SAME_START, 8, dtype=torch.bfloat16).equal(own)
    assert tried[0] == torch.bfloat16
    assert set(tried[1:]) == {torch.float32}


def test_a_model_that_cannot_write_is_refused() -> None:
    assert not can_generate(Toy())
    message = "Toy has no `generate` of transformers; expected a model that can write text: take a recipe"
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)} without self_calibration"):
        generate(Toy(), IDS, 2)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_model_that_fails_with_a_cache_reads_all_again(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Whether it fails at once or where it would go on."""
    model = model_with()
    written, forward = generate(model, SAME_START, 4), model.forward

    def failing(**given: Any) -> Any:
        if given["use_cache"] and (tokens == 1 or given["past_key_values"] is not None):
            raise ValueError("no cache of this kind")
        return forward(**given)

    monkeypatch.setattr(model, "forward", failing)
    assert generate(model, SAME_START, 4).equal(written)


@pytest.mark.parametrize("fits", [4, 3, 1, 0])
def test_where_memory_runs_out_fewer_are_written_at_once(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    model = model_with()
    written, forward = generate(model, SAME_START, 7), model.forward
    tried: list[int] = []

    def cramped(**given: Any) -> Any:
        tried.append(len(given["input_ids"]))
        if len(given["input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**given)

    monkeypatch.setattr(model, "forward", cramped)
    if not fits:
        with pytest.raises(EvaluationError, match=r"^writing samples: memory ran out with a batch of 1"):
            generate(model, SAME_START, 7)
        return
    assert generate(model, SAME_START, 7).equal(written)
    assert tried[:2] == [7, 3]
    assert max(tried[tried.index(min(tried)) :]) <= fits


def test_a_model_that_fails_without_a_cache_too_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with()
    forward = model.forward

    def once(**given: Any) -> Any:
        if given["input_ids"].shape[1] > 1 or given.get("past_key_values") is not None:
            raise ValueError("no second token")
        return forward(**given)

    monkeypatch.setattr(model, "forward", once)
    message = (
        r"^LlamaForCausalLM cannot write text: ValueError: no second token; expected a model that reads "
        r"\(2, 2\) tokens and predicts the next: take a recipe without self_calibration, or the method slimllm$"
    )
    with pytest.raises(CalibrationError, match=message):
        generate(model, SAME_START, 2)


def test_a_broken_model_is_refused() -> None:
    model = model_with()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="LlamaForCausalLM cannot write text: its probabilities are not finite"):
        generate(model, SAME_START, 2)


# -- the pass ---------------------------------------------------------------------------------------------------------


def writer(given: Tensor, samples: int, only: Tensor | None = None, **_: Any) -> Tensor:
    """Stands in for a model: samples that can be told apart."""
    written = torch.arange(1000, 1000 + samples)[:, None].expand(samples, given.shape[1])
    return written if only is None else written[only]


def after(step: SelfCalibration, **state: Any) -> list[Tensor]:
    graph = attach(own_graph(decoder()), State(**{"batches": IDS.split(2), "generate": writer, **state}))
    step(graph)
    return list(state_of(graph).batches)


def rows(ids: Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, ids.tolist()))


def test_written_samples_join_the_given_ones() -> None:
    batches = after(SelfCalibration(samples=5))
    everything = torch.cat(batches)
    assert rows(everything) == rows(torch.cat([IDS, writer(IDS, 5)]))
    assert [len(b) for b in batches] == [2, 2, 2, 2, 2, 1]
    written = (everything[:, 0] >= 1000).tolist()
    assert True in written[:5]  # mixed, not one after the other
    assert False in written[5:]
    again, other = (torch.cat(after(SelfCalibration(samples=5, seed=seed))) for seed in (0, 1))
    assert again.equal(everything)
    assert not other.equal(everything)


@pytest.mark.parametrize(("given", "written"), [(32, 192), (192, 192), (500, 500)])
def test_as_many_are_written_as_are_given(given: int, written: int) -> None:
    batches = after(SelfCalibration(), batches=tokens(given, 3, seed=1).split(32))
    count = int((torch.cat(batches)[:, 0] >= 1000).sum())
    assert count == written
    assert sum(map(len, batches)) == written + min(given, 64)


def test_what_all_processes_are_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    batches = after(SelfCalibration(), batches=[tokens(150, 3, seed=1)], combine=lambda sums: 2 * sums)
    written = torch.cat(batches)[:, 0]
    assert sorted(written[written >= 1000].tolist()) == list(range(1150, 1300))


def test_few_given_samples_make_no_small_micro_batches() -> None:
    assert [len(b) for b in after(SelfCalibration(samples=7), batches=[IDS[:1]], at_once=3)] == [3, 3, 2]


def test_every_process_takes_its_share_of_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += after(SelfCalibration(samples=4), batches=[IDS[3 * rank : 3 * rank + 3]])
    assert rows(torch.cat(found)) == rows(torch.cat([IDS, writer(IDS, 4)]))


@pytest.mark.parametrize(
    ("given", "used"), [(None, [0, 1, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 3, 4]), (2, [0, 3]), (1, [0])]
)
def test_of_many_given_samples_some_are_used(given: int | None, used: list[int]) -> None:
    """Taken at even distances, as the given ones may lie text by text."""
    found = torch.cat(after(SelfCalibration(samples=5, given=given)))
    assert rows(found) == rows(torch.cat([IDS[used], writer(IDS, 5)]))


@pytest.mark.parametrize(("given", "used"), [(7, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 3, 4]), (3, [0, 1, 3])])
def test_processes_use_as_many_given_samples_together(
    monkeypatch: pytest.MonkeyPatch, given: int, used: list[int]
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += after(SelfCalibration(samples=4, given=given), batches=[IDS[3 * rank : 3 * rank + 3]])
    assert rows(torch.cat(found)) == rows(torch.cat([IDS[used], writer(IDS, 4)]))


def test_more_processes_than_given_samples_are_refused_before_any_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(CalibrationError, match=r"^self_calibration: given is 1 and there are 2 processes; expected at"):
        after(SelfCalibration(given=1), generate=lambda *_, **__: pytest.fail("it wrote"))


def test_what_was_written_does_not_count_as_given() -> None:
    graph = attach(own_graph(decoder()), State(batches=IDS.split(2), generate=writer))
    SelfCalibration(samples=4)(graph)
    with pytest.raises(PlanError, match=r"^self_calibration: another one ran before, .*: ask it for more samples, or"):
        SelfCalibration(samples=4)(graph)
    SelfCalibration(samples=3, given=None)(graph)
    expected = torch.cat([IDS, writer(IDS, 4), writer(IDS, 3)])
    assert rows(torch.cat(list(state_of(graph).batches))) == rows(expected)


def test_what_is_not_used_is_still_what_samples_begin_with() -> None:
    """Written samples are the same, however many given ones are used."""
    seen: list[Tensor] = []

    def watched(given: Tensor, samples: int, **how: Any) -> Tensor:
        seen.append(given)
        return writer(given, samples, **how)

    after(SelfCalibration(samples=4, given=1), generate=watched)
    assert seen[0].equal(IDS)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"samples": 0}, "samples is 0; expected at least 1, or null for the usual number"),
    ({"given": 0}, "given is 0; expected at least 1, or null for all"),
    ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
    ({"dtype": "int8"}, "dtype is 'int8'; expected bfloat16 or null"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(f'self_calibration: {message}')}$"):
        SelfCalibration(**fields)


def test_the_pass_says_what_is_missing() -> None:
    with pytest.raises(CalibrationError, match="needs calibration tokens to write more; found none in the state"):
        after(SelfCalibration(), batches=[])
    with pytest.raises(PlanError, match=r"needs a model that can write text: .*; found none in the state"):
        after(SelfCalibration(), generate=None)


def test_what_is_fitted_has_seen_what_was_written() -> None:
    """Pruning with the pass is pruning on the mixed tokens without it."""
    model: nn.Module = make()
    steps = (Magnitude(), slimgraph.passes.Regression(), UniformAllocation(ratio=0.1, round_to=1), Sweep())
    with_pass = slimgraph.prune(model, IDS, recipe=Recipe((SelfCalibration(samples=4, dtype=None), *steps)), batch=10)
    written = generate(model, IDS, 4)
    by_hand = slimgraph.prune(model, torch.cat([IDS, written]), recipe=Recipe(steps), batch=10)
    given_only = slimgraph.prune(model, IDS, recipe=Recipe(steps), batch=10)
    assert with_pass.model is not None
    assert by_hand.model is not None
    assert given_only.model is not None
    torch.testing.assert_close(logits(with_pass.model, IDS), logits(by_hand.model, IDS))
    assert not torch.allclose(logits(with_pass.model, IDS), logits(given_only.model, IDS))


def test_the_own_method_writes_with_its_seed() -> None:
    (step,) = [p for p in method("slimgraph", 0.2, seed=4).passes if isinstance(p, SelfCalibration)]
    assert step.seed == 4
