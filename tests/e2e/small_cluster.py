"""A cluster of several nodes on this machine, as a process: `python small_cluster.py PORT NODES` until its input ends.

A line "kill PID" on its input kills the node whose raylet has that process, as a machine that is switched off.
"""

import json
import socket
import sys
import tempfile
from pathlib import Path

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

OBJECT_STORE = 100 * 1024 * 1024


def main(port: int, num_nodes: int, folder: str) -> None:
    # Each has a folder of its own, like machines: in a shared one, nodes unpack the job's files over each other's.
    node = [
        {
            "num_cpus": 1,
            "object_store_memory": OBJECT_STORE,
            "temp_dir": str(Path(folder) / str(i)),
            "dashboard_agent_listen_port": free_port(),  # the usual one may be another Ray's on this machine
        }
        for i in range(num_nodes)
    ]
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    grows = {"labels": {"rayclip/max-gpus": "8"}}
    cluster = Cluster(initialize_head=True, head_node_args={**node[0], **head, **grows})
    write_ray_address(cluster.address, node[0]["temp_dir"])  # else a job may join another Ray of this machine
    nodes = {raylet_of(added): added for added in [cluster.add_node(**options) for options in node[1:]]}
    print(json.dumps({"address": f"http://127.0.0.1:{port}", "raylets": list(nodes)}), flush=True)
    for line in sys.stdin:
        cluster.remove_node(nodes[int(line.split()[1])], allow_graceful=False)
        print("killed", flush=True)
    cluster.shutdown()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp") as short:  # sockets in it have paths of at most 107
        main(int(sys.argv[1]), int(sys.argv[2]), short)
