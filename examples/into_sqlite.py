"""Keeps every prediction and event of all devices in a SQLite database, each once, whatever is restarted in between.

    python examples/into_sqlite.py predictions.sqlite [--broker mqtt://hub] [--client-id NAME]

An event is a row with the times of its begin and its end. Where ended_at is NULL, the label is still held, or its
device died: then there are later rows of the device and stream with another boot_id.

A message is acknowledged when the next one is asked for, so not before it is committed. The broker keeps for a week
what comes while this is away; Mosquitto no more than its max_queued_messages. Certificates and a password come from
the variables EDGEKIT_MQTT_CAFILE, _CERT, _KEY, _USERNAME and _PASSWORD_FILE.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import sys
from contextlib import closing, suppress

from edgekit import Subscriber

WEEK_S = 7 * 24 * 3600
TABLES = """
CREATE TABLE IF NOT EXISTS prediction (
    device TEXT, stream TEXT, boot_id TEXT, seq INTEGER, captured_at TEXT, label TEXT, score REAL, payload TEXT,
    PRIMARY KEY (device, stream, boot_id, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS event (
    device TEXT, stream TEXT, event_id TEXT, boot_id TEXT, label TEXT, began_at TEXT, ended_at TEXT,
    PRIMARY KEY (device, stream, event_id)
) WITHOUT ROWID;
"""
PREDICTION = "INSERT OR IGNORE INTO prediction VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
EVENT = """
INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, stream, event_id) DO UPDATE
SET began_at = coalesce(began_at, excluded.began_at), ended_at = coalesce(ended_at, excluded.ended_at)
"""


def archive(subscriber: Subscriber, database: sqlite3.Connection) -> None:
    for message in subscriber:
        of = message.device, message.stream
        with database:
            if prediction := message.prediction:
                payload = json.dumps(message.payload, ensure_ascii=False)
                row = (prediction.boot_id, prediction.seq, message.captured_at, message.label, message.score, payload)
                database.execute(PREDICTION, of + row)
            elif event := message.event:
                times = (event.at, None) if event.event == "begin" else (None, event.at)
                database.execute(EVENT, (*of, event.event_id, event.boot_id, event.label, *times))


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps predictions and events in a SQLite database.")
    parser.add_argument("database")
    parser.add_argument("--broker", default="mqtt://localhost")
    parser.add_argument("--client-id", default="into-sqlite", help="one for each database")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with closing(sqlite3.connect(given.database)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(TABLES)
        subscriber = Subscriber(
            given.broker,
            kinds=("prediction", "event"),
            client_id=given.client_id,
            session_expiry_s=WEEK_S,
            patience_s=60,
        )
        print("receiving", file=sys.stderr)
        with suppress(KeyboardInterrupt), subscriber:
            archive(subscriber, database)
        print(subscriber.accounting, file=sys.stderr)


if __name__ == "__main__":
    main()
