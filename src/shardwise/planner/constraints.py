"""Objective and constraints of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from shardwise.errors import RequestError, agreed, nearest
from shardwise.options import Recompute
from shardwise.predict.runtime.software import Software
from shardwise.strategy import CHANGES, Strategy
from shardwise.units import parse_bytes

OBJECTIVES = ("time", "memory", "money")
"""Objectives to minimize: seconds of a step, bytes of a device, US dollars of a sample."""

AXES = ("dp", "fsdp", "tp", "pp", "sp")
"""Axes that `--forbid` may name without a value, which forbids a degree above 1."""

OPTIONS = tuple(each.name for each in fields(Strategy))
"""Options of a strategy that `--fix` may set, as a strategy spells them."""

FOUND = ("shares", "speeds")
"""Options that are derived from the devices instead of searched."""

MEANS = ("local", "outer", "fragments", "delay", "ps", "staleness")
"""Options that a plan tries only on its finalists, see `planner.means`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Objective and constraints of a plan.

    Attributes:
        objective: one of OBJECTIVES.
        max_memory: bytes that a device may use. None means all that it has.
        fixed: map from an option of a strategy to the value that it must have.
        forbidden: (option, value that it must not have); an empty value forbids all but the default.
        allowed: changes of training that the strategy may bring, of `strategy.CHANGES`.
        software: software that is to run the strategy. None for Shardwise's own, which runs every one.
    """

    objective: str = "time"
    max_memory: int | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)
    forbidden: tuple[tuple[str, str], ...] = ()
    allowed: tuple[str, ...] = ()
    software: Software | None = None

    @classmethod
    def parse(
        cls,
        objective: str = "time",
        max_memory: str | None = None,
        fix: Iterable[str] = (),
        forbid: Iterable[str] = (),
        allow: Iterable[str] = (),
    ) -> Constraints:
        """Parse the constraints as the command line spells them.

            Constraints.parse(max_memory="40GiB", fix=["tp=8"], forbid=["pp", "schedule=gpipe"])

        Raises:
            RequestError: a word is unknown, or two constraints contradict each other; the message names them.
        """
        if objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise RequestError(f"objective={objective}: known are {known}{nearest(objective, OBJECTIVES)}")
        fixed = agreed("--fix", map(_fixed, _words(fix)))
        forbidden = tuple(_forbidden(text) for text in _words(forbid))
        constraints = cls(
            objective=objective,
            max_memory=None if max_memory is None else _memory(max_memory),
            fixed=fixed,
            forbidden=forbidden,
            allowed=allowed_changes(allow),
        )
        constraints._check()
        return constraints

    def _check(self) -> None:
        """Raise RequestError if no strategy can meet all constraints."""
        for option, value in self.fixed.items():
            for word, without in self.forbidden:
                if word == option and (without == value or (not without and value != _default(option))):
                    asked = f"{word}={without}" if without else word
                    raise RequestError(
                        f"--fix {option}={value} and --forbid {asked} contradict each other: leave one of them out"
                    )
        try:
            self._parse_fixed()
        except RequestError as error:
            raise RequestError(f"--fix {' --fix '.join(self._fixed_words())}: {error}") from None
        for word, without in self.forbidden:
            try:
                Constraints(fixed={word: without} if without else {})._parse_fixed()
            except RequestError as error:
                raise RequestError(f"--forbid {word}={without}: {error}") from None

    def check_software(self, software: Software | None) -> None:
        """Raise RequestError if a fixed value is one that the software never has."""
        for option, value in self.fixed.items() if software is not None else ():
            assert software is not None
            reason = software.option_refusal(option, value)
            if reason is not None:
                raise RequestError(f"--fix {option}={value} --runtime {software.abilities.name}: {reason}")

    def _parse_fixed(self) -> None:
        """Raise RequestError if no strategy has the fixed values."""
        Strategy.parse(",".join(f"{option}={value}" for option, value in self._complete().items()) or "single")

    def _complete(self) -> dict[str, str]:
        """Return the fixed options with the axes that they require, so that the values can be checked alone."""
        needs = {"sp": "tp", "zero": "fsdp", "offload": "fsdp", "bucket": "dp"}
        needs |= dict.fromkeys(("reduce", "compress"), "dp" if "fsdp" in self.fixed else "fsdp")
        needs |= dict.fromkeys(("schedule", "stages", "outermost"), "pp")
        found = dict(self.fixed)
        for option, axis in needs.items():
            if option in self.fixed and axis not in found:
                found[axis] = "2"
        if found.get("outermost") == "pp" and "fsdp" not in found:
            found.setdefault("dp", "2")
        if "stages" in found and "schedule" not in found:
            found["schedule"] = "interleaved"
        return found

    def _fixed_words(self) -> list[str]:
        return [f"{option}={value}" for option, value in self.fixed.items()]

    def permits(self, strategy: Strategy) -> bool:
        """Return whether the user allows all that a strategy changes of training."""
        return set(strategy.changes) <= set(self.allowed)

    def refusal(self, strategy: Strategy) -> str | None:
        """Return the constraint that a strategy violates. Returns None if it meets all."""
        for option, value in self.fixed.items():
            if str(getattr(strategy, option)) != value:
                return f"--fix {option}={value}"
        for option, value in self.forbidden:
            found = str(getattr(strategy, option))
            if found == value or (not value and found != _default(option)):
                return f"--forbid {option}={value}" if value else f"--forbid {option}"
        return None if self.software is None else self.software.refusal(strategy)

    def allows(self, option: str, value: object) -> bool:
        """Return whether an option may have a value, regardless of the strategy's other options."""
        text = str(value)
        if self.software is not None and not self.software.allows(option, text):
            return False
        if option in self.fixed:
            return self.fixed[option] == text
        return not any(
            word == option and (text == without or (not without and text != _default(option)))
            for word, without in self.forbidden
        )


def allowed_changes(texts: Iterable[str]) -> tuple[str, ...]:
    """Parse the changes of training that `--allow` names. Raises RequestError for an unknown one."""
    words = tuple(dict.fromkeys(_words(texts)))
    for word in words:
        if word not in CHANGES:
            raise RequestError(f"--allow {word}: known are {', '.join(CHANGES)}{nearest(word, CHANGES)}")
    return words


def _words(texts: Iterable[str]) -> Iterable[str]:
    return (word.strip() for text in texts for word in text.split(",") if word.strip())


def _default(option: str) -> str:
    return str(getattr(Strategy(), option))


def _option(text: str, name: str) -> str:
    if name not in OPTIONS:
        raise RequestError(f"{text}: unknown option {name!r}: known are {', '.join(OPTIONS)}{nearest(name, OPTIONS)}")
    return name


def _fixed(text: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    _option(f"--fix {text}", name)
    if not value:
        raise RequestError(f"--fix {text}: has no value, write --fix {name}=...")
    if name in MEANS:
        raise RequestError(
            f"--fix {text}: plan tries {name} itself, and chooses it with --allow lossy or async; for one of your own "
            f"use shardwise simulate --strategy dp=4,...,{name}={value}"
        )
    if name in FOUND:
        raise RequestError(
            f"--fix {text}: plan finds {name} itself where devices differ; for those of your own use "
            f"shardwise simulate --strategy ...,{name}={value}"
        )
    return name, str(Recompute.parse(name, value)) if name == "recompute" else value


def _forbidden(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    _option(f"--forbid {text}", name)
    if equals and not value:
        raise RequestError(f"--forbid {text}: has no value, write --forbid {name} or --forbid {name}=...")
    return name, value


def _memory(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise RequestError(f"--max-memory {text}: not a size, write 40GiB or 40GB")
    return size
