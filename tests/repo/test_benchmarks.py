"""The benchmarks refuse wrong results, count their rounds, and call a missed target missed."""

import pytest
import torch

from benchmarks import chain_gate
from benchmarks.chain_cases import ATTENTIONS, GAMMA, both, fits, inputs
from benchmarks.chain_page import chain_tables
from benchmarks.registry import alternate, ratio, target
from benchmarks.table import markdown, missed, printed


def test_the_gate_lets_the_right_result_pass():
    assert chain_gate.gate.__wrapped__(2, 70) < 1e-5


@pytest.mark.parametrize("part", range(4))
def test_the_gate_stops_a_wrong_output_or_gradient(part, monkeypatch):
    """Negative control: one tensor of the four is off by 1e-4 of its size, or is nan."""
    for factor in (1 + 1e-4, float("nan")):

        def wrong(*args, factor=factor):
            return tuple(tensor * factor if index == part else tensor for index, tensor in enumerate(both(*args)))

        monkeypatch.setattr(chain_gate, "both", wrong)
        with pytest.raises(AssertionError, match="chain attention at B = 1, T = 20 is wrong"):
            chain_gate.gate.__wrapped__(1, 20)


def test_the_baselines_are_what_they_are_called():
    chain_gate.gate_baselines.__wrapped__(33)


@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_the_oracle_of_long_sequences_is_that_of_the_package(tokens):
    parts, cotangent = inputs(1, tokens)
    one = [tensor.detach()[:, :1].double() for tensor in (*parts, cotangent)]
    for found, exact in zip(chain_gate.by_hand(*one, rows=50), chain_gate.oracle(*one), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_inputs_are_the_same_in_every_call():
    (first, cotangent), (second, again) = inputs(2, 8), inputs(2, 8)
    assert all(map(torch.equal, [*first, cotangent], [*second, again]))
    assert set(ATTENTIONS) == {"chain", "sdpa", "eager", "naive"}
    assert 0 < GAMMA < 1


def test_what_does_not_fit_is_left_out():
    assert fits(16, 512)
    assert not fits(1, 4096)


def test_alternation_ends_with_the_time_but_not_before_the_least_number_of_rounds():
    times = alternate({"a": lambda: None, "b": lambda: None}, rounds=9, least=4, seconds=0.0)
    assert [len(values) for values in times.values()] == [4, 4]
    assert len(alternate({"a": lambda: None}, rounds=3, warm=False)["a"]) == 3
    figures = ratio({"a": [2.0, 4.0, 6.0], "b": [1.0, 1.0, 1.0]}, "a", "b")
    assert (figures["ratio"], figures["quartiles"], figures["rounds"]) == (4.0, [2.0, 6.0], 3)


def test_a_target_that_is_just_reached_is_met():
    assert target(2.0, at_most=2)["verdict"] == target(2.0, at_least=2)["verdict"] == "met"
    assert target(2.1, at_most=2)["verdict"] == target(1.9, at_least=2)["verdict"] == "missed"
    assert target(float("nan"), at_most=2)["verdict"] == "missed"
    assert target(1.0) == {"target": "-", "verdict": "-"}


def rows(value):
    figures = {"ratio": value, "quartiles": [1.0, 2.0], "rounds": 5}
    time = {"part": "time", "case": "forward", "batch": 4, "tokens": 512, **figures, "eager_ratio": 2.0}
    yield {**time, "naive_ratio": "does not fit", **target(value, at_most=1.5)}
    yield {"part": "curve", "tokens": 1024, "extra_MiB": 20.0}
    yield {"part": "curve", "case": "exponent of time", "exponent": value, **target(value, at_most=2.1)}


def test_the_section_names_every_missed_target(capsys):
    blocks = chain_tables(list(rows(1.0)))
    assert blocks[0] == "2 of 2 targets are met."
    blocks = chain_tables(list(printed(rows(3.0))))
    assert blocks[0].startswith("0 of 2 targets are met. Missed: time, forward, batch 4, tokens 512 (<= 1.5);")
    assert "**3 (1 to 2) missed**" in "".join(blocks)
    assert capsys.readouterr().out.count("-- curve") == 1


def test_a_missed_target_is_in_bold():
    row = {"case": "forward", **target(3.0, at_most=2)}
    assert missed([row]) == ["forward (<= 2)"]
    assert markdown([row]).endswith("| forward | <= 2 | **missed** |")
