"""Mutations without coverage, from a seed: what the tests run, and every machine can."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

INTERESTING = (
    0,
    1,
    7,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Some bytes changed, numbers overwritten by interesting ones, pieces cut out, doubled, or taken from another."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        choice = rng.randrange(6)
        if choice == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif choice == 1:
            size = rng.choice((1, 2, 4, 8))
            changed[at : at + size] = (rng.choice(INTERESTING) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif choice == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif choice == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 80)]
        elif choice == 4:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            changed[at:at] = other[begin : begin + rng.randrange(1, 120)]
        elif at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed[:65536])


def inputs(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """All seeds as they are, then so many mutations of them: always the same ones."""
    yield from seeds
    rng = random.Random(seed)
    for _ in range(count):
        yield mutated(rng, rng.choice(seeds), seeds)
