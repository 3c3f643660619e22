"""Type check of saved values against those of a fresh training, which they are to replace."""

from __future__ import annotations

from shardwise.run.jsonfile import short


def unlike(now: object, saved: object, name: str) -> str:
    """Return one line on the first saved value whose type differs from the current value's. Returns "" if all fit.

    Values are JSON values. A current value of None accepts anything. Dict entries that only one side has are ignored;
    the caller checks them.
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
