from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import Pools


@pytest.fixture(scope="session")
def workers() -> Iterator[Pools]:
    """`workers(4, function, *args)` -> results by rank; see `pool.Pools`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pools = Pools()
    yield pools
    pools.close()
    torch.set_num_threads(threads)
