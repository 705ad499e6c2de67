"""Shows what `edgekit listen --json` received, and counts how often it is what the frame shows.

edgekit listen --json … | python examples/score_digits.py held-out.txt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

truth = Path(sys.argv[1]).read_text().split()
right = 0
for line in sys.stdin:
    message = json.loads(line)
    if message["topic"].endswith("/event"):
        continue
    if not message["topic"].endswith("/prediction"):
        print(f"{message['topic']}: {message['payload']}")
        continue
    payload = message["payload"]
    frame, best = payload["input"]["frame"], payload["predictions"][0]
    right += best["label"] == truth[frame]
    if frame % 20 == 0 or best["label"] != truth[frame]:
        print(f"{message['topic']}: frame {frame:3} is {best['label']} ({best['score']:.2f}), shows {truth[frame]}")
if right < 0.9 * len(truth):
    sys.exit(f"only {right} of {len(truth)} held-out frames named rightly: expected at least 90 %")
print(f"{right} of {len(truth)} held-out frames named rightly ({right / len(truth):.1%})")
