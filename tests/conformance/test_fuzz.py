"""Malformed calls are refused with an error of the one form, and nothing changes."""

import numpy as np
import pytest
from bad_input import fuzz
from bad_input.malformed import Call, sound_calls, spoils_of
from paged_mlx import fast

SPOILT = [(i, name) for i, call in enumerate(sound_calls()) for name in spoils_of(call)]


@pytest.mark.parametrize("call", sound_calls(), ids=lambda call: call.op)
def test_sound_call_is_accepted(call):
    getattr(fast, call.op)(**call.copy().arguments)


@pytest.mark.parametrize("number, name", SPOILT, ids=str)
def test_spoilt_call_is_refused_in_the_one_form(number, name):
    rng = np.random.default_rng(0)
    for _ in range(8):
        call = sound_calls()[number]
        spoils_of(call)[name](call.arguments, rng)
        mistake = fuzz.refuse(call, name)
        assert mistake is None, str(mistake)


def test_random_tables_are_refused_exactly_when_they_are_not_sound():
    calls = list(fuzz.random_tables(3000))
    sound = sum(fuzz.is_sound(call.arguments) for call in calls)
    assert 1000 < sound < 2000
    mistakes = [mistake for call in calls if (mistake := fuzz.decide(call))]
    assert not mistakes, str(mistakes[0])


@pytest.mark.long
def test_one_hundred_thousand_malformed_calls_are_refused():
    mistakes = fuzz.run(100_000)
    assert not mistakes, str(mistakes[0])


def test_fuzzer_sees_a_call_that_is_wrongly_accepted(monkeypatch):
    monkeypatch.setattr(fast, "plan", lambda **arguments: None)
    assert any(mistake.answer == "accepted" for mistake in fuzz.run(50))


def test_fuzzer_sees_an_error_of_another_form(monkeypatch):
    def refuse_carelessly(**arguments):
        raise ValueError("bad input")

    monkeypatch.setattr(fast, "plan", refuse_carelessly)
    mistakes = fuzz.run(50)
    assert any("another form" in mistake.answer for mistake in mistakes)
    assert any("refused" in mistake.answer for mistake in mistakes)


def test_a_mistake_prints_the_call_that_shows_it():
    call = Call("plan", {"block_tables": np.array([[1]], np.int32), "causal": True})
    text = fuzz.Mistake(call, "nothing", "accepted").snippet
    assert text.endswith("fast.plan(block_tables=np.array([[1]], np.int32), causal=True)")
