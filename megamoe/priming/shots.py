"""Which examples are shown before an example: the same by (seed, draw, example), whatever the ranks and batches."""

import random
from collections import Counter
from collections.abc import Sequence

from megamoe.errors import ConfigError
from megamoe.priming.examples import Example


def draw_shots(
    pool: Sequence[Example], example: Example, num_shots: int, *, seed: int, draw: int, number: int
) -> list[Example]:
    """`num_shots` different examples of `pool`, in drawn order, none of them with the text of `example`.

    number: of the example in its file. Raises ConfigError where the pool is too small.
    """
    if num_shots == 0:
        return []
    # Seeding by text and `random()` are what Python promises never to change.
    generator = random.Random(f"{seed}/{draw}/{number}")
    # One example more is drawn for each that turns out to be the example itself.
    chosen: list[Example] = []
    seen: set[int] = set()
    while len(chosen) < num_shots and len(seen) < len(pool):
        place = int(generator.random() * len(pool))
        if place not in seen:
            seen.add(place)
            if pool[place].texts != example.texts:
                chosen.append(pool[place])
    if len(chosen) < num_shots:
        raise _too_few(example, num_shots, len(chosen))
    return chosen


def check_pool(pool: Sequence[Example], examples: Sequence[Example], num_shots: int) -> None:
    """Raises ConfigError where so many shots cannot be drawn for one of the examples."""
    counts = Counter(each.texts for each in pool)
    for example in examples if num_shots else ():
        if len(pool) - counts[example.texts] < num_shots:
            raise _too_few(example, num_shots, len(pool) - counts[example.texts])


def _too_few(example: Example, num_shots: int, num_others: int) -> ConfigError:
    return ConfigError(
        f"{num_shots} shots cannot be drawn for {example.where}: its train file has {num_others} other examples"
    )
