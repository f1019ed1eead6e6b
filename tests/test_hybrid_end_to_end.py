"""``fedgen generate --mix``: from a clustered run to what its clusters say together, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers import command, federate, make_llama, results, sentences, tiny_config, workspace
from PIL import Image
from pipelines import tiny_pipeline

import fedgen_assets
from fedgen_app.settings import Value

KEY = b"0123456789abcdef0123456789abcdef"
THREE: dict[str, Value] = {
    "partition__by": "single-label",
    "samples__count": 0,
    "num_server_rounds": 2,
    "clusters__by": "prompts",
    "clusters__choose": "count",
    "clusters__count": 3,
}


@pytest.fixture(scope="module")
def run() -> Path:
    """Three clusters: sea, law and farm, of two clients each."""
    folder = workspace() / "hybrid-run"
    if not folder.exists():
        federate(tiny_config(folder, **THREE, learning_rate=5e-2, local_epochs=5), 6)
    return folder


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run among devices that share a key, and the key's file."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "key").write_bytes(KEY)
    federate(tiny_config(folder / "run", **THREE, clusters__key=str(folder / "key")), 3)
    return folder / "run", folder / "key"


def shares(line: str) -> dict[int, float]:
    """What a line says of a mixture."""
    return {int(c): float(w) for w, c in re.findall(r"([0-9.e-]+) of cluster (\d+)", line)}


def cluster_of(folder: Path) -> dict[str, int]:
    """Each topic's cluster; labels go to clients in turn, and the first of them has the first."""
    of = {client: entry["cluster"] for entry in results(folder)["clusters"] for client in entry["clients"]}
    truth = results(folder)["clustering"]["adjusted_rand"]
    assert truth == 1
    return {topic: of[client] for client, topic in enumerate(sorted(("sea", "law", "farm")))}


def test_one_cluster_with_all_weight_is_that_cluster(run: Path) -> None:
    asked: list[str | Path] = ["generate", run, "--prompt", "the sea", "--prompt", "the judge", "--length", "16"]
    said = {name: command(*asked, *options) for name, options in (
        ("cluster", ["--cluster", "1"]),
        ("mixed", ["--mix", "1:3,0:0"]),
        ("sum", ["--mix", "0:2,2:6"]),
        ("each", ["--mix", "1:1", "--mix", "0:0.25,2:0.75"]),
    )}  # fmt: skip
    assert all(ended.status == 0 for ended in said.values()), said
    assert said["mixed"].out == said["cluster"].out
    assert "1 of cluster 1" in said["mixed"].err
    assert shares(said["sum"].err.splitlines()[0]) == {0: 0.25, 2: 0.75}
    first, second = (said[name].out.split("\n\n---\n\n") for name in ("cluster", "sum"))
    assert said["each"].out.split("\n\n---\n\n") == [first[0], second[1]]
    assert said["sum"].out != said["cluster"].out


def test_auto_finds_the_cluster_of_wordings_that_nobody_sent(run: Path) -> None:
    wordings = {
        "sea": "the crew of a captain sail while cold waves rose over the sea",
        "law": "a judge of the court read the article of the law",
        "farm": "wheat and barley in the old barn, dry after harvest",
    }
    prompts = [f"--prompt={text}" for text in wordings.values()]
    ended = command("generate", run, "--mix", "auto", "--length", "1", *prompts)
    assert ended.status == 0, ended.err
    lines = [line for line in ended.err.splitlines() if " of cluster " in line]
    for (topic, text), line in zip(wordings.items(), lines, strict=True):
        weights = shares(line)
        assert text in line and sum(weights.values()) == pytest.approx(1, abs=0.01)
        assert max(weights, key=lambda cluster: weights[cluster]) == cluster_of(run)[topic]


