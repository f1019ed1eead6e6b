"""What a device says it wants: from its own prompts, protected as it wants, and nothing but a direction."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOPICS, command, make_llama, tiny_config, tiny_model, workspace, write_tokenizer
from pipelines import image_settings

from fedgen_app.errors import BackboneError, DataError, PolicyError, SettingsError
from fedgen_app.federation import requirement
from fedgen_app.federation.client import Participant
from fedgen_app.federation.leakage import COSINES
from fedgen_app.federation.policy import Policy
from fedgen_app.federation.protection import epsilon
from fedgen_app.federation.roster import parse_requirement
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.encoder import direction, encode, mean_of_tokens, open_encoder
from fedgen_app.learning.task import Share
from fedgen_app.settings import Settings, Value

KEY = b"0123456789abcdef0123456789abcdef"
PROMPTS = ["the captain set sail", "the cold sea at night"]


class Node:
    """A node's Context as far as a Participant reads it."""

    def __init__(self, run_config: dict[str, Value], node_config: dict[str, Any]) -> None:
        self.run_config, self.node_config = run_config, node_config


def device(folder: Path, prompts: list[str] | None = PROMPTS, **changes: Any) -> Participant:
    """A device with data, prompts beside it, and what else its node config says."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "train.jsonl").write_text(json.dumps({"text": TOPICS["sea"]}) + "\n")
    if prompts is not None:
        (data / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    own = {key.replace("_", "-"): value for key, value in changes.items() if "__" not in key}
    run = {key: value for key, value in changes.items() if "__" in key}
    run_config = tiny_config(folder / "run", clusters__by="prompts", label_column="", **run)
    node = {"client-id": "ward-7", "data": str(data), "state-dir": str(folder / "state"), **own}
    return Participant.from_context(Node(run_config, node))  # type: ignore[arg-type]


def answer(me: Participant) -> dict[str, Any]:
    return dict(requirement.facts_of(me, load_task(me.settings.task), open_backbone(me.settings)))


def vector(me: Participant) -> np.ndarray:
    found = parse_requirement(answer(me))
    assert found is not None
    return found.vector


def test_a_device_answers_with_its_prompts_direction(tmp_path: Path) -> None:
    me = device(tmp_path)
    found = answer(me)
    assert set(found) == {"requirement", "space"}
    backbone, task = open_backbone(me.settings), load_task("language")
    wanted = direction(encode(me.settings, task, backbone, PROMPTS))
    assert found["requirement"] == pytest.approx(wanted, abs=1e-6) and len(wanted) == 32
    assert task.requirements(me.settings, backbone, me.share) == PROMPTS


def test_prompts_are_no_documents_and_may_lie_elsewhere(tmp_path: Path) -> None:
    me = device(tmp_path)
    task, backbone = load_task("language"), open_backbone(me.settings)
    with_prompts = task.load_data(me.settings, backbone, me.share).train.counts
    without = device(tmp_path / "other", prompts=None)
    assert task.load_data(without.settings, backbone, without.share).train.counts == with_prompts
    (tmp_path / "wishes").write_text("the judge read the law\n")
    elsewhere = dataclasses.replace(me, share=dataclasses.replace(me.share, prompts=str(tmp_path / "wishes")))
    assert task.requirements(me.settings, backbone, elsewhere.share) == ["the judge read the law"]
    gone = dataclasses.replace(me, share=dataclasses.replace(me.share, prompts=str(tmp_path / "none")))
    with pytest.raises(DataError, match="none"):
        answer(gone)


def test_a_folder_of_plain_texts_trains_on_all_but_the_prompts(tmp_path: Path) -> None:
    me = device(tmp_path)
    data = tmp_path / "data"
    (data / "train.jsonl").unlink()
    (data / "letters.txt").write_text(TOPICS["law"])
    task, backbone = load_task("language"), open_backbone(me.settings)
    assert task.load_data(me.settings, backbone, Share(folder=str(data))).train.counts["bytes"] == len(TOPICS["law"])


def test_without_prompts_nothing_is_sent_and_data_does_not_stand_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert answer(device(tmp_path, prompts=None)) == {}
    assert "in no cluster" in caplog.text


def test_with_limited_backbones_the_server_names_no_encoder(tmp_path: Path) -> None:
    limited = Policy(backbones=())
    me = dataclasses.replace(device(tmp_path, clusters__encoder="owner/name"), policy=limited)
    with pytest.raises(PolicyError, match="'owner/name', is not opened"):
        answer(me)
    for own, wanted in (("", "backbone"), ("", "bundled"), ("/models/encoder", "owner/name")):
        limited.check_encoder(own, wanted)
    Policy().check_encoder("", "owner/name")


def test_nothing_is_sent_where_the_run_does_not_ask(tmp_path: Path) -> None:
    me = device(tmp_path)
    quiet = Settings.from_run_config(me.settings.flat() | {"clusters.by": "updates"})
    assert answer(dataclasses.replace(me, settings=quiet)) == {}


def test_devices_with_one_key_compare_and_others_do_not(tmp_path: Path) -> None:
    for name, key in (("key", KEY), ("other-key", KEY[::-1])):
        (tmp_path / name).write_bytes(key)
    plain, secret = device(tmp_path / "1"), device(tmp_path / "2", cluster_key=str(tmp_path / "key"))
    same = device(tmp_path / "3", ["the judge read the law"], cluster_key=str(tmp_path / "key"))
    other = device(tmp_path / "4", cluster_key=str(tmp_path / "other-key"))
    clear = device(tmp_path / "5", ["the judge read the law"])
    assert vector(secret) @ vector(same) == pytest.approx(vector(plain) @ vector(clear), abs=1e-5)
    assert abs(vector(secret) @ vector(plain)) < 0.9
    marks = [answer(me)["space"] for me in (plain, secret, same, other)]
    assert marks[1] == marks[2] and len(set(marks)) == 3


def test_a_key_that_is_not_there_ends_the_answer_and_sends_nothing_in_the_clear(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cluster key"):
        answer(device(tmp_path, cluster_key=str(tmp_path / "gone")))


def test_the_servers_key_setting_means_nothing_on_a_device(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    me = device(tmp_path, clusters__key=str(tmp_path / "key"))
    assert me.key is None and vector(me) == pytest.approx(vector(device(tmp_path)))


def test_noise_is_kept_by_the_device_and_may_be_more_than_the_run_asks(tmp_path: Path) -> None:
    clean = vector(device(tmp_path))
    asked, more = device(tmp_path, clusters__noise=0.01), device(tmp_path, clusters__noise=0.01, cluster_noise=0.3)
    assert vector(asked) == pytest.approx(vector(asked)) and vector(asked) @ clean > 0.99
    assert vector(more) == pytest.approx(vector(more)) and vector(more) @ clean < 0.95
    assert (tmp_path / "state" / requirement.NOISE_FILE).exists()
    with pytest.raises(SettingsError, match="cluster-noise"):
        device(tmp_path, cluster_noise="-1")


def test_the_same_prompts_get_the_same_noise_whatever_the_last_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = vector(device(tmp_path, clusters__noise=0.3))

    def jittered(*arguments: Any) -> np.ndarray:
        return encode(*arguments) + 1e-5 * np.random.default_rng(0).normal(size=(2, 32))

    monkeypatch.setattr(requirement, "encode", jittered)
    with caplog.at_level(logging.INFO):
        assert vector(device(tmp_path, PROMPTS[::-1], clusters__noise=0.3)) == pytest.approx(before, abs=1e-3)
    assert "of 1 wishes" in caplog.text and "of 2 wishes" not in caplog.text
    assert vector(device(tmp_path, [PROMPTS[0]] * 2, clusters__noise=0.3)) != pytest.approx(before, abs=1e-2)


def test_a_larger_noise_costs_nothing_and_another_encoder_costs_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    once = epsilon(0.1, 1e-5)
    with caplog.at_level(logging.INFO):
        answer(device(tmp_path, clusters__noise=0.1))
        answer(device(tmp_path, clusters__noise=1.0, clusters__delta=0.5))  # a delta that would make it look small
    assert caplog.text.count(f"of 1 wishes: (epsilon, delta) = ({once:.3g}, 1e-05)") == 2
    with caplog.at_level(logging.INFO):
        answer(device(tmp_path, clusters__noise=0.1, clusters__encoder=str(other_encoder())))
    assert f"of 2 wishes: (epsilon, delta) = ({2 * once:.3g}, 2e-05)" in caplog.text


def test_a_device_tells_no_more_in_all_than_its_policy_allows(tmp_path: Path) -> None:
    limited = Policy.model_validate({"max-epsilon": 1.5 * epsilon(0.5, 1e-5)})

    def ask(**run: Value) -> dict[str, Any]:
        return answer(dataclasses.replace(device(tmp_path, **run), policy=limited))

    for run in ({}, {"clusters__noise": 0.3}, {"clusters__noise": 0.3, "clusters__delta": 0.9}):
        with pytest.raises(PolicyError, match=r"would bring epsilon to (inf|\d+\.\d), max-epsilon"):
            ask(**run)
    assert not (tmp_path / "state" / requirement.NOISE_FILE).exists()  # what is refused is not spent
    assert ask(clusters__noise=0.5) and ask(clusters__noise=2.0) and ask(clusters__noise=0.5000001)
    with pytest.raises(PolicyError, match="max-epsilon"):
        ask(clusters__noise=0.5, clusters__encoder=str(other_encoder()))


def other_encoder() -> Path:
    """A language model that is not the backbone."""
    folder = workspace() / "other-encoder"
    if not folder.exists():
        make_llama(folder, seed=3)
    return folder


def test_another_encoder_is_another_space(tmp_path: Path) -> None:
    folder = other_encoder()
    own, other = device(tmp_path), device(tmp_path, clusters__encoder=str(folder))
    assert answer(own)["space"] != answer(other)["space"]
    same = device(
        tmp_path, clusters__encoder=str(tmp_path), cluster_encoder=str(folder)
    )  # lies elsewhere on the device
    assert answer(same)["space"] == answer(other)["space"] and vector(same) == pytest.approx(vector(other))


def test_an_encoder_does_not_depend_on_who_is_encoded_beside(tmp_path: Path) -> None:
    for changes in ({}, {"clusters__encoder": str(tiny_model())}):
        settings = device(tmp_path, **changes).settings
        task, backbone = load_task("language"), open_backbone(settings)
        texts = ["the captain", "the court and the judge read every article of the law", "wheat"]
        together = encode(settings, task, backbone, texts)
        alone = np.concatenate([encode(settings, task, backbone, [text]) for text in texts])
        assert together == pytest.approx(alone, abs=1e-4)
        assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(3))


def make_t5(folder: Path) -> None:
    """A random encoder-decoder, 16 wide."""
    from transformers import T5Config, T5Model

    size = write_tokenizer(folder)
    T5Model(T5Config(vocab_size=size, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)).save_pretrained(folder)


def make_clip(folder: Path) -> None:
    """A random model of texts and images; the half that reads texts is 16 wide and has 20 places."""
    from transformers import CLIPConfig, CLIPModel

    size = write_tokenizer(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = shape | {"vocab_size": size, "max_position_embeddings": 20, "eos_token_id": 0}
    vision = shape | {"image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)


def make_vision(folder: Path) -> None:
    """A random model that reads images alone."""
    from transformers import ViTConfig, ViTModel

    write_tokenizer(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **shape)).save_pretrained(folder)


@pytest.mark.parametrize("make", [make_t5, make_clip])
def test_the_part_that_reads_texts_encodes_them_alone_and_side_by_side(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path)
    encoder = open_encoder(str(tmp_path), "cpu")
    texts = ["the captain", "the court and the judge read every article of the law " * 4]
    found = encoder.embed(texts)
    assert found.shape == (2, 16) and np.isfinite(found).all() and abs(found[0] - found[1]).max() > 1e-3
    assert encoder.embed(texts[:1])[0] == pytest.approx(found[0], abs=1e-5)


def test_a_tokenizer_that_pads_on_the_left_is_told_otherwise(tmp_path: Path) -> None:
    make_clip(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    encoder = open_encoder(str(tmp_path), "cpu")
    beside = encoder.embed(["the captain", "the court and the judge"])
    assert encoder.embed(["the captain"])[0] == pytest.approx(beside[0], abs=1e-5)


def test_a_model_that_reads_no_texts_is_named(tmp_path: Path) -> None:
    make_vision(tmp_path)
    with pytest.raises(BackboneError, match=re.escape(f"clusters.encoder = {str(tmp_path)!r}: not a text encoder: ")):
        open_encoder(str(tmp_path), "cpu")


def test_the_adapter_plays_no_part(tmp_path: Path) -> None:
    from fedgen_app.learning import adapters

    me = device(tmp_path)
    backbone = open_backbone(me.settings)
    before = vector(me)
    adapters.write(backbone.model, {key: torch.ones(shape) for key, shape in backbone.layout})
    assert vector(me) == pytest.approx(before)


def test_a_pipelines_text_encoder_tells_prompts_apart_and_others_have_none() -> None:
    settings = image_settings("text")
    task, backbone = load_task("diffusion"), open_backbone(settings)
    rows = encode(settings, task, backbone, ["a disc", "a disc", "the captain and the sea"])
    assert rows[0] == pytest.approx(rows[1]) and rows[0] @ rows[2] < 0.999
    bare = image_settings("unconditional")
    with pytest.raises(SettingsError, match="no text encoder"):
        encode(bare, task, open_backbone(bare), ["a disc"])


def test_the_mean_is_over_real_tokens_alone() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mean_of_tokens(hidden, mask).tolist() == [[1, 2], [8, 9]]


def test_directions_that_cancel_are_none() -> None:
    with pytest.raises(DataError, match="cancel"):
        direction(np.array([[1.0, 0.0], [-1.0, 0.0]]))


MARK = "0123456789abcdef"


@pytest.mark.parametrize(
    "facts",
    [
        {"requirement": [1.0], "space": MARK},
        {"requirement": [0.6, 0.9], "space": MARK},
        {"requirement": [float("nan"), 1.0], "space": MARK},
        {"requirement": [float("inf"), 0.0], "space": MARK},
        {"requirement": [1, 0], "space": MARK},
        {"requirement": [True, False], "space": MARK},
        {"requirement": 1.0, "space": MARK},
        {"requirement": "1.0, 0.0", "space": MARK},
        {"requirement": [8192**-0.5] * 8193, "space": MARK},
        {"requirement": [0.6, 0.8]},
        {"requirement": [0.6, 0.8], "space": "a sentence that says too much"},
        {"requirement": [0.6, 0.8], "space": 7},
    ],
    ids=str,
)
def test_a_malformed_requirement_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its requirement"):
        parse_requirement(facts)


def test_a_good_requirement_is_taken() -> None:
    found = parse_requirement({"requirement": [0.6, -0.8], "space": MARK})
    assert found is not None and found.vector.tolist() == pytest.approx([0.6, -0.8]) and found.space == MARK
    assert parse_requirement({"space": MARK}) is None


def test_the_audit_command(tmp_path: Path) -> None:
    lines = [" ".join(TOPICS[topic].split()[i : i + 4]) for topic in TOPICS for i in range(12)]
    (tmp_path / "candidates.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "asked.txt").write_text("\n".join(lines[:20]) + "\n")
    options = ["--set", f"backbone={tiny_model()}", "--set", "dtype=float32", "--noise", "0.01,2"]
    files = [tmp_path / "candidates.txt", "--prompts", tmp_path / "asked.txt", "--output", tmp_path / "found.json"]
    ended = command("audit-prompts", *files, *options)
    assert ended.status == 0, ended.err
    assert "20 prompts" in ended.out and "36 candidates" in ended.out
    found = {(row["protection"], row["attacker"]): row for row in json.loads((tmp_path / "found.json").read_text())}
    top = {protection: row["top1"] for (protection, attacker), row in found.items() if attacker.endswith("candidates")}
    assert top["none"] == 1 and top["noise 2"] < 0.4 and top["rotation"] < 0.4
    assert found["rotation", COSINES]["top1"] > 0.9
    assert not any(line in (tmp_path / "found.json").read_text() for line in lines)


def test_the_audit_takes_noise_and_key_of_the_run_and_tells_what_repeats(tmp_path: Path) -> None:
    lines = [" ".join(TOPICS[topic].split()[i : i + 4]) for topic in TOPICS for i in range(2)]
    (tmp_path / "candidates.txt").write_text("\n".join([*lines, lines[0]]) + "\n")
    (tmp_path / "one.txt").write_text(f"{lines[3]}\n\n{lines[3]}\n{lines[3]}\n")
    (tmp_path / "key").write_bytes(KEY)
    settings = [f"backbone={tiny_model()}", "dtype=float32", "clusters.noise=0.03", f"clusters.key={tmp_path / 'key'}"]
    options = [f"--set={each}" for each in settings] + ["--noise", "0.5", "--output", str(tmp_path / "found.json")]
    ended = command("audit-prompts", tmp_path / "candidates.txt", "--prompts", tmp_path / "one.txt", *options)
    assert ended.status == 0, ended.err
    assert "1 prompt sought among 6 candidates" in ended.out and "one prompt: there are no cosines" in ended.out
    assert "candidates.txt: lines that repeat another one: 1; a prompt counts once" in ended.out
    assert "one.txt: lines that repeat another one: 2; a prompt counts once" in ended.out
    found = json.loads((tmp_path / "found.json").read_text())
    tried = [row["protection"] for row in found if row["attacker"].endswith("candidates")]
    assert tried == ["none", "noise 0.5", "noise 0.03", "rotation"]
    assert not any(row["attacker"] == COSINES for row in found)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.txt"], "none.txt"),
        (["empty.txt"], "no prompt in it"),
        (["two.txt", "--prompts", "empty.txt"], "no prompt in it"),
        (["two.txt", "--set", "clusters.key=one.txt"], "1 bytes, should be 32 or more"),
        (["one.txt"], "two prompts or more"),
        (["two.txt", "--noise", "much"], "--noise much"),
        (["two.txt", "--noise", "0"], "should be above 0"),
        (["two.txt", "--prompts", "three.txt"], "are no candidates"),
        (["two.txt", "--known", "2"], "--known 2: should be at most half of the 2 candidates"),
        (["two.txt", "--output", "/nowhere/found.json"], "--output /nowhere/found.json: is no file"),
        (["two.txt", "--output", "/"], "--output /: is no file"),
    ],
)
def test_what_cannot_be_audited_is_said(arguments: list[str], told: str, tmp_path: Path) -> None:
    for name, text in (("empty", "\n"), ("one", "a\n"), ("two", "a\nb\n"), ("three", "a\nb\nc\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    whole = [re.sub(r"(\w+\.txt)$", rf"{tmp_path}/\1", a) for a in arguments]
    ended = command("audit-prompts", *whole)
    assert ended.status == 2 and told in ended.err, ended.err
