"""``fedgen serve`` and ``fedgen generate --via``: from a run folder over TLS to a picture or a text on a device."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import FEDGEN, command, federate, make_llama, tiny_config
from PIL import Image
from serving import CLUSTERS, TOKEN, Listening, Wire, asked_of, engine_of, image_run, listening, text_run
from test_cli import WITH_MODULES
from test_clusters_end_to_end import CANARY, leaks
from test_hybrid_end_to_end import shares

from fedgen_app.fleet import certificates
from fedgen_app.serving.guard import VARIABLE, Limits

pytestmark = pytest.mark.slow
CUT = ["--seed", "3", "--prompt", "a mosaic of a coat", "--prompt", "an outline of a bag", "--count", "2"]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)


@pytest.fixture(scope="module")
def images() -> Iterator[Listening]:
    with listening(image_run()) as found:
        yield found


def picture(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


@pytest.mark.parametrize("learns_text", [False, True])
def test_a_split_generation_equals_the_unsplit_one(learns_text: bool, tmp_path: Path) -> None:
    run = image_run(learns_text)
    with listening(run) as service:
        made = {}
        for name, options in {
            "here": ["--cluster", "1"],
            "there": [*["--cluster", "1"] * learns_text, "--mix", "1:1", "--via", service.url],
            "split": ["--cluster", "1", "--mix", "1:1", "--via", service.url, "--split", "2"],
            "late": ["--cluster", "1", "--mix", "1:1", "--via", service.url, "--split", "5"],
            "own": ["--client", "0", "--mix", "1:1", "--via", service.url, "--split", "2"],
        }.items():
            ended = command("generate", run, *CUT, *options, "--output", tmp_path / name)
            assert ended.status == 0, ended.err
            assert ended.err.count("the encoded prompts go to") == (name != "here")
            made[name] = picture(tmp_path / name)
    for name in ("there", "split", "late"):
        assert np.abs(made[name] - made["here"]).max() <= 1, name
    assert np.abs(made["own"] - made["here"]).max() > 1


def test_the_service_chooses_by_the_encoded_prompt_as_the_run_does(images: Listening, tmp_path: Path) -> None:
    for name, options in {"here": [], "there": ["--via", images.url]}.items():
        ended = command("generate", image_run(), *CUT, "--mix", "auto", *options, "--output", tmp_path / name)
        assert ended.status == 0, ended.err
        assert ended.err.count("the encoded prompts go to") == (name == "there")
    assert np.abs(picture(tmp_path / "here") - picture(tmp_path / "there")).max() <= 1


def test_texts_are_written_on_the_device_with_the_mixed_adapter() -> None:
    run = text_run()
    asked: list[str | Path] = ["generate", run, "--prompt", "the sea", "--prompt", "the judge", "--count", "2"]
    with listening(run) as service:
        for mix in (["--mix", "auto"], ["--mix", "0:1,2:3"], ["--mix", "0:1", "--mix", "1:1"]):
            here, there = command(*asked, *mix), command(*asked, *mix, "--via", service.url)
            assert (here.status, there.status) == (0, 0), there.err
            said = f"the encoded prompts go to {service.url}, without noise\n"  # weights say nothing of them
            assert there.err.count(said) == ("auto" in mix) and "without noise" not in here.err
            assert there.out == here.out and there.out.count("---") == 3
        refused = command(*asked, "--via", service.url, "--split", "2")
        assert refused.status == 2 and "made in one place" in refused.err
        refused = command(*asked, "--via", service.url, "--frozen")
        assert refused.status == 2 and refused.out == "" and "--frozen: without --split" in refused.err


def test_a_device_needs_the_settings_and_its_own_adapter(images: Listening, tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.mkdir()
    shutil.copy(image_run() / "settings.json", device)
    shutil.copytree(image_run() / "clients" / "0", tmp_path / "own")
    far = ["--via", images.url, "--split", "4"]
    ended = command("generate", device, *CUT, *far, "--adapter", tmp_path / "own", "--output", tmp_path / "device.png")
    assert ended.status == 0, ended.err
    ended = command("generate", image_run(), *CUT, *far, "--client", "0", "--output", tmp_path / "run.png")
    assert np.array_equal(picture(tmp_path / "device.png"), picture(tmp_path / "run.png"))
    ended = command("generate", device, *CUT, *far)
    assert ended.status == 2 and "no such adapter" in ended.err
    ended = command("generate", device, *CUT, "--via", images.url, "--output", tmp_path / "there.png")
    assert ended.status == 0, ended.err  # without a part of its own in it, it needs none


def test_with_a_key_the_device_turns_its_vector_and_others_give_weights(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef0123456789abcdef")
    run = tmp_path / "run"
    federate(tiny_config(run, **{**CLUSTERS, "clusters__encoder": "backbone", "clusters__key": str(key)}), 3)
    asked: list[str | Path] = ["generate", run, "--prompt", "the captain and the crew", "--length", "4"]
    here = command(*asked, "--mix", "auto", "--cluster-key", key)
    best = max(shares(here.err).items(), key=lambda item: item[1])
    with listening(run) as service:
        there = command(*asked, "--via", service.url, "--cluster-key", key)
        assert (there.status, there.out) == (0, here.out), there.err
        sent = service.metric("received_bytes_total")
        without = command(*asked, "--via", service.url)
        assert without.status == 3 and "another secret key" in without.err and "go to" not in without.err
        assert service.metric("received_bytes_total") == sent > 0  # the vector that was not turned stayed here
        weights = command(*asked, "--via", service.url, "--mix", f"{best[0]}:1")
        assert weights.status == 0, weights.err


def test_another_backbone_is_refused_by_name(tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    with listening(text_run()) as service:
        asked = ["generate", text_run(), "--prompt", "the sea", "--mix", "0:1", "--via", service.url]
        refused = command(*asked, "--backbone", other)
        assert refused.status == 3 and "HTTP 409" in refused.err and refused.err.count("sha256:") == 2
        assert command(*asked, "--backbone", service.engine.backbone.reference).status == 0


def test_what_a_device_asks_wrongly_or_of_nobody_is_told(images: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    run = image_run()
    for options, status, message in (
        (["--via", "http://192.0.2.1:8443"], 2, "http is taken from this machine itself only"),
        (["--via", "ftp://x"], 2, "should be like https://HOST"),
        (["--via", "http://127.0.0.1:9"], 3, "http://127.0.0.1:9"),
        (["--via", images.url, "--split", "6"], 2, "should be below the steps, 6"),
        (["--via", images.url, "--ca", "/nowhere"], 2, "--ca /nowhere"),
        (["--via", images.url, "--token-file", "/nowhere"], 2, "--token-file /nowhere"),
        (["--via", images.url, "--client", "0", "--cluster", "1"], 2, "exclude each other"),
        (["--via", images.url, "--client", "nobody"], 2, "--client nobody: without --split"),
        (["--via", images.url, "--cluster", "1"], 2, "--cluster 1: without --split"),
        (["--via", images.url, "--adapter", "x"], 2, "--adapter x: without --split"),
        (["--via", images.url, "--frozen"], 2, "--frozen: without --split"),
        (["--via", images.url, "--mix", "0:1", "--cluster-encoder", "e"], 2, "serves --mix auto alone"),
        (["--via", images.url, "--cluster-encoder", "/nowhere"], 3, "clusters.encoder = '/nowhere'"),
        (["--via", images.url, "--mix", "7:1"], 3, "HTTP 422"),
        (["--via", images.url, "--mix", "0:1", "--mix", "auto"], 2, "either auto for all prompts, or weights"),
        (["--via", images.url, "--mix", "0:1", "--cluster-key", "k"], 2, "serves --mix auto alone"),
        (["--via", images.url, "--count", "20"], 3, "HTTP 4"),
        (["--split", "2"], 2, "--split 2: serves --via alone"),
        (["--token-file", "t"], 2, "serves --via alone"),
    ):
        prompts = CUT[:-2] if "--mix" in options or "--count" in options else CUT
        ended = command("generate", run, *prompts, *options)
        assert ended.status == status and message in ended.err, (options, ended.err)
        assert "coat" not in ended.err
    monkeypatch.setenv(VARIABLE, "w" * 40)
    ended = command("generate", run, *CUT, "--via", images.url)
    assert ended.status == 3 and "HTTP 401" in ended.err


@contextlib.contextmanager
def process(run: Path, log: Path, *options: str | Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``fedgen serve`` in a process of its own, once it answers."""
    with log.open("wb") as stream:
        arguments = [FEDGEN, "serve", run, "--port", str(port), *options]
        serving = subprocess.Popen(arguments, stdout=stream, stderr=stream)
    try:
        deadline, scheme = time.monotonic() + 120, "https" if "--certificate" in options else "http"
        while True:
            assert serving.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{scheme}://127.0.0.1:{port}/health", verify=False).status_code == 200:
                    break
            time.sleep(0.2)
        yield serving
    finally:
        if serving.poll() is None:
            serving.kill()
        serving.wait()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def certificate(folder: Path) -> dict[str, Path]:
    """An authority and a certificate of it for this machine."""
    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.authority(ca_key, "test", 2)
    files = {"ca": ca, "crt": certificates.server_certificate(ca, ca_key, key, ["127.0.0.1"], 2), "key": key}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


