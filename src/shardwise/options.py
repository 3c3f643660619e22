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


def is_count(text: str) -> bool:
    """Return whether a text is a whole number from 1 to MOST."""
    try:
        return 1 <= parse_whole(text) <= MOST
    except ValueError:
        return False
