from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from importlib import resources

import msgspec
import pytest

from edgekit.errors import EdgekitError
from edgekit.messages import (
    PAYLOADS,
    PredictionMessage,
    check_name,
    check_prefix,
    default_device_id,
    json_schema,
    timestamp,
    topic,
)

pytestmark = pytest.mark.no_runtime

PREDICTION = {
    "schema": "edgekit.prediction/1", "id": "b-17", "boot_id": "b", "seq": 17, "device": "pi-4", "stream": "door",
    "captured_at": "2026-11-22T03:04:05.678Z", "replayed": False,
    "bundle": {"name": "n", "version": "1", "sha256": "00"}, "delegate": "cpu",
    "latency_ms": {"preprocess": 0.4, "inference": 2.8, "total": 3.4},
    "predictions": [{"class_id": 3, "label": "macaw", "score": 0.91}],
}  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS)
def test_shipped_schema_is_that_of_the_payload(payload: str) -> None:
    shipped = json.loads(resources.files("edgekit").joinpath(f"schemas/{payload}.json").read_text())
    assert shipped == json_schema(payload)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_schema_describes_every_object_in_running_text(payload: str) -> None:
    for name, definition in json_schema(payload)["$defs"].items():
        description = definition["description"]
        assert description == " ".join(description.split()), name


def test_prediction_of_the_contract_is_decoded_and_encoded_again() -> None:
    message = msgspec.convert(PREDICTION, PredictionMessage)
    assert json.loads(msgspec.json.encode(message)) == PREDICTION


@pytest.mark.parametrize(
    ("field", "value"), [("seq", 0), ("device", "Pi 4"), ("captured_at", "yesterday"), ("schema", "x")]
)
def test_prediction_out_of_schema_is_refused(field: str, value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({**PREDICTION, field: value}, PredictionMessage)


@pytest.mark.parametrize("name", ["", "a/b", "a#", "+", "Pi", "ü", "a b", "a\n"])
def test_name_that_cannot_stand_in_a_topic_is_refused(name: str) -> None:
    with pytest.raises(EdgekitError, match="device id"):
        check_name(name, "device id")


def test_prefix_may_have_several_levels() -> None:
    assert topic("pi", "status", prefix=check_prefix("site-7/edgekit")) == "site-7/edgekit/pi/status"


@pytest.mark.parametrize("prefix", ["", "/", "a//b", "a/", "/a", "a/+", "a/#", "$share", "A"])
def test_prefix_that_no_topic_can_begin_with_is_refused(prefix: str) -> None:
    with pytest.raises(EdgekitError, match="prefix"):
        check_prefix(prefix)


def test_default_device_id_can_stand_in_a_topic() -> None:
    assert topic(check_name(default_device_id(), "device id"), "status").count("/") == 2


def test_timestamp_is_utc_with_milliseconds() -> None:
    at = datetime(2026, 11, 22, 4, 4, 5, 678901, timezone(timedelta(hours=1)))
    assert timestamp(at) == "2026-11-22T03:04:05.678Z"