def test_over_tls_until_a_signal_that_lets_work_be_finished(tmp_path: Path) -> None:
    files, port, run = certificate(tmp_path), free_port(), image_run()
    tls = ["--certificate", files["crt"], "--key", files["key"]]
    with process(run, tmp_path / "log", *tls, port=port) as serving:
        url = f"https://127.0.0.1:{port}"
        far = ["--via", url, "--ca", files["ca"], "--mix", "2:1", "--split", "3", "--output", tmp_path / "far.png"]
        ended = command("generate", run, *CUT, "--cluster", "2", *far)
        assert ended.status == 0, ended.err
        assert command("generate", run, *CUT, "--cluster", "2", "--output", tmp_path / "near.png").status == 0
        assert np.abs(picture(tmp_path / "far.png") - picture(tmp_path / "near.png")).max() <= 1
        unknown = command("generate", run, *CUT, "--via", url)
        assert unknown.status == 3 and "CERTIFICATE_VERIFY_FAILED" in unknown.err
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        body = asked_of(engine_of(run, Limits()), steps="100")
        context = ssl.create_default_context(cafile=str(files["ca"]))
        with httpx.Client(verify=context, timeout=60) as client:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with client.stream("POST", f"{url}/v1/images", content=body, headers=headers) as answer:
                serving.send_signal(signal.SIGTERM)
                assert answer.status_code == 200 and answer.read().startswith(b"\x89PNG")
        assert serving.wait(60) == 0
    said = (tmp_path / "log").read_text()
    assert "serving on https://127.0.0.1" in said and said.rstrip().endswith("ended") and "Traceback" not in said


