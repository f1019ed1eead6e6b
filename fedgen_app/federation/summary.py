"""What a run says and leaves of its clusters: the part of results.json, and the centroids."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgen_app.federation.clustering import adjusted_rand
from fedgen_app.federation.groups import Groups, as_tensors
from fedgen_app.federation.method import ClientId
from fedgen_app.federation.protection import epsilon
from fedgen_app.files import to_json, write_atomic
from fedgen_app.learning.adapters import save_adapter
from fedgen_app.runs import report
from fedgen_app.settings import Settings

CENTROIDS, MAP = "centroids.safetensors", "map.json"


def clusters_of(
    groups: Groups,
    personal: Sequence[Mapping[str, Any]],
    settings: Settings,
    unplaced: Sequence[Mapping[str, Any]],
    truth: Mapping[ClientId, str],
) -> dict[str, Any]:
    """``clusters`` and ``clustering`` of results.json.

    A cluster's ``metrics`` are the mean over its members' hold-outs, weighted by examples, with the cluster's adapter;
    ``frozen`` and ``personal`` the same with none and with their own. They are null where nobody measured.

    Args:
        personal: The clients' entries.
        truth: What each simulated client's data mostly is, where that is known.
    """
    clusters = []
    for cluster in sorted(groups.states):
        members = groups.members(cluster)
        found = [entry for entry in personal if entry["client"] in members]
        means = {state: report.weighted(found, state) for state in ("frozen", "global", "personal")} if found else {}
        clusters.append(
            {
                "cluster": cluster,
                "clients": members,
                "examples": groups.examples[cluster],
                "metrics": means.get("global"),
                "frozen": means.get("frozen"),
                "personal": means.get("personal"),
            }
        )
    wanted, known = settings.clusters, [client for client in groups.where if client in truth]
    facts: dict[str, Any] = {
        "by": wanted.by,
        "unplaced": [entry for entry in unplaced if entry["client"] not in groups.where],  # the others came to one
        "adjusted_rand": adjusted_rand([truth[c] for c in known], [groups.where[c] for c in known]) if known else None,
    }
    if wanted.by == "prompts":
        spent = epsilon(wanted.noise, wanted.delta) if wanted.noise else None
        facts |= {"encoder": wanted.encoder, "noise": wanted.noise, "epsilon": spent, "delta": wanted.delta}
    return {"clusters": clusters, "clustering": facts}


def keep_clusters(folder: Path, groups: Groups) -> None:
    """map.json (clients by cluster, how similar they are, the centroids' space) and centroids.safetensors.

    No folder of a vanished cluster stays.

    The centroids lie in the space that the devices' key turns them into, where there is one.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.is_dir() and re.fullmatch(r"\d+", old.name) and int(old.name) not in groups.states:
            shutil.rmtree(old)
    facts = {
        "clusters": {str(cluster): groups.members(cluster) for cluster in sorted(groups.states)},
        "examples": {str(cluster): count for cluster, count in groups.examples.items()},
        "similarity": [[one, other, value] for (one, other), value in sorted(groups.kinship.items())],
        "space": groups.space,
    }
    write_atomic(folder / MAP, to_json(facts))
    if groups.centroids:
        save_adapter(as_tensors(groups.centroids), folder / CENTROIDS)
