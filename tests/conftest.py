from __future__ import annotations

import os

# Threads that are done with their part would wait for the others in a loop, and keep cores from the tests beside them.
# Everything that tests start inherits it; torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests predict nothing but where they say so: measuring the machine first would take half a minute.
os.environ.setdefault("SHARDWISE_CLUSTER", "off")
