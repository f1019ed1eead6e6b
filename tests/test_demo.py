"""The demo of a fleet, as whoever tries it first would start it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest
from fleets import NGINX
from helpers import FEDGEN, ROOT

pytestmark = pytest.mark.deployment


def test_the_demo_does_what_it_says_and_leaves_nothing(tmp_path: Path) -> None:
    own = {"TMPDIR": str(tmp_path), "FEDGEN_ENVIRONMENT": str(FEDGEN.parents[1])}
    options = [] if NGINX else ["--no-proxy"]
    ended = subprocess.run(
        [ROOT / "deploy" / "demo.sh", *options], capture_output=True, text=True, env=os.environ | own
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("    ok   ") == 6 and "BAD" not in ended.stdout, ended.stdout
    assert not list(tmp_path.glob("fedgen-demo.*"))
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert left == []
