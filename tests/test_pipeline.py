"""What is read from a diffusers folder, and which folders are refused, with what was found in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from helpers import command, tiny_model
from huggingface_hub.utils import filter_repo_objects
from pipelines import CLASSES, MAKERS, PROMPT_TOKENS, image_config, image_settings, tiny_pipeline

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning import backbone as backbone_module
from fedgen_app.learning.backbone import Backbone, fingerprint, open_backbone
from fedgen_app.settings import defaults
from fedgen_app.tasks._pipeline import Pipeline
from fedgen_app.tasks.diffusion import TASK

ROOT = Path(__file__).resolve().parents[1]
FACTS = {  # condition, input channels, input side, image channels, image side, classes, whether there is a VAE
    "unconditional": ("none", 1, 16, 1, 16, 0, False),
    "classes": ("class", 1, 16, 1, 16, 3, False),
    "text": ("text", 1, 16, 1, 16, 0, False),
    "latent": ("text", 4, 8, 3, 16, 0, True),
    "dit": ("class", 4, 8, 3, 16, 3, True),
}


def opened(kind: str, **overrides: Any) -> tuple[Backbone, Pipeline]:
    backbone = open_backbone(image_settings(kind, **overrides))
    return backbone, cast(Pipeline, backbone.processor)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_is_known_by_its_components(kind: str) -> None:
    backbone, found = opened(kind)
    facts = (found.condition, found.channels, found.side, found.image_channels, found.resolution, found.class_count)
    assert (*facts, found.has_vae) == FACTS[kind]
    assert not [n for n, p in backbone.model.named_parameters() if "lora_" not in n and p.requires_grad]
    assert {key.split(".lora_")[0].rsplit(".to_", 1)[1] for key, _ in backbone.layout} == {"q", "k", "v", "out.0"}
    assert backbone.name == f"tiny-{kind}" and backbone.reference == str(tiny_pipeline(kind))


def test_the_fingerprint_is_of_every_part_that_generates(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_pipeline("latent"), folder)
    (folder / "safety_checker").mkdir()
    for ending in ("fp16", "non_ema"):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        shutil.copy(file, file.with_name(f"diffusion_pytorch_model.{ending}.safetensors"))
    before = open_backbone(image_settings("latent")).fingerprint
    assert open_backbone(image_settings(str(folder))).fingerprint == before
    for part in ("unet", "vae", "text_encoder"):
        changed = tmp_path / part
        shutil.copytree(folder, changed)
        (file,) = [f for f in (changed / part).glob("*.safetensors") if ".fp16" not in f.name and "non" not in f.name]
        file.write_bytes(file.read_bytes()[:-1] + b"\x3d")
        assert open_backbone(image_settings(str(changed))).fingerprint != before, part


def other(folder: Path, place: str, **changes: Any) -> str:
    """The fingerprint of a copy of the latent pipeline with other entries in one JSON file."""
    shutil.copytree(tiny_pipeline("latent"), folder)
    edit(folder / place, **changes)
    return open_backbone(image_settings(str(folder))).fingerprint


CHANGES: dict[str, dict[str, Any]] = {
    "scheduler/scheduler_config.json": {"beta_end": 0.013},
    "unet/config.json": {"norm_eps": 1e-4},
    "vae/config.json": {"scaling_factor": 0.25},
    "text_encoder/config.json": {"hidden_act": "gelu"},
    "tokenizer/tokenizer_config.json": {"model_max_length": 4},
    "tokenizer/tokenizer.json": {"normalizer": {"type": "Lowercase"}},
    "model_index.json": {"id2label": {"0": "disc"}},
}
SAME: dict[str, dict[str, Any]] = {
    "scheduler/scheduler_config.json": {"_diffusers_version": "0.1"},
    "unet/config.json": {"_name_or_path": "/elsewhere", "_diffusers_version": "0.1"},
    "text_encoder/config.json": {"dtype": "float16", "torch_dtype": "float16", "transformers_version": "4.0"},
    "tokenizer/tokenizer_config.json": {"name_or_path": "/elsewhere", "is_local": True},
    "model_index.json": {"_diffusers_version": "0.1", "safety_checker": ["stable_diffusion", "X"]},
}


@pytest.mark.parametrize("place", CHANGES)
def test_the_fingerprint_tells_another_schedule_tokenizer_or_shape_apart(place: str, tmp_path: Path) -> None:
    before = open_backbone(image_settings("latent")).fingerprint
    assert other(tmp_path / "changed", place, **CHANGES[place]) != before


@pytest.mark.parametrize("place", SAME)
def test_the_fingerprint_does_not_hang_on_notes_and_order(place: str, tmp_path: Path) -> None:
    before = open_backbone(image_settings("latent")).fingerprint
    assert other(tmp_path / "changed", place, **SAME[place]) == before
    file = tmp_path / "changed" / place
    file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=7))
    backbone_module._open.cache_clear()
    assert open_backbone(image_settings(str(tmp_path / "changed"))).fingerprint == before


@pytest.mark.parametrize("kind", ["latent", "dit", "at root"])
def test_what_the_hub_gives_has_the_fingerprint_of_the_whole_folder(kind: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    if kind == "at root":
        for part in ("unet", "scheduler"):
            shutil.copytree(tiny_pipeline("unconditional") / part, whole, dirs_exist_ok=True)
        shutil.copy(tiny_pipeline("unconditional") / "model_index.json", whole)
    else:
        shutil.copytree(tiny_pipeline(kind), whole)
    (whole / "safety_checker").mkdir()
    for name in ("model.safetensors", "config.json", "notes.txt"):
        (whole / "safety_checker" / name).write_text("{}")
    (whole / "notes.txt").write_text("nobody reads this")
    names = [str(f.relative_to(whole)) for f in whole.rglob("*") if f.is_file()]
    for name in filter_repo_objects(names, allow_patterns=list(TASK.hub_files)):
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
        # As the hub's cache has it: links to blobs.
        (tmp_path / "snapshot" / name).symlink_to(whole / name)
    marks = [fingerprint(f, TASK.weight_files(f), TASK.config(f)) for f in (whole, tmp_path / "snapshot")]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("shard", ["", "-00001-of-00001"])
def test_weights_in_half_precision_alone_are_named_with_what_to_do(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_pipeline("latent"), folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16{shard}.safetensors"))
    with pytest.raises(BackboneError) as caught:
        open_backbone(image_settings(str(folder)))
    renamed = f"model.fp16{shard}.safetensors: rename it to model{shard}.safetensors, and so with other parts"
    assert f"{folder}: of text_encoder there is only {renamed}" in str(caught.value)


def test_the_oldest_pipelines_have_denoiser_and_scheduler_in_no_folder(tmp_path: Path) -> None:
    inside = tiny_pipeline("unconditional")
    for part in ("unet", "scheduler"):
        shutil.copytree(inside / part, tmp_path, dirs_exist_ok=True)
    shutil.copy(inside / "model_index.json", tmp_path)
    backbone, found = opened(str(tmp_path))
    theirs = DDPMPipeline.from_pretrained(tmp_path).unet.state_dict()
    own = backbone.model.get_base_model().state_dict()
    assert all(
        torch.equal(own.get(name, own.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}")), w)
        for name, w in theirs.items()
    )
    assert found.schedule == opened("unconditional")[1].schedule
    assert not any("subfolder" in line for line in TASK.usage(image_settings(str(tmp_path)), backbone))


def test_prompts_longer_than_the_encoders_length_are_cut() -> None:
    _, found = opened("text")
    words = " ".join(["the captain and the crew set sail"] * 20)
    tokens = found.tokens(["", "disc", words])
    assert tokens.shape == (3, PROMPT_TOKENS) and tokens.dtype == torch.int64
    assert tokens[2].tolist() == found.tokenizer(words)["input_ids"][:PROMPT_TOKENS]
    assert torch.isfinite(found.embed([words])).all()


def test_the_encoders_own_length_bounds_a_tokenizer_that_names_none(tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_pipeline("text"), folder)
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    _, found = opened(str(folder))
    assert found.embed(["the captain " * 50]).shape == (1, PROMPT_TOKENS, 16)


def test_embeddings_do_not_depend_on_how_prompts_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgen_app.tasks import _pipeline

    _, found = opened("text")
    texts = ["", "disc", "a photo of a cross", "the judge", "square"]
    whole = found.embed(texts)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    monkeypatch.setattr(_pipeline, "ENCODED", 2)
    assert torch.allclose(found.embed(texts), whole, atol=1e-6)


def test_classes_by_name_and_by_number() -> None:
    _, found = opened("dit")
    assert found.classes == CLASSES
    assert [found.class_of(c) for c in (*CLASSES, "0", "2")] == [0, 1, 2, 0, 2]
    for wrong in ("triangle", "3", "-1", "", "1.0", "²"):
        with pytest.raises(SettingsError, match=f"label '{wrong}' is no class .* disc, square, cross"):
            found.class_of(wrong)
    _, unnamed = opened("classes")
    assert unnamed.class_of("2") == 2
    with pytest.raises(SettingsError, match="label 'disc' is no class of this backbone; it knows 0 to 2"):
        unnamed.class_of("disc")


def test_a_class_is_known_by_each_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    shutil.copytree(tiny_pipeline("dit"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane"}
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    _, found = opened(str(folder))
    assert [found.class_of(name) for name in ("tench", "Tinca tinca", "tench, Tinca tinca", "crane")] == [0, 0, 0, 2]


def test_resolutions_that_the_denoiser_cannot_take_are_named() -> None:
    _, pixel = opened("text")
    assert [pixel.side_for(r) for r in (0, 16, 32, 10)] == [16, 16, 32, 10]
    with pytest.raises(SettingsError, match="resolution = 17: should be a multiple of 2 "):
        pixel.side_for(17)
    _, latent = opened("latent")
    assert [latent.side_for(r) for r in (0, 16, 32)] == [8, 8, 16]
    with pytest.raises(SettingsError, match="resolution = 18: should be a multiple of 4 "):
        latent.side_for(18)
    _, dit = opened("dit")
    assert [dit.side_for(r) for r in (0, 16)] == [8, 8]
    with pytest.raises(SettingsError, match="resolution = 32: this DiT takes 16 only"):
        dit.side_for(32)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def index_of_nothing(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


def like_sdxl(folder: Path) -> None:
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ).save_pretrained(folder / "unet")


def told_classes_beside_text(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    UNet2DConditionModel(**{**unet.config, "num_class_embeds": 3}).save_pretrained(folder / "unet")


def for_inpainting(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    UNet2DConditionModel(**{**unet.config, "in_channels": 9}).save_pretrained(folder / "unet")


def flow_matching(folder: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def no_text_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    edit(folder / "model_index.json", text_encoder=[None, None])


def another_text_encoder(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])


def another_denoiser(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])


def another_autoencoder(folder: Path) -> None:
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])


def no_scheduler_file(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def pickled(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()


def pickled_unet(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()


def half_a_file(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def oblong(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 16])


def unknown_prediction(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")


BROKEN: dict[Callable[[Path], None], str] = {
    no_index: "no diffusers pipeline: model_index.json",
    index_of_nothing: "no diffusers pipeline: model_index.json",
    like_sdxl: "its UNet wants more than a prompt's hidden states",
    told_classes_beside_text: "its UNet wants more than a prompt's hidden states",
    for_inpainting: "its denoiser takes 9 channels, its autoencoder makes 4",
    flow_matching: "its FlowMatchEulerDiscreteScheduler has no beta schedule",
    unknown_prediction: "its denoiser predicts 'flow_prediction'",
    no_text_encoder: "a UNet2DConditionModel needs a tokenizer and a CLIPTextModel beside it",
    another_text_encoder: "a UNet2DConditionModel needs a tokenizer and a CLIPTextModel beside it",
    another_denoiser: r"no denoiser that is known here \(.*\) among .*unet \(FluxTransformer2DModel\)",
    another_autoencoder: "its autoencoder is a AutoencoderTiny, not an AutoencoderKL",
    no_scheduler_file: "scheduler: cannot be loaded: .*scheduler_config.json",
    pickled: r"no \*.safetensors weights",
    pickled_unet: "unet: cannot be loaded",
    half_a_file: "damaged weights",
    oblong: r"its denoiser's sample_size is \[8, 16\], should be one number",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_folder_that_cannot_be_used_is_named_with_what_is_wrong(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_pipeline("latent"), folder)
    damage(folder)
    with pytest.raises(BackboneError, match=BROKEN[damage]) as caught:
        open_backbone(image_settings(str(folder)))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_language_model_is_no_pipeline() -> None:
    with pytest.raises(BackboneError, match=f"{tiny_model()}: no diffusers pipeline: model_index.json"):
        open_backbone(image_settings(str(tiny_model())))


@pytest.mark.parametrize("kind", ["unconditional", "dit"])
def test_an_adapter_in_a_text_encoder_that_is_not_there_is_refused(kind: str) -> None:
    with pytest.raises(SettingsError, match="lora.text-encoder = true: this backbone has no text encoder"):
        open_backbone(image_settings(kind, lora__text_encoder=True))


@pytest.mark.parametrize("caption", ["a photo", "{} and {}", "{0}", "a {} of {x}", "{", ""])
def test_a_caption_has_one_place_for_the_label(caption: str) -> None:
    with pytest.raises(SettingsError, match="diffusion.caption = .*: should hold {} once, for the label"):
        image_settings("text", diffusion__caption=caption)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("text", {"resolution": 17}, "resolution = 17: should be a multiple of 2"),
        ("dit", {"resolution": 32}, "resolution = 32: this DiT takes 16 only"),
        ("unconditional", {"lora.text-encoder": True}, "lora.text-encoder = true"),
        ("text", {"diffusion.caption": "a photo"}, "diffusion.caption = 'a photo'"),
        ("dit", {"samples.prompts": "disc|triangle"}, "samples.prompts = 'triangle': label 'triangle' is no class"),
        ("unconditional", {"samples.prompts": "a disc"}, "samples.prompts = 'a disc': this backbone is told nothing"),
    ],
)
def test_a_run_with_such_a_setting_ends_before_its_first_round(
    kind: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config, standard = image_config(tmp_path / "run", kind) | changes, defaults(ROOT)
    changed = [f"--set={k}={v}" for k, v in config.items() if v != standard[k] and k != "output-dir"]
    start = ["run", ROOT, "--engine", "in-process", "--clients", "3", "--output", tmp_path / "run"]
    ended = command(*start, *changed)
    assert ended.status == 2 and "Traceback" not in ended.err
    assert named in " ".join(ended.err.split())
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())
