"""A device installs little: what a simulation or a server needs is not imported on a client's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from helpers import tiny_data, tiny_model

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("ray", "torchvision", "torch_fidelity", "diffusers", "sklearn", "matplotlib", "flwr_datasets", "PIL", "scipy")
# A client of a language run with those packages out of reach: roll call, a round, and its personal adapter.
CLIENT = """
import json, sys
from importlib.machinery import PathFinder

absent = set(json.loads(sys.argv[1]))

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import client_app
from fedgen_app.federation import wire
from fedgen_app.federation.roster import ROLL_CALL
from fedgen_app.federation.strategy import PERSONALISE, TRAIN
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.settings import Settings, own_defaults

TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
config = own_defaults() | {"backbone": sys.argv[2], "sequence-length": 32, "dtype": "float32", "max-steps": 2}
node = {"client-id": "pi", "data": sys.argv[3], "state-dir": sys.argv[4]}
context = Context(run_id=1, node_id=1, state=RecordDict(), run_config=config, node_config=node)
start = wire.Parcel(open_backbone(Settings.from_run_config(config)).fresh(0))
told = {}
for kind in (ROLL_CALL, TRAIN, PERSONALISE):
    content = wire.instruction(start, "fp32", {wire.ROUND: 1, wire.RUN: "small-0001"})
    reply = client_app.app(Message(RecordDict() if kind == ROLL_CALL else content, 1, kind), context)
    assert not reply.has_error(), (kind, reply.error)
    told[kind] = sorted(reply.content)
print(json.dumps({"told": told, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_a_client_needs_nothing_of_a_simulation(tmp_path: Path) -> None:
    arguments = [json.dumps(ABSENT), str(tiny_model()), str(tiny_data()), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["told"]["train"] == ["arrays", "metrics", "reply"]
    assert not set(found["loaded"]) & set(ABSENT)
    assert (tmp_path / "small-0001" / "pi" / "adapter_model.safetensors").is_file()


def test_what_a_client_imports_is_what_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = " ".join(project["dependencies"])
    for name in ("ray", "simulation", "torchvision", "fidelity", "diffusers", "scikit", "matplotlib", "bitsandbytes"):
        assert name not in required
    assert any(requirement.startswith("bitsandbytes") for requirement in project["optional-dependencies"]["bits"])
