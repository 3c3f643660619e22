from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import Pools, Servers


@pytest.fixture(scope="session")
def workers(request: pytest.FixtureRequest) -> Iterator[Pools]:
    """`workers(4, function, *args)` -> results by rank; see `pool.Pools`.

    A test module whose workers need what takes long to import names it: PRELOAD = ("package.module", ...).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    preload = {name for module in modules for name in getattr(module, "PRELOAD", ())}
    pools = Pools(Servers(sorted(preload)))
    yield pools
    pools.close()
    torch.set_num_threads(threads)
