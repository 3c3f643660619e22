"""Whether saved values can take the place of those that a fresh training has: compared by their kinds."""

from __future__ import annotations

from shardwise.run.jsonfile import short


def unlike(now: object, saved: object, name: str) -> str:
    """Return one line on the first saved value of another kind than the one there is now; empty where all fit.

    Values are those of JSON. Where nothing is known now (None), anything fits; entries that are new or gone are for the
    reader of the values to judge.
    """
    if isinstance(now, dict) and isinstance(saved, dict):
        pairs = [(now[key], saved[key], f"{name}.{key}") for key in now if key in saved]
    elif isinstance(now, list) and isinstance(saved, list):
        pairs = [(now[min(n, len(now) - 1)], value, f"{name}[{n}]") for n, value in enumerate(saved) if now]
    else:
        return "" if _fits(now, saved) else f"{name} is {short(saved)}, here it is {short(now)}"
    return next(filter(None, (unlike(*pair) for pair in pairs)), "")


def _fits(now: object, saved: object) -> bool:
    if now is None:
        return True
    if isinstance(now, bool | dict):
        return saved is None or type(saved) is type(now)
    if isinstance(now, int | float):
        return type(saved) in (int, float)
    return type(saved) is type(now)
