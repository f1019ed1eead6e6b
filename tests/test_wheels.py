"""Which torch a machine is told to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgen_app.fleet import wheels


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("# R35 (release), REVISION: 4.1, GCID: 1", "JetPack 5 is without wheels"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "JetPack 6 is without wheels"),
        ("# R38 (release), REVISION: 2.2, GCID: 1", "for JetPack 7.0 or 7.1: pip install torch --index-url "),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "https://download.pytorch.org/whl/cu132"),
        ("something else", "JetPack 6 and older are without wheels"),
        (None, "JetPack 6 and older are without wheels"),
    ],
)
def test_the_source_for_each_jetpack(release: str | None, said: str, tmp_path: Path) -> None:
    if release:
        (tmp_path / "release").write_text(release + "\n")
    found = wheels.for_jetson(wheels.jetson_linux(tmp_path / "release"))
    assert said in found and wheels.CPU in found


def test_orin_runs_what_torch_says_it_runs() -> None:
    if not hasattr(torch.cuda, "DEVICE_REQUIREMENT_POST_JETSON_SBSA_UNIFICATION"):
        pytest.skip("this torch is older than CUDA 13.2")
    assert 87 in torch.cuda.DEVICE_REQUIREMENT_POST_JETSON_SBSA_UNIFICATION[80]
    assert 87 not in torch.cuda.DEVICE_REQUIREMENT[80]


@pytest.mark.parametrize("vendor", ["0x10de", "0x1234"])
def test_a_card_without_a_driver_is_seen(vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "DRIVERS", ())
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text(vendor + "\n")
    assert wheels.nvidia(tmp_path) is (vendor == "0x10de")
