"""What `fedgen doctor` finds on this machine, and what it says where something is wrong."""

from __future__ import annotations

import email.utils
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FEDGEN, ROOT, command, tiny_data, tiny_model, tiny_settings
from networks import network_settings

from fedgen_app.errors import BackboneError
from fedgen_app.fleet import certificates, checks, doctor, wheels
from fedgen_app.fleet.pack import fingerprint_of
from fedgen_app.fleet.render import toml
from fedgen_app.learning.backbone import find, load_task


@contextmanager
def superlink(folder: Path, ahead: float = 0.0, days: int = 90, ca_days: int = 3650) -> Iterator[tuple[str, Path]]:
    """Something that answers over TLS with a clock of its own; its address and the authority's certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", email.utils.formatdate(time.time() + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.authority(ca_key, "test", 3650)
    # Made anew from the same key, it verifies the same certificates: a device may still hold the old one.
    (folder / "ca.crt").write_bytes(certificates.authority(ca_key, "test", ca_days))
    (folder / "server.pem").write_bytes(key + certificates.server_certificate(ca, ca_key, key, ["localhost"], days))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", folder / "ca.crt"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in findings}


def only(findings: Iterator[doctor.Finding]) -> doctor.Finding:
    (found,) = findings
    return found


def node(folder: Path, **changes: Any) -> Path:
    config = {"client-id": "a", "data": str(tiny_data()), "backbone": str(tiny_model()), "state-dir": str(folder / "s")}
    file = folder / "node.toml"
    file.write_text(toml(config | changes), encoding="utf-8")
    return file


def test_a_device_that_is_fit(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max-epochs = 3\n")
    config = node(tmp_path, policy=str(tmp_path / "policy.toml"))
    with superlink(tmp_path) as (address, ca):
        ended = command("doctor", "device", "--node", config, "--server", address, "--ca", ca, "--json")
    found = {entry["what"]: entry for entry in json.loads(ended.out)}
    assert ended.status == 0 and all(entry["ok"] for entry in found.values())
    assert {
        "python",
        "flwr",
        "cpu",
        "gpu",
        "memory",
        "disk",
        "backbone",
        "data",
        "policy",
        "server",
        "authority",
        "clock",
    } <= set(found)
    assert torch.__version__.startswith(found["torch"]["detail"])
    assert found["backbone"]["detail"].endswith(fingerprint_of(tiny_model(), "language"))
    assert "89 days left" in found["server"]["detail"]
    assert "ray" not in found


def test_a_device_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max-epochs = 'all'\n")
    config = node(tmp_path, policy=str(tmp_path / "policy.toml"), data="/no/data", backbone="/no/backbone")
    with superlink(tmp_path, ahead=-30, days=5) as (address, ca):
        ended = command("doctor", "device", "--node", config, "--server", address, "--ca", ca)
    assert ended.status == 1
    bad = {line.split(":")[0].removeprefix("BAD  ") for line in ended.out.splitlines() if line.startswith("BAD")}
    assert bad == {"backbone", "data", "policy", "server", "clock"}
    assert ended.out.count("     -> ") == len(bad)
    assert "fedgen backbone pull URL --to /no/backbone" in ended.out


@pytest.mark.parametrize(("ahead", "fits"), [(0, True), (200, True), (400, False), (-20, False)])
def test_the_clock_is_held_against_what_flower_takes(ahead: float, fits: bool, tmp_path: Path) -> None:
    # A server whose clock is ahead: ours is behind, of which Flower takes more.
    with superlink(tmp_path, ahead) as (address, ca):
        assert doctor.clock(address, ca).ok is fits


def test_the_devices_own_authority_may_end_first(tmp_path: Path) -> None:
    with superlink(tmp_path, days=397, ca_days=7) as (address, ca):
        found = by_name(list(doctor.server(address, ca)))
        assert checks.server_days_left(address, ca) == 6
        (tmp_path / "both.crt").write_bytes(ca.read_bytes() + certificates.authority(certificates.new_key(), "no", 1))
        assert checks.days_left(address, tmp_path / "both.crt") == (396, 6)
    assert found["server"].ok and "396 days left" in found["server"].detail
    assert not found["authority"].ok and f"{ca}: 6 days left" in found["authority"].detail
    assert "install its ca.crt here" in found["authority"].fix


def test_a_server_that_is_none(tmp_path: Path) -> None:
    with superlink(tmp_path) as (address, ca):
        pass
    found = list(doctor.server(address, ca))
    assert [finding.ok for finding in found] == [False] and "cannot be reached" in found[0].detail
    (tmp_path / "other").mkdir()
    with superlink(tmp_path) as (address, _), superlink(tmp_path / "other") as (_, other):
        assert "its certificate is refused" in next(doctor.server(address, other)).detail


def test_a_damaged_backbone_is_found(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    found = doctor.backbone_there(str(model), "language")
    assert not found.ok and "damaged" in found.detail and "--replace" in found.fix


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that finds the GPU and fails at the first use, as wheels for other GPUs do."""

    def fail() -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nFor debugging ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)


