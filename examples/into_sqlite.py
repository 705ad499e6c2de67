"""Keeps every prediction of all devices in a SQLite database, each once, whatever is restarted in between.

    python examples/into_sqlite.py predictions.sqlite [--broker mqtt://hub] [--client-id NAME]

A prediction is acknowledged when the next one is asked for, so not before it is committed. The broker keeps for a week
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
TABLE = """
CREATE TABLE IF NOT EXISTS prediction (
    device TEXT, stream TEXT, boot_id TEXT, seq INTEGER, captured_at TEXT, label TEXT, score REAL, payload TEXT,
    PRIMARY KEY (device, stream, boot_id, seq)
) WITHOUT ROWID
"""


def archive(subscriber: Subscriber, database: sqlite3.Connection) -> None:
    for message in subscriber:
        assert message.prediction
        row = (
            message.device,
            message.stream,
            message.prediction.boot_id,
            message.prediction.seq,
            message.captured_at,
            message.label,
            message.score,
            json.dumps(message.payload, ensure_ascii=False),
        )
        with database:
            database.execute("INSERT OR IGNORE INTO prediction VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps predictions in a SQLite database.")
    parser.add_argument("database")
    parser.add_argument("--broker", default="mqtt://localhost")
    parser.add_argument("--client-id", default="into-sqlite", help="one for each database")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with closing(sqlite3.connect(given.database)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute(TABLE)
        subscriber = Subscriber(given.broker, client_id=given.client_id, session_expiry_s=WEEK_S, patience_s=60)
        print("receiving", file=sys.stderr)
        with suppress(KeyboardInterrupt), subscriber:
            archive(subscriber, database)
        print(subscriber.accounting, file=sys.stderr)


if __name__ == "__main__":
    main()
