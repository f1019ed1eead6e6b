"""``python -m fedgen_app.fleet.nodes CONNECTION``: a SuperLink's nodes with their public keys, as JSON.

``flwr supernode list`` leaves the keys out. The names of Flower's that this calls hold for Flower 1.41, which the
package pins.
"""

from __future__ import annotations

import sys

from flwr.cli.utils import cli_output_control_client, flwr_cli_exc_handler, print_json_to_stdout
from flwr.proto.control_pb2 import ListNodesRequest


def main(superlink: str) -> None:
    """Print them, or Flower's error, as the commands of ``flwr`` do with ``--format json``."""
    with cli_output_control_client(superlink, "json") as (client, _), flwr_cli_exc_handler():
        found = client.ListNodes(ListNodesRequest()).nodes_info
        nodes = [
            {"node": str(n.node_id), "name": n.name, "key": n.public_key.decode(), "status": n.status} for n in found
        ]
        print_json_to_stdout({"success": True, "nodes": nodes})


if __name__ == "__main__":
    main(sys.argv[1])