def test_no_prompt_in_any_body_log_or_file(tmp_path: Path) -> None:
    for run, options in ((image_run(True), ["--split", "2"]), (image_run(True), []), (text_run(), [])):
        log, port = tmp_path / "log", free_port()
        with process(run, log, port=port) as serving:
            wire = Wire(f"http://127.0.0.1:{port}")
            far = ["--via", wire.url, "--output", tmp_path / "out"]
            ended = command("generate", run, "--prompt", CANARY, *options, *far)
            assert ended.status == 0, ended.err
            broken = httpx.post(f"{wire.url}/v1/images", content=CANARY.encode(), headers={"Authorization": "x"})
            assert broken.status_code == 401 and not leaks(broken.content)
            sent = bytes(wire.seen).replace(CANARY.encode(), b"", 1)  # the one that was sent on purpose
            wire.close()
            serving.send_signal(signal.SIGINT)
            assert serving.wait(60) == 0
        assert len(sent) > 2000 and leaks(CANARY.encode())
        assert not leaks(sent) and not leaks(log.read_bytes())
        assert b"Bearer" in sent and TOKEN.encode() not in log.read_bytes()
        assert not tokens_in(run, sent)
        for file in run.rglob("*"):
            assert not (file.is_file() and leaks(file.read_bytes())), file


def tokens_in(run: Path, data: bytes) -> bool:
    """Whether the numbers of the sentence's tokens stand in the bytes, four of them in a row."""
    backbone = engine_of(run, Limits()).backbone
    tokenizer = getattr(backbone.processor, "tokenizer", backbone.processor)
    numbers = tokenizer(CANARY, add_special_tokens=False)["input_ids"]
    assert len(numbers) > 8
    kinds = ("<i8", "<i4", "<i2", "<f4", "<f8")
    return any(np.array(numbers[n : n + 4], kind).tobytes() in data for n in range(len(numbers) - 3) for kind in kinds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "beyond this machine needs --certificate and --key and --token-file"),
        (["--host", "::"], "beyond this machine needs"),
        (["--host", "localhost.example"], "beyond this machine needs"),
        (["--certificate", "x"], "--certificate and --key go together"),
        (["--certificate", "/nowhere", "--key", "/nowhere"], "--certificate /nowhere, --key /nowhere"),
        (["--token-file", "/nowhere"], "--token-file /nowhere"),
        (["--port", "0"], "--port"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_what_is_wrong_is_refused_before_torch(options: list[str], message: str) -> None:
    run = text_run()
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", WITH_MODULES, "serve", run, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr
    assert done.stdout.strip() == "loaded:"


def test_what_is_no_finished_run_or_half_protected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command("serve", tmp_path)
    assert ended.status == 2 and "not a run folder" in ended.err
    shutil.copy(text_run() / "settings.json", tmp_path)
    ended = command("serve", tmp_path)
    assert ended.status == 2 and "no adapters in it" in ended.err
    files = certificate(tmp_path)
    open_ = ["serve", text_run(), "--host", "0.0.0.0", "--certificate", files["crt"], "--key", files["key"]]
    monkeypatch.delenv(VARIABLE)
    ended = command(*open_)
    assert ended.status == 2 and "needs --token-file" in ended.err
    monkeypatch.setenv(VARIABLE, "short")
    ended = command(*open_)
    assert ended.status == 2 and "token 1 should be 32" in ended.err and "short" not in ended.err
    monkeypatch.setenv(VARIABLE, TOKEN)
    ended = command("serve", text_run(), "--certificate", files["ca"], "--key", files["key"])
    assert ended.status == 2 and "--certificate" in ended.err
