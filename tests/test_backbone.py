"""The frozen backbone: found, fingerprinted, held once, fitted with LoRA."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_llama, tiny_model, tiny_settings
from safetensors.torch import load_file, save_file

from fedgen_app.errors import BackboneError
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import find, fingerprint, load_task, open_backbone, pick_device, pick_dtype
from fedgen_app.learning.export import load_peft, save_peft


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return loaded


def files(folder: Path) -> list[Path]:
    return load_task("language").weight_files(folder)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    whole, folder = weights(tiny_model()), tmp_path / "shards"
    folder.mkdir()
    names = sorted(whole)
    save_file({n: whole[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors", {"made": "by hand"})
    save_file({n: whole[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    assert fingerprint(folder, files(folder)) == fingerprint(tiny_model(), files(tiny_model()))
    assert fingerprint(folder, files(folder)).startswith("sha256:") and len(fingerprint(folder, files(folder))) == 71


def test_the_fingerprint_sees_one_changed_weight_name_shape_and_type(tmp_path: Path) -> None:
    whole = weights(tiny_model())
    name = "model.norm.weight"
    flipped, renamed, folded, halved = (dict(whole) for _ in range(4))
    flipped[name] = whole[name].clone()
    flipped[name][3] = torch.nextafter(whole[name][3], torch.tensor(9.0))
    renamed["model.norm.bias"] = renamed.pop(name)
    folded[name] = whole[name].reshape(2, -1)
    halved[name] = whole[name].view(torch.int32)
    seen = {fingerprint(tiny_model(), files(tiny_model()))}
    for number, changed in enumerate((flipped, renamed, folded, halved)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        seen.add(fingerprint(folder, files(folder)))
    assert len(seen) == 5


def marked(folder: Path) -> str:
    task = load_task("language")
    return fingerprint(folder, task.weight_files(folder), task.config(folder))


def test_the_fingerprint_is_of_configuration_and_tokenizer_too(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model(), folder)
    whole = marked(tiny_model())
    assert open_backbone(tiny_settings()).fingerprint == whole == marked(folder)
    # What says nothing of what is computed, and what the hub's copy may lack.
    for name, notes in (
        ("config.json", {"_name_or_path": "/elsewhere", "transformers_version": "1", "dtype": "float16"}),
        ("tokenizer_config.json", {"name_or_path": "/elsewhere", "chat_template": "{{ messages }}"}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | notes, indent=5))
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.txt").write_text("nobody reads this")
    assert marked(folder) == whole
    for name, changes in (
        ("config.json", {"rope_theta": 5.0}),
        ("tokenizer_config.json", {"eos_token": "the"}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(json.dumps(json.loads(kept) | changes))
        assert marked(folder) != whole, name
        (folder / name).write_bytes(kept)
    (folder / "config.json").write_text("{half")
    with pytest.raises(BackboneError, match="config.json: damaged"):
        marked(folder)


def test_a_token_of_the_same_name_is_no_note(tmp_path: Path) -> None:
    for folder, token in (("one", "dtype"), ("other", "kind")):
        shutil.copytree(tiny_model(), tmp_path / folder)
        (tmp_path / folder / "vocab.json").write_text(json.dumps({"a": 0, token: 1}))
    assert marked(tmp_path / "one") != marked(tmp_path / "other")


def test_the_card_loads_the_revision_that_was_trained_on() -> None:
    settings, task = tiny_settings(), load_task("language")
    opened = open_backbone(settings)
    plain = "\n".join(task.usage(settings, opened))
    assert "revision" not in plain
    dated = "\n".join(task.usage(settings, replace(opened, reference="owner/model", revision="v1.2")))
    assert "AutoModelForCausalLM.from_pretrained('owner/model', revision='v1.2')" in dated


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_model(), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=f"{folder}: damaged weights"):
        open_backbone(tiny_settings(backbone=str(folder)))


def test_an_unknown_target_names_the_layers_there_are() -> None:
    with pytest.raises(BackboneError, match=r"no layer named 'query'; there are .*down_proj.*k_proj.*q_proj"):
        open_backbone(tiny_settings(lora__targets="q_proj,query"))


@pytest.mark.parametrize(
    ("target", "layer"), [("embed_tokens", "Embedding"), ("norm", "LlamaRMSNorm"), ("self_attn", "LlamaAttention")]
)
def test_a_target_that_takes_no_adapter_is_named_with_its_type(target: str, layer: str) -> None:
    with pytest.raises(BackboneError, match=rf"lora.targets: \S*{target} is a {layer}, which takes no adapter"):
        open_backbone(tiny_settings(lora__targets=f"q_proj,{target}"))


def test_targets_of_the_settings_are_taken() -> None:
    layout = open_backbone(tiny_settings(lora__targets="o_proj")).layout
    assert len(layout) == 4 and all(".o_proj.lora_" in key for key, _ in layout)


def test_a_hub_out_of_reach_names_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"hf download no-such-owner/model --local-dir FOLDER.* backbone = FOLDER"):
        open_backbone(tiny_settings(backbone="no-such-owner/model"))


def test_find_local_and_bundled(tmp_path: Path) -> None:
    assert find(str(tiny_model()), "", load_task("language")) == tiny_model().resolve()
    assert (find("bundled", "", load_task("language")) / "config.json").is_file()
    with pytest.raises(BackboneError, match="no such folder"):
        find(str(tmp_path / "gone"), "", load_task("language"))


def test_types_and_devices() -> None:
    cpu = torch.device("cpu")
    assert [pick_dtype(n, cpu) for n in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    native = torch.cpu.get_capabilities()
    fast = any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(BackboneError, match="device = 'cuda'"):
            pick_device("cuda")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_adapter_is_float32_on_a_half_precision_backbone(name: str) -> None:
    opened = open_backbone(tiny_settings(dtype=name))
    held = {p.dtype for n, p in opened.model.named_parameters() if ".lora_" not in n}
    assert held == {getattr(torch, name)}
    assert {p.dtype for p in adapters.parameters(opened.model).values()} == {torch.float32}


def test_one_process_holds_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_backbone(tiny_settings())
    assert open_backbone(tiny_settings(seed=5, learning_rate=0.1, lora__init="somewhere")) is opened
    assert open_backbone(tiny_settings(backbone="elsewhere"), str(tiny_model())) is opened
    assert open_backbone(tiny_settings(lora__rank=2)) is not opened


def test_what_a_backbone_says_of_itself() -> None:
    opened = open_backbone(tiny_settings())
    count = sum(t.numel() for t in weights(tiny_model()).values())  # tied weights stand there once
    assert opened.parameters == count and opened.full_bytes == 4 * count
    assert opened.fingerprint == marked(tiny_model())
    assert opened.reference == str(tiny_model()) and opened.name == "tiny-llama"
    trainable = {n for n, p in opened.model.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in n for n in trainable)


def test_the_seeded_start_changes_nothing_yet_and_is_the_same_for_all() -> None:
    opened = open_backbone(tiny_settings())
    inputs = torch.arange(1, 9)[None]
    adapters.write(opened.model, adapters.fresh(opened.layout, 3))
    opened.model.eval()
    with torch.no_grad():
        started = opened.model(input_ids=inputs).logits
        with opened.model.disable_adapter():
            assert torch.equal(opened.model(input_ids=inputs).logits, started)
    assert adapters.digest(adapters.fresh(opened.layout, 3)) == adapters.digest(adapters.fresh(opened.layout, 3))
    assert adapters.digest(adapters.fresh(opened.layout, 3)) != adapters.digest(adapters.fresh(opened.layout, 4))


def test_an_init_is_compared_with_the_settings_and_not_with_what_the_model_holds(tmp_path: Path) -> None:
    backbone = open_backbone(tiny_settings(lora__rank=4))
    start = backbone.fresh(1)
    adapters.write(backbone.model, start)
    save_peft(tmp_path, backbone, start, "")
    smaller = {key: x[:2] if ".lora_A." in key else x[:, :2] for key, x in start.items()}
    adapters.write(backbone.model, smaller)  # a client of another rank, in the same process
    assert adapters.digest(load_peft(tmp_path, backbone)) == adapters.digest(start)


def test_a_folder_whose_content_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    settings = tiny_settings(backbone=str(make_llama(tmp_path / "model")))
    first = open_backbone(settings)
    assert open_backbone(settings) is first
    make_llama(tmp_path / "other", seed=1)
    (tmp_path / "model").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "model")
    assert open_backbone(settings).fingerprint == marked(tmp_path / "model") != first.fingerprint
