"""Write the built-in question-answering set: `builtin:questions-mini`, 640 + 160 questions with short answers.

    python -m benchmarks.make_questions src/tunelab/data/builtin

The same bytes every time (tests/data/test_questions.py). Three kinds: reading (a passage of four made-up facts and a
question on one of them), arithmetic in a sentence or two, and capitals. A record is `prompt` and `completion`; the
completion is the answer alone, behind a space. No question is in both splits, and no country.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "questions-mini"
SPLITS = {"train": 640, "test": 160}
SHARES = (0.6, 0.85)
"""Up to the first: reading; up to the second: arithmetic; the rest: capitals."""

Question = tuple[str, str]

PEOPLE = (
    "Ada", "Boris", "Carmen", "Dilip", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mei",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tilda", "Umar", "Vera", "Wanda", "Yusuf", "Zofia",
)  # fmt: skip
JOBS = (
    "baker", "nurse", "carpenter", "teacher", "gardener", "pilot", "cook", "tailor", "librarian", "plumber", "vet",
    "photographer", "fisher", "dentist", "bus driver", "painter",
)  # fmt: skip
TOWNS = (
    "Altbrück", "Brentmoor", "Castellón Alto", "Dunhaven", "Eastford", "Fjellvik", "Granby", "Hollowell", "Isola Verde",
    "Jasper Creek", "Kirkholm", "Lindau", "Marlow", "Northwick", "Oakridge", "Pine Falls",
)  # fmt: skip
PETS = ("cat", "dog", "parrot", "rabbit", "tortoise", "hamster", "goat", "canary", "pony", "hedgehog")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "grey", "brown")
THINGS = ("bicycle", "coat", "front door", "suitcase", "umbrella", "boat", "scarf", "teapot", "van", "kite")
FRUITS = ("apples", "pears", "plums", "oranges", "lemons", "peaches", "figs", "cherries")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CAPITALS = {
    "Argentina": "Buenos Aires", "Austria": "Vienna", "Bangladesh": "Dhaka", "Belgium": "Brussels",
    "Brazil": "Brasília", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogotá", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris",
    "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin",
    "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lebanon": "Beirut", "Lithuania": "Vilnius", "Luxembourg": "Luxembourg", "Madagascar": "Antananarivo",
    "Malta": "Valletta", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "New Zealand": "Wellington", "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Romania": "Bucharest", "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana", "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Tunisia": "Tunis",
    "Turkey": "Ankara", "Uganda": "Kampala", "Ukraine": "Kyiv", "Uruguay": "Montevideo", "Vietnam": "Hanoi",
    "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip


def reading(rng: random.Random) -> Question:
    """Four facts about two people in a random order; one is asked for."""
    first, second = rng.sample(PEOPLE, 2)
    town, job, (pet, other), colour, thing, day = (
        rng.choice(TOWNS), rng.choice(JOBS), rng.sample(PETS, 2), rng.choice(COLOURS), rng.choice(THINGS),
        rng.choice(DAYS),
    )  # fmt: skip
    facts: list[tuple[str, list[Question]]] = [
        (f"{first} works as a {job} in {town}.", [(f"Where does {first} work?", town),
                                                  (f"What is {first}'s job?", job)]),
        (f"{second} has a {pet}, and {first} has a {other}.", [(f"Which animal does {second} have?", f"a {pet}"),
                                                              (f"Who has a {other}?", first)]),
        (f"The {thing} of {second} is {colour}.", [(f"What colour is {second}'s {thing}?", colour)]),
        (f"They meet every {day}.", [(f"On which day do {first} and {second} meet?", day)]),
    ]  # fmt: skip
    question, answer = rng.choice([asked for _, found in facts for asked in found])
    rng.shuffle(facts)
    passage = " ".join(fact for fact, _ in facts)
    return f"Passage: {passage}\nQuestion: {question}\nAnswer:", f" {answer}"


def arithmetic(rng: random.Random) -> Question:
    """One or two steps with small whole numbers."""
    name, fruit = rng.choice(PEOPLE), rng.choice(FRUITS)
    a, b, c = rng.randint(6, 60), rng.randint(2, 5), rng.randint(2, 9)
    stories = (
        (f"{name} has {a} {fruit} and buys {c} more. How many {fruit} does {name} have now?", a + c),
        (f"{name} has {a} {fruit} and eats {b}. How many {fruit} are left?", a - b),
        (f"A box holds {c} {fruit}. How many {fruit} are in {b} boxes?", b * c),
        (f"{name} shares {b * c} {fruit} fairly among {b} friends. How many {fruit} does each friend get?", c),
        (f"{name} buys {b} bags of {c} {fruit} and gives {b} {fruit} away. How many {fruit} are left?", b * c - b),
    )
    question, answer = rng.choice(stories)
    return f"Question: {question}\nAnswer:", f" {answer}"


def capitals(rng: random.Random, countries: list[str]) -> Question:
    country = rng.choice(countries)
    asked = rng.choice((f"What is the capital of {country}?", f"Which city is the capital of {country}?"))
    return f"Question: {asked}\nAnswer:", f" {CAPITALS[country]}"


def questions(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Every record of both splits, no question twice."""
    rng = random.Random(seed)
    countries = sorted(CAPITALS)
    rng.shuffle(countries)
    kept = {"train": countries[len(countries) // 5 :], "test": countries[: len(countries) // 5]}
    seen: set[str] = set()
    return {split: list(_split(rng, count, kept[split], seen)) for split, count in SPLITS.items()}


def _split(rng: random.Random, count: int, countries: list[str], seen: set[str]) -> Iterator[dict[str, str]]:
    """Facts run out before the shares are filled: there are two ways to ask for each capital."""
    asked, most = 0, 2 * len(countries)
    while count:
        share = rng.random()
        makers: tuple[Callable[[], Question], ...] = (
            lambda: reading(rng), lambda: arithmetic(rng), lambda: capitals(rng, countries),
        )  # fmt: skip
        kind = 0 if share < SHARES[0] else 1 if share < SHARES[1] or asked == most else 2
        prompt, completion = makers[kind]()
        if prompt in seen:
            continue
        seen.add(prompt)
        asked += kind == 2
        count -= 1
        yield {"prompt": prompt, "completion": completion}


def write(folder: Path) -> list[Path]:
    """The files of both splits; gzip without a time, so that they are the same bytes."""
    paths = []
    for split, records in questions().items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path = folder / f"{NAME}.{split}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for written in write(parser.parse_args().folder):
        print(written)
