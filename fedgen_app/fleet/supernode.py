"""``fedgen-supernode``: Flower's SuperNode, in a process that ends when the SuperNode does.

On an answer that it does not know, such as a 500 where the SuperLink's database was locked, Flower's SuperNode ends but
for the thread that speaks to the worker. Its process would stay, connected to nothing, and nobody would start it anew.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from flwr.supernode.cli import flower_supernode


def main() -> None:
    """Run it with its own options; exit status 1 where it ends by itself."""
    sys.argv[0] = "flower-supernode"  # as its messages say
    try:
        flower_supernode()
    except SystemExit:  # it has ended its threads
        raise
    except BaseException:  # whatever it ended by: what matters is that the process ends too
        traceback.print_exc()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