def test_a_gpu_on_which_no_kernel_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_kernels(monkeypatch)
    ended = command("doctor", "device", "--node", node(tmp_path), "--json")
    found = {entry["what"]: entry for entry in json.loads(ended.out)}
    assert ended.status == 1 and [what for what, entry in found.items() if not entry["ok"]] == ["gpu"]
    assert found["gpu"]["detail"].endswith(
        "no kernel runs: CUDA error: no kernel image is available for execution on the device"
    )
    assert "GB needed at the peak" in found["memory"]["detail"]


def test_memory_is_estimated_without_measuring_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any) -> None:
        raise AssertionError("the machine was measured")

    monkeypatch.setattr("fedgen_app.fleet.devices.measured", measured)
    assert only(doctor.memory({"backbone": str(tiny_model())}, tiny_settings())).ok


@pytest.mark.parametrize(
    ("jetson", "cuda", "ok", "said"),
    [(True, "13.0", False, "JetPack"), (True, None, True, "for the CPU alone"), (False, None, True, "")],
)
def test_no_gpu_is_a_fault_where_torch_should_see_one(jetson: bool, cuda: str | None, ok: bool, said: str) -> None:
    found = doctor.no_gpu(jetson, cuda)
    assert found.ok is ok and said in found.fix + found.hint and bool(found.fix) is not ok


@pytest.mark.parametrize("nvidia", [True, False])
def test_a_cuda_build_without_a_gpu_is_a_hint(nvidia: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "nvidia", lambda: nvidia)
    found = doctor.no_gpu(jetson=False, cuda="13.0")
    assert found.ok and bool(found.hint) is not nvidia
    assert nvidia or "several GB" in found.hint and "--index-url https://download.pytorch.org/whl/cpu" in found.hint


def test_hints_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "gpu", lambda jetson: doctor.Finding("gpu", True, "none", hint="less is more"))
    out = command("doctor", "device", "--node", node(tmp_path)).out
    assert "ok   gpu: none\n     hint: less is more\n" in out


