from __future__ import annotations

import pytest

pytest.importorskip("tensorflow")

from edgekit.converters import targets
from edgekit.errors import ConversionError

pytestmark = pytest.mark.host


@pytest.mark.parametrize("target", [None, *targets.TARGETS])
@pytest.mark.parametrize("calibrated", [True, False])
def test_choose_takes_nothing_that_a_runtime_of_the_target_runs_slowly(target: str | None, calibrated: bool) -> None:
    if target == "coral":
        return
    runtimes = targets.TARGETS[target].runtimes if target else tuple(targets.LATENCY)
    for choice in targets.choose(target, calibrated):
        assert choice.reason
        assert calibrated or choice.recipe not in ("int8", "int16x8")
        assert all(targets.LATENCY[runtime].get(choice.recipe, 1.0) < targets.SLOW for runtime in runtimes)


def test_choose_for_coral_is_int8_or_nothing() -> None:
    assert [choice.recipe for choice in targets.choose("coral", True)] == ["int8"]
    with pytest.raises(ConversionError, match="needs calibration data"):
        targets.choose("coral", False)


def test_choose_prefers_int8_where_the_cpu_gains_and_keeps_a_second_choice() -> None:
    assert [choice.recipe for choice in targets.choose("raspberry-pi-5", True)] == ["int8", "int8-weights"]
    assert [choice.recipe for choice in targets.choose("raspberry-pi-5", False)] == ["int8-weights"]
    assert [choice.recipe for choice in targets.choose("jetson-orin", True)] == ["float16"]


@pytest.mark.parametrize(
    ("target", "recipe", "words"),
    [
        ("raspberry-pi-3", "int8", "tflite-runtime about 19 x"),
        ("x86-64", "dynamic", "tflite-runtime"),
        ("coral", "float16", "int8 graphs only"),
        ("coral", "int8", ""),
        ("raspberry-pi-5", "int8", ""),
        ("raspberry-pi-3", "int8-weights", ""),
    ],
)
def test_caution_speaks_of_recipes_that_do_not_suit(target: str, recipe: str, words: str) -> None:
    said = targets.caution(target, recipe)
    assert words in said and bool(said) == bool(words)


def test_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConversionError, match=r"target 'pi'.*raspberry-pi-4"):
        targets.find("pi")


def test_accelerators_take_no_custom_operators() -> None:
    assert "nothing that comes after one" in targets.caution_custom("coral")
    assert "its CPU will run this one" in targets.caution_custom("jetson-orin")
    assert not targets.caution_custom("raspberry-pi-5")
