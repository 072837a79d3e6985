"""Write a .jsonl of short made-up dialogues, for measuring what the size of the data costs.

    python benchmarks/make_dialogues.py 1000000 /tmp/million.jsonl

The same count and seed give the same bytes. A record has one to three exchanges, about 60 words in all, and they hardly
repeat: words are drawn by Zipf's law from a vocabulary of made-up ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]


def dialogues(count: int, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """`count` records of the shape `messages`."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            for role, longest in (("user", 20), ("assistant", 40)):
                text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(3, longest)))
                messages.append({"role": role, "content": text.capitalize() + "."})
        yield {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with options.path.open("w", encoding="utf-8") as file:
        for record in dialogues(options.count, options.seed):
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
