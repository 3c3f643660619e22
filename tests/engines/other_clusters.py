"""A cluster of Ray and one of Spark on this machine, which all jobs of a session of tests share."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from pathlib import Path

from daemons import Daemons, free_ports

QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Options of Java for processes that live for seconds."""

DEFAULTS = """
spark.master spark://127.0.0.1:{port}
spark.driver.host 127.0.0.1
spark.driver.bindAddress 127.0.0.1
spark.driver.extraJavaOptions {quick}
spark.executor.extraJavaOptions {quick}
spark.executor.memory 512m
"""


def ray_cluster(folder: Path) -> Daemons:
    """Start a node with room for two jobs."""
    port, client, agent = free_ports(3)
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = Daemons(folder, {"RAY_ADDRESS": f"127.0.0.1:{port}", **secret})
    node = ("--node-ip-address=127.0.0.1", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats")
    ports = (f"--port={port}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}")
    free = ("--min-worker-port=0", "--max-worker-port=0")
    try:
        cluster.start(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *node, *ports, *free)
        cluster.await_log("Ray runtime started.")
    except BaseException:
        cluster.close()
        raise
    return cluster


def spark_cluster(folder: Path) -> Daemons:
    """Start a master and two workers with two slots each."""
    found = importlib.util.find_spec("pyspark")
    assert found is not None, "pyspark is not installed: make engines"
    assert found.origin is not None
    home = Path(found.origin).parent
    (port,) = free_ports(1)
    (folder / "spark-defaults.conf").write_text(DEFAULTS.format(port=port, quick=QUICK))
    cluster = Daemons(folder, {"SPARK_CONF_DIR": str(folder)})
    cluster.environment |= {"SPARK_DAEMON_JAVA_OPTS": QUICK, "SPARK_HOME": str(home)}
    program, place = str(home / "bin" / "spark-class"), "org.apache.spark.deploy"
    try:
        cluster.start(program, f"{place}.master.Master", "--host", "127.0.0.1", "--port", str(port), *UI)
        for number in ("1", "2"):
            cluster.start(
                *(program, f"{place}.worker.Worker", f"spark://127.0.0.1:{port}", "--host", "127.0.0.1", *UI),
                *("--cores", "2", "--memory", "2g", "--work-dir", str(folder / number)),
            )
        cluster.await_log("Registering worker", times=2)
    except BaseException:
        cluster.close()
        raise
    return cluster


UI = ("--webui-port", "0")
