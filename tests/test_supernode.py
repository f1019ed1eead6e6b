"""What starts Flower's SuperNode on a device."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Where Flower's SuperNode ends: by an error or without one, and a thread stays that is no daemon.
ENDS = """
import sys, threading, time
from fedgen_app.fleet import supernode

def ends():
    threading.Thread(target=time.sleep, args=(120,)).start()
    print("ended")
    {how}

supernode.flower_supernode = ends
supernode.main()
"""


@pytest.mark.parametrize("how", ["return", "raise RuntimeError('500')"])
def test_no_thread_keeps_the_process_of_a_supernode_that_ended(how: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS.format(how=how)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stdout == "ended\n"
    assert ("RuntimeError: 500" in ended.stderr) == how.startswith("raise")


def test_its_options_are_flowers() -> None:
    code = "from fedgen_app.fleet.supernode import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "--auth-supernode-private-key" in ended.stdout
