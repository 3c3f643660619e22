"""Files edited at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NASTY: list[Any] = [None, True, -1, 0, 1, 7, 2**31, 2**62, 10**400, 1.5, 1e308, float("nan"), "", "x", "..", "\n", "\0"]
NASTY += ["../../x", "/etc/passwd", "/dev/zero", "rank-00001.safetensors", "\ud800", "\u0661", "float32", "F64", "BOOL"]
NASTY += [[], {}, [0], [-1], [[]], [2**40, 2**40], {"file": "x"}, "__metadata__", "a" * 5000, [0] * 3000]


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(pairs):
        yield value, key
        yield from walk(entry)


def mutate_document(document: Any, dice: random.Random) -> bytes:
    """A JSON document with up to three changes."""
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        places = list(walk(document))
        if not places:
            break
        (where, key), (other, other_key) = dice.choice(places), dice.choice(places)
        nasty, another = copy.deepcopy((dice.choice(NASTY), other[other_key]))
        how = dice.randrange(6)
        if how < 3:
            where[key] = nasty
        elif how == 3:
            del where[key]
        elif how == 4:
            where[key] = another
        elif isinstance(where, dict):
            where[str(nasty)] = where.pop(key)
        else:
            where.append(nasty)
    text = json.dumps(document)
    if dice.random() < 0.03:
        text = text.replace("{", '{"deep": ' + "[" * 3000 + "]" * 3000 + ", ", 1)
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    """A file with up to four bytes changed, cut short, with something put in, or all zeros."""
    changed = bytearray(content)
    how = dice.randrange(5)
    at = dice.randrange(len(content))
    if how < 2:
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
    elif how == 2:
        del changed[at:]
    elif how == 3:
        changed[at:at] = dice.choice([b"\0", b"[" * 2000, b'{"a":', b"9" * 500, content[: dice.randrange(100)]])
    else:
        return bytes(len(content))
    return bytes(changed)
