"""Puts, stores, takes and deletes messages until it is killed, and tells what it did.

``put N`` when the spool has message N; ``sent N REPLAYED DELETE`` when it was taken, before it is deleted; ``mark``.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from edgekit.devices.publish import ring, spool
from edgekit.devices.publish.spool import Spool


def main() -> None:
    path, first, seed, shared_memory = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    ring._SHARED_MEMORY = shared_memory
    spool._BATCH_S = spool._DELETE_S = 0.0
    chance = random.Random(seed)
    queue = Spool(path)
    os.write(1, b"mark\n")
    queue.mark()
    number = first
    while True:
        for _ in range(chance.randrange(1, 40)):
            if queue.put("main/prediction", b"%d " % number + b"x" * chance.randrange(900)):
                os.write(1, b"put %d\n" % number)
                number += 1
        queue.store()
        if chance.random() < 0.05:
            os.write(1, b"mark\n")
            queue.mark()
        for stored in queue.take(chance.randrange(60)):
            delete = chance.random() < 0.98
            os.write(1, b"sent %d %d %d\n" % (int(stored.payload.split()[0]), stored.replayed, delete))
            if delete:
                queue.delete(stored)


if __name__ == "__main__":
    main()
