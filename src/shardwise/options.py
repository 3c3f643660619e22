"""Values of a strategy's options that are more than a word or a number.

    >>> Recompute.parse("recompute", "4/8")
    Recompute(over=1, under=2, keeps_products=False)
    >>> str(Ratio((3, 1)))
    '3:1'

They are tuples, so that a strategy is as quick to hash and to compare as its numbers are: a search does little else.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from shardwise.errors import StrategyError, nearest
from shardwise.units import parse_whole

MOST = 1_000_000
"""Largest number of workers of a strategy, and largest value of any of its numbers: more is taken for a typo."""

FLOAT32, BF16, AUTOCAST = "float32", "bf16", "autocast"
PRECISIONS = (FLOAT32, BF16, AUTOCAST)
"""Precisions in which a module computes from parameters in float32; see `workload.precision`."""

UNBOUNDED = "unbounded"


def dtype_of(precision: str) -> str:
    """Return the dtype in which products compute in a precision."""
    return BF16 if precision == AUTOCAST else precision


class Recompute(NamedTuple):
    """Blocks that the backward pass recomputes: the first `over / under` of them, a fraction in lowest terms.

    With `keeps_products`, recomputed blocks still save the results of `strategy.PRODUCTS`.
    """

    over: int
    under: int = 1
    keeps_products: bool = False

    @classmethod
    def parse(cls, option: str, text: str) -> Recompute:
        """Parse `none`, `selective`, `full` or a fraction such as `1/2`. Raises StrategyError."""
        if text in RECOMPUTE:
            return RECOMPUTE[text]
        over, slash, under = text.partition("/")
        whole = bool(slash) and is_count(over) and is_count(under)
        if not whole or not 0 < int(over) < int(under):
            raise StrategyError(
                f"{option}={text}: known are {', '.join(RECOMPUTE)} and parts of the blocks, 1/2 or 3/4 say"
                + nearest(text, list(RECOMPUTE))
            )
        return cls.part(int(over), int(under))

    @classmethod
    def part(cls, count: int, blocks: int) -> Recompute:
        """Return the value that recomputes `count` out of `blocks` blocks."""
        share = Fraction(count, blocks)  # in lowest terms, so that equal strategies are equal values
        return cls(share.numerator, share.denominator)

    @property
    def partial(self) -> bool:
        """Return whether some blocks are recomputed and others are not."""
        return 0 < self.over < self.under

    def count_of(self, blocks: int) -> int:
        """Return the number of blocks to recompute out of `blocks`, rounded up."""
        return -(-self.over * blocks // self.under)

    def __str__(self) -> str:
        return _WORDS.get(self) or f"{self.over}/{self.under}"


NONE, SELECTIVE, FULL = Recompute(0), Recompute(1, keeps_products=True), Recompute(1)
RECOMPUTE = {"none": NONE, "selective": SELECTIVE, "full": FULL}
_WORDS = {value: word for word, value in RECOMPUTE.items()}


class Ratio(tuple[int, ...]):
    """Whole numbers of 1 or more, one per replica or pipeline worker, spelled `3:1`; empty if all are equal."""

    __slots__ = ()

    @classmethod
    def parse(cls, option: str, text: str) -> Ratio:
        """Parse whole numbers with colons between them; an empty text is an empty ratio. Raises StrategyError."""
        numbers = text.split(":") if text else []
        if not all(map(is_count, numbers)):
            raise StrategyError(
                f"{option}={text}: one whole number of 1 or more each, with colons between them: {option}=2:1"
            )
        return cls(map(int, numbers))

    def check(self, option: str, count: int, what: str) -> None:
        """Check that there is one number for each of `count` `what`. Raises StrategyError."""
        if len(self) != count:
            example = Ratio([2, *[1] * (min(count, 8) - 1)])
            more = ":..." if count > 8 else ""
            raise StrategyError(
                f"{option}={self}: one whole number of 1 or more for each of the {count} {what}, "
                f"with colons between them: {option}={example}{more}"
            )

    def __str__(self) -> str:
        return ":".join(map(str, self))


EQUAL = Ratio()


class Compression(NamedTuple):
    """Compression of the gradients that replicas send: `int8`, or with a number `powersgd:4`; empty: none.

    Attributes:
        kind: one of COMPRESSIONS, or empty.
        number: the rank of `powersgd`, or the share of the elements that `topk` sends; 0 for the others.
    """

    kind: str = ""
    number: Fraction = Fraction(0)

    @classmethod
    def parse(cls, option: str, text: str) -> Compression:
        """Parse a kind with its number; an empty text is no compression. Raises StrategyError."""
        kind, colon, number = text.partition(":")
        if not text:
            return cls()
        if kind not in COMPRESSIONS:
            raise StrategyError(
                f"{option}={text}: known are powersgd:4 (a rank), topk:0.01 (a share), "
                + f"{', '.join(each for each, numbered in COMPRESSIONS.items() if not numbered)}"
                + nearest(kind, list(COMPRESSIONS))
            )
        if bool(colon) != bool(COMPRESSIONS[kind]):
            wanted = COMPRESSIONS[kind] and f"needs {COMPRESSIONS[kind]}: {option}={kind}:{_EXAMPLES[kind]}"
            raise StrategyError(f"{option}={text}: {kind} {wanted or 'has no number'}")
        if kind == "powersgd":
            if not is_count(number):
                raise StrategyError(f"{option}={text}: the rank of powersgd is a whole number of 1 or more")
            return cls(kind, Fraction(parse_whole(number)))
        return cls(kind, _share(option, text, number) if colon else Fraction(0))

    def __bool__(self) -> bool:
        return bool(self.kind)

    def __str__(self) -> str:
        if not self.number:
            return self.kind
        number = str(self.number) if self.kind == "powersgd" else f"{float(self.number):.{_DIGITS}f}".rstrip("0")
        return f"{self.kind}:{number}"


UNCOMPRESSED = Compression()

COMPRESSIONS = {"powersgd": "a rank", "topk": "a share of the elements", "int8": "", "sign": "", "fp8": "", "bf16": ""}
"""Kind of compression -> what its number is; empty if it has none."""

_EXAMPLES = {"powersgd": "4", "topk": "0.01"}

_DIGITS = 7
"""Most decimal places of a share."""


def _share(option: str, text: str, number: str) -> Fraction:
    """Parse a share above 0 and below 1, with at most seven decimal places. Raises StrategyError."""
    plain = len(number) <= 2 + _DIGITS and number.startswith("0.") and number[2:].isascii() and number[2:].isdigit()
    share = Fraction(number) if plain else Fraction(0)
    if not 0 < share < 1:
        raise StrategyError(f"{option}={text}: a share is above 0 and below 1, such as 0.01")
    return share


class Staleness(NamedTuple):
    """Steps by which a worker may be ahead of the slowest one: a whole number, or None for any number (`unbounded`)."""

    steps: int | None = 0

    @classmethod
    def parse(cls, option: str, text: str) -> Staleness:
        """Parse a whole number or `unbounded`. Raises StrategyError."""
        if text == UNBOUNDED:
            return cls(None)
        if text != "0" and not is_count(text):
            raise StrategyError(
                f"{option}={text}: must be a whole number of steps (0: synchronous), or {UNBOUNDED}"
                + nearest(text, [UNBOUNDED])
            )
        return cls(int(text))

    def __str__(self) -> str:
        return UNBOUNDED if self.steps is None else str(self.steps)


SYNCHRONOUS = Staleness()


def is_count(text: str) -> bool:
    """Return whether a text is a whole number from 1 to MOST."""
    try:
        return 1 <= parse_whole(text) <= MOST
    except ValueError:
        return False