def test_a_key_in_use_leaves_explicit_weights_to_those_without_it(secret: tuple[Path, Path]) -> None:
    folder, key = secret
    prompt = sentences("sea", 1, 91)[0]
    auto: list[str | Path] = ["generate", folder, "--prompt", prompt, "--length", "1", "--mix", "auto"]
    refused = command(*auto)
    assert refused.status == 2 and "secret key" in refused.err and "--cluster-key FILE" in refused.err
    assert command(*auto[:-1], "0:0.5,1:0.5").status == 0
    with_key = command(*auto, "--cluster-key", key)
    assert with_key.status == 0, with_key.err
    weights = shares(with_key.err)
    assert max(weights, key=lambda cluster: weights[cluster]) == cluster_of(folder)["sea"]
    other = key.with_name("other")
    other.write_bytes(KEY[::-1])
    wrong = command(*auto, "--cluster-key", other)
    assert wrong.status == 2 and "another key or encoder" in wrong.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "7:1"], "no cluster 7; there are 0, 1, 2"),
        (["--mix", "0.7"], "should be auto, or cluster:weight such as 0:0.7,2:0.3"),
        (["--mix", "0:much"], "should be auto, or cluster:weight"),
        (["--mix", "0:1,1:-0.5"], "a weight should be finite and 0 or more"),
        (["--mix", "0:nan"], "a weight should be finite and 0 or more"),
        (["--mix", "0:0,1:0"], "one weight at least should be above 0"),
        (["--mix", "0:1,0:1"], "cluster 0 has two weights"),
        (["--mix", "0:1", "--mix", "1:1", "--prompt", "the sea"], "2 of them for 1 --prompt"),
        (["--mix", "0:1", "--cluster", "0"], "exclude each other"),
        (["--mix", "0:1", "--cluster-key", "key"], "serves --mix auto alone"),
        (["--mix", "0:1", "--cluster-encoder", "folder"], "--cluster-encoder folder: serves --mix auto alone"),
        (["--mix", "auto", "--cluster-key", "/nowhere/key"], "cluster key /nowhere/key"),
    ],
)
def test_what_makes_no_mixture_is_refused(options: list[str], message: str, run: Path) -> None:
    ended = command("generate", run, *options)
    assert ended.status == 2 and message in " ".join(ended.err.split()), ended.err
    assert ended.out == ""


def test_a_run_without_clusters_or_without_prompts_is_refused(tmp_path: Path) -> None:
    federate(tiny_config(tmp_path / "plain", num_server_rounds=1, samples__count=0), 2)
    ended = command("generate", tmp_path / "plain", "--mix", "0:1")
    assert ended.status == 2 and "no adapters of clusters" in ended.err
    federate(tiny_config(tmp_path / "truth", **{**THREE, "num_server_rounds": 1, "clusters__by": "oracle"}), 3)
    ended = command("generate", tmp_path / "truth", "--mix", "auto", "--prompt", "the sea")
    assert ended.status == 2 and "do not come from prompts" in ended.err
    assert command("generate", tmp_path / "truth", "--mix", "0:1,1:1", "--prompt", "the sea", "--length=1").status == 0


def test_the_encoder_may_lie_elsewhere_on_a_device(tmp_path: Path) -> None:
    there, here = (tmp_path / name for name in ("server", "device"))
    for folder in (there, here):
        shutil.copytree(fedgen_assets.path("language"), folder)
    federate(tiny_config(tmp_path / "run", **{**THREE, "num_server_rounds": 1, "clusters__encoder": str(there)}), 3)
    asked: list[str | Path] = ["generate", tmp_path / "run", "--mix", "auto", "--prompt", "the sea", "--length", "1"]
    known = command(*asked)
    assert known.status == 0, known.err
    shutil.rmtree(there)
    lost = command(*asked)
    assert lost.status == 3 and f"clusters.encoder = '{there}'" in lost.err
    found = command(*asked, "--cluster-encoder", here)
    assert found.status == 0 and shares(found.err) == shares(known.err), found.err
    other = command(*asked, "--cluster-encoder", make_llama(tmp_path / "other"))
    assert other.status == 2 and "another encoder" in other.err


def test_images_of_mixtures_come_in_one_batch(tmp_path: Path) -> None:
    changes: dict[str, Value] = {
        **THREE,
        "task": "diffusion",
        "backbone": str(tiny_pipeline("text")),
        "dataset": "bundled:styles",
        "label_column": "",
        "metrics__samples": 0,
        "test_sequences": 8,
        "max_steps": 1,
        "num_server_rounds": 1,
        "personal__max_steps": 1,
        "resolution": 16,
        "samples__steps": 2,
    }
    federate(tiny_config(tmp_path / "run", **changes), 4)
    mixes = ["--mix=auto", "--prompt=an outline of a bag", "--mix=0:1,2:1", "--prompt=a blurred bag"]
    ended = command("generate", tmp_path / "run", *mixes, "--count", "2", "--output", tmp_path / "mixed.png")
    assert ended.status == 0, ended.err
    assert len([line for line in ended.err.splitlines() if " of cluster " in line]) == 2
    assert Image.open(tmp_path / "mixed.png").size[0] > 16