@pytest.mark.parametrize("part", ["device", "sim"])
def test_a_torch_that_cannot_be_imported_is_a_finding(part: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')\n")
    config = ["--node", node(tmp_path)] if part == "device" else ["--state", tmp_path]
    ended = subprocess.run(
        [FEDGEN, "doctor", part, *config, "--json"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    found = {entry["what"]: entry for entry in json.loads(ended.stdout)}
    bad = {what: entry for what, entry in found.items() if not entry["ok"]}
    assert ended.returncode == 1 and list(bad) == ["torch"], ended.stderr
    assert "cannot be imported: libcudnn.so.9" in bad["torch"]["detail"] and bad["torch"]["fix"]
    assert "disk" in found and not {"gpu", "backbone"} & set(found)
    assert "policy" in found or part == "sim"


@contextmanager
def nobody() -> Iterator[None]:
    """This process without root's rights."""
    if os.geteuid():
        pytest.skip("only root can give its rights up")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_lies_behind_a_shut_folder_is_a_finding() -> None:
    with tempfile.TemporaryDirectory() as place:
        (home := Path(place) / "pi").mkdir(mode=0o700)
        Path(place).chmod(0o755)
        (lain := home / "texts").mkdir()
        (link := Path(place) / "link").symlink_to(lain)
        with nobody():
            assert f"may not enter {home}" in doctor.data_there(str(link)).detail
            found = [doctor.data_there(str(lain)), doctor.backbone_there(str(lain), "language"), doctor.disk(lain)]
            with pytest.raises(BackboneError, match="may not enter"):
                find(str(lain), "", load_task("language"))
        assert {finding.what for finding in found} == {"data", "backbone", "disk"}
        for finding in found:
            assert not finding.ok and finding.detail.endswith(f"{lain}: this user may not enter {home}")
            assert f"chmod o+x {home};" in finding.fix
        home.chmod(0o711)
        with nobody():
            assert doctor.data_there(str(lain)).ok
            lain_is_not_ours = doctor.disk(lain)
        assert "cannot be written by this user" in lain_is_not_ours.detail


def test_memory_is_held_against_the_estimate(tmp_path: Path) -> None:
    config, settings = {"backbone": str(tiny_model()), "rank": 2}, tiny_settings(batch_size=3)
    found = only(doctor.memory(config, settings))
    assert found.ok and found.detail.endswith("GB needed at the peak (rank 2, batches of 3, 32 tokens)")
    little = only(doctor.memory(config | {"memory": 1000}, settings))
    assert (
        not little.ok and little.detail.startswith("memory = 1000, training takes ") and "docs/devices.md" in little.fix
    )
    wide = only(doctor.memory(config, tiny_settings(batch_size=200_000_000)))
    assert not wide.ok and "batches of 200000000" in wide.detail


def needed(finding: doctor.Finding) -> float:
    return float(finding.detail.split(" GB needed")[0].split()[-1])


def test_a_server_only_measures_and_needs_less(tmp_path: Path) -> None:
    settings = tiny_settings(batch_size=40_000, backbone=str(tiny_model()))
    trains, measures = (only(doctor.memory({}, settings, trains=trains)) for trains in (True, False))
    assert needed(trains) > needed(measures) > 0.2


def test_a_gpu_has_a_memory_of_its_own_and_a_jetsons_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(batch_size=100_000, backbone=str(tiny_model()))
    together = only(doctor.memory({}, settings))
    free = int(1e9 * needed(together)) // 3
    for module in ("fedgen_app.learning.backbone", "fedgen_app.fleet.estimate"):
        monkeypatch.setattr(f"{module}.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**12))
    found = by_name(list(doctor.memory({}, settings)))
    assert set(found) == {"memory", "gpu memory"} and found["memory"].ok and not found["gpu memory"].ok
    assert needed(found["memory"]) < needed(together) and f"{free / 1e9:.1f} GB free" in found["gpu memory"].detail
    monkeypatch.setattr(wheels, "tegra", lambda: True)
    assert only(doctor.memory({}, settings)).what == "memory"


@pytest.mark.parametrize(
    ("controllers", "hints"),
    [("cpuset cpu io memory pids\n", [""]), ("cpuset cpu io pids\n", ["cgroup_enable=memory"]), (None, [])],
)
def test_a_kernel_without_limits_of_memory(controllers: str | None, hints: list[str], tmp_path: Path) -> None:
    if controllers is not None:
        (tmp_path / "cgroup.controllers").write_text(controllers)
    found = list(doctor.limits(tmp_path / "cgroup.controllers"))
    assert all(finding.ok for finding in found) and len(found) == len(hints)
    for finding, hint in zip(found, hints, strict=True):
        assert hint in finding.hint and bool(hint) is bool(finding.hint)


def test_what_cannot_be_estimated_is_no_good_news() -> None:
    found = only(doctor.memory({"backbone": "/no/such/backbone"}, tiny_settings()))
    assert not found.ok and "/no/such/backbone" in found.detail
    assert only(doctor.memory({}, network_settings("gan"))).detail.endswith("needed before a model is loaded")


def test_the_runs_settings_count(tmp_path: Path) -> None:
    ended = command(
        "doctor", "device", "--node", node(tmp_path), "--set", "batch-size=5", "--set", "lora.rank=3", "--json"
    )
    found = {entry["what"]: entry for entry in json.loads(ended.out)}
    assert "(rank 3, batches of 5, 128 tokens)" in found["memory"]["detail"]
    assert command("doctor", "device", "--set", "lora.rank=0").status == 2


@pytest.mark.parametrize(
    ("options", "task"),
    [([], "language"), (["--preset", "quickstart-images"], "diffusion"), (["--task", "diffusion"], "diffusion")],
)
def test_a_presets_task_counts(options: list[str], task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(doctor, "device", lambda node, settings: seen.append(settings.task) or [])
    assert command("doctor", "device", *options).status == 0 and seen == [task]


def test_a_servers_backbone_is_looked_at(tmp_path: Path) -> None:
    def looked(backbone: Path) -> tuple[int, dict[str, Any]]:
        ended = command("doctor", "server", "--state", tmp_path, "--set", f"backbone={backbone}", "--json")
        return ended.status, {entry["what"]: entry for entry in json.loads(ended.out)}["backbone"]

    status, found = looked(tmp_path / "none")
    assert status == 1 and not found["ok"] and f"{tmp_path}/none: no such folder" in found["detail"]
    assert looked(tiny_model())[1]["detail"].endswith(fingerprint_of(tiny_model(), "language"))


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    assert command("doctor", "server", "--server", "x:1").status == 2
    assert command("doctor", "sim", "--node", "x.toml").status == 2
    ended = command("doctor", "device", "--state", tmp_path)
    assert ended.status == 2 and f"--state {tmp_path}: a device's is the state-dir" in ended.err
    assert command("doctor", "device", "--node", tmp_path / "none.toml").status == 2


def test_a_laptop_that_simulates(tmp_path: Path) -> None:
    ended = command("doctor", "sim", "--state", tmp_path, "--set", "batch-size=5", "--json")
    found = {entry["what"]: entry for entry in json.loads(ended.out)}
    assert found["ray"]["ok"] and found["disk"]["detail"].endswith(str(tmp_path))
    assert "batches of 5" in found["memory"]["detail"] and found["backbone"]["detail"].startswith("bundled: ")
    assert {"avx2", "neon"} & set(found["cpu"]["detail"].split())
    assert ended.status == (0 if all(entry["ok"] for entry in found.values()) else 1)
