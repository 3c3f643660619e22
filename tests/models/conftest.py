from __future__ import annotations

import sys
from pathlib import Path

# the workers that stay for the whole session are those of the other tests with processes
sys.path.insert(0, str(Path(__file__).parents[1] / "multiprocess"))
