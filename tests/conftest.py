"""What every test needs: an identity for Flower's messages, and a cache that is not the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import settings

if TYPE_CHECKING:
    from fleets import Fleet

# Several processes share the tests: more threads than cores make all of them slow. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A time limit per example says more about the machine than about the code. The same examples in every run: a change is
# to be judged by itself, and not by what is drawn that day; HYPOTHESIS_PROFILE=default looks further.
settings.register_profile("fedgen", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fedgen"))


@pytest.fixture(autouse=True)
def task_identity() -> None:
    """Flower stamps every message with it; in a real run the process that starts an app sets it."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests, so that nothing is built twice and nothing of the user's is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three devices with warm workers; whoever breaks something mends it again."""
    from fleets import Fleet

    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running
