"""Images as rows: the caches against computing directly, whose images are whose, what an image is told to be of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from pipelines import (
    CLASSES,
    PROMPT_TOKENS,
    SIDE,
    class_folders,
    draw,
    image_settings,
    loud,
    tiny_images,
    tiny_pipeline,
    write_images,
)
from safetensors.numpy import load_file
from transformers import AutoTokenizer, CLIPTextModel

from fedgen_app.errors import DataError, SettingsError
from fedgen_app.learning import backbone as backbone_module
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.task import Examples, Share
from fedgen_app.settings import Settings
from fedgen_app.tasks import _sources
from fedgen_app.tasks._pictures import Encoded, Reference
from fedgen_app.tasks.diffusion import TASK

ALL: dict[str, Any] = {"test_sequences": 0}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that is empty yet, and a process that has loaded nothing yet."""
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path / "cache"))
    backbone_module._open.cache_clear()
    yield tmp_path / "cache"
    backbone_module._open.cache_clear()


def loaded(settings: Settings, backbone: Backbone | None = None) -> Examples:
    found = TASK.load_test(settings, backbone or open_backbone(settings))
    assert found is not None
    return found


def built(cache: Path) -> set[str]:
    return {f.name.split("-")[0] for f in cache.glob("*.safetensors")}


def stored(folder: Path | None = None) -> tuple[np.ndarray, list[str]]:
    """The test images as they lie in their file, and the names of what they show."""
    with np.load((folder or tiny_images()) / "test.npz") as arrays:
        return arrays["images"], [str(arrays["names"][label]) for label in arrays["labels"]]


def embedded(texts: list[str]) -> torch.Tensor:
    """Hidden states as transformers alone computes them, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pipeline("latent") / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_pipeline("latent") / "text_encoder", dtype=torch.float32).eval()
    rows = []
    for text in texts:
        ids = tokenizer(text, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt")
        with torch.no_grad():
            rows.append(encoder(ids.input_ids).last_hidden_state[0])
    return torch.stack(rows)


def slow_loss(backbone: Backbone, texts: list[str], seed: int, dropout: bool) -> float:
    """The loss of all test images with nothing cached: diffusers' autoencoder, its draw, its schedule."""
    folder = tiny_pipeline("latent")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
    images = torch.from_numpy(stored()[0]).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    noise = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(100, (len(images),), generator=noise)
    if dropout:
        torch.rand(len(images), generator=noise)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample(noise) * vae.config.scaling_factor
        drawn = torch.randn(latents.shape, generator=noise)
        noisy = schedule.add_noise(latents, drawn, timesteps)
        said = backbone.model(noisy, timesteps, encoder_hidden_states=embedded(texts)).sample
        return float(torch.nn.functional.mse_loss(said, drawn))


def loss_of(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> float:
    backbone.model.eval()
    with torch.no_grad():
        batch = {**examples.rows, **examples.shared}
        return float(TASK.loss(settings, backbone)(backbone.model, batch, torch.Generator().manual_seed(seed)))


def test_the_caches_give_the_loss_that_there_is_without_them(own_cache: Path) -> None:
    settings = image_settings("latent", diffusion__caption_dropout=0.0, **ALL)
    backbone = loud("latent")
    _, labels = stored()
    expected = slow_loss(backbone, [f"a photo of a {label}" for label in labels], 3, dropout=False)
    first = loaded(settings, backbone)
    assert built(own_cache) == {"pictures", "moments", "prompts"}
    assert loss_of(settings, backbone, first, 3) == pytest.approx(expected, rel=1e-5)
    # In bits the same, whether it was computed just now or read from the disk.
    again = loaded(settings, backbone)
    assert loss_of(settings, backbone, again, 3) == loss_of(settings, backbone, first, 3)
    assert loss_of(settings, backbone, first, 4) != loss_of(settings, backbone, first, 3)


def test_a_caption_that_is_left_out_is_the_empty_prompt(own_cache: Path) -> None:
    settings = image_settings("latent", diffusion__caption_dropout=0.999999, **ALL)
    backbone = loud("latent")
    examples = loaded(settings, backbone)
    assert torch.allclose(examples.shared["hidden"][:1], embedded([""]), atol=1e-6)
    assert int(examples.rows["caption"].min()) == 1, "no image's own caption is the empty one"
    expected = slow_loss(backbone, [""] * len(examples), 3, dropout=True)
    assert loss_of(settings, backbone, examples, 3) == pytest.approx(expected, rel=1e-5)
    captioned = slow_loss(backbone, [f"a photo of a {label}" for label in stored()[1]], 3, dropout=True)
    assert abs(captioned - expected) > 1e-4, "the captions do not matter to this backbone"


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("loaded although its output is cached")


def test_a_second_process_touches_neither_autoencoder_nor_text_encoder(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = image_settings("latent", **ALL)
    first, mine = loaded(settings), TASK.load_data(settings, open_backbone(settings), Share(0, 3))
    backbone_module._open.cache_clear()
    for kind in (AutoencoderKL, CLIPTextModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    backbone = open_backbone(settings)
    second, again = loaded(settings, backbone), TASK.load_data(settings, backbone, Share(0, 3))
    for one, other in ((first, second), (mine.train, again.train), (mine.holdout, again.holdout)):
        assert set(one.rows) == {"moments", "caption"} and set(one.shared) == {"hidden"}
        assert all(torch.equal(one.rows[name], other.rows[name]) for name in one.rows)
        assert torch.equal(one.shared["hidden"], other.shared["hidden"])
    value = TASK.loss(settings, backbone)(backbone.model, {**second.rows, **second.shared}, torch.Generator())
    value.backward()  # nor does the training loop


def test_changed_images_other_captions_and_another_backbone_have_caches_of_their_own(
    own_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name, seed in (("train", 1), ("test", 2)):
        write_images(folder / f"{name}.npz", 4, seed)
    settings = image_settings("latent", dataset=str(folder), **ALL)
    first = loaded(settings)
    other = loaded(image_settings("latent", dataset=str(folder), diffusion__caption="a drawing of a {}", **ALL))
    assert torch.equal(other.rows["moments"], first.rows["moments"])
    assert not torch.equal(other.shared["hidden"], first.shared["hidden"])
    write_images(folder / "test.npz", 4, 3)
    changed = loaded(settings)
    assert not torch.equal(changed.rows["moments"], first.rows["moments"])
    before = len(list(own_cache.glob("moments-*.safetensors")))
    foreign = loaded(image_settings("dit", dataset=str(folder), **ALL))
    assert not torch.equal(foreign.rows["moments"], changed.rows["moments"])
    assert len(list(own_cache.glob("moments-*.safetensors"))) == before + 1


def test_a_tokenizer_that_cuts_otherwise_has_embeddings_of_its_own(own_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_pipeline("text"), folder)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4}))
    length = {kind: loaded(image_settings(kind, **ALL)).shared["hidden"].shape[1] for kind in ("text", str(folder))}
    assert length == {"text": PROMPT_TOKENS, str(folder): 4}


def test_a_client_holds_its_own_captions_only(tmp_path: Path) -> None:
    captions = np.array([f"drawing number {n}" for n in range(8)])
    source = save(tmp_path / "captioned", captions=captions)
    settings = image_settings("text", dataset=str(source), partition__by="iid")
    backbone = open_backbone(settings)
    whole = cast(Any, backbone.processor).embed(["", *captions])
    images = torch.from_numpy(np.load(source / "train.npz")["images"])
    train = TASK.load_data(settings, backbone, Share(0, 2)).train
    assert len(train.shared["hidden"]) == 1 + len(train) < 9
    for pixels, number in zip(train.rows["pixels"][:, 0], train.rows["caption"], strict=True):
        (place,) = (n for n, image in enumerate(images) if torch.equal(image, pixels))
        assert torch.allclose(train.shared["hidden"][number], whole[1 + place], atol=1e-6)


def test_moments_are_those_of_the_autoencoder_and_not_a_draw(own_cache: Path) -> None:
    loaded(image_settings("latent", **ALL))
    (file,) = own_cache.glob("moments-*.safetensors")
    moments = load_file(file)["moments"]
    vae = AutoencoderKL.from_pretrained(tiny_pipeline("latent") / "vae").eval()
    images = torch.from_numpy(stored()[0]).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        spread = vae.encode(images).latent_dist
    assert moments.shape == (48, 8, 8, 8)
    assert np.allclose(moments[:, :4], spread.mean, atol=1e-5)
    assert np.allclose(moments[:, 4:].clip(-30, 20), spread.logvar, atol=1e-4)


def test_a_learning_text_encoder_gets_tokens_and_no_cached_embeddings(own_cache: Path) -> None:
    settings = image_settings("latent", lora__text_encoder=True, **ALL)
    examples = loaded(settings)
    assert set(examples.shared) == {"tokens"} and built(own_cache) == {"pictures", "moments"}
    assert examples.shared["tokens"].shape == (1 + len(CLASSES), PROMPT_TOKENS)


def test_pixels_are_those_of_the_file_and_captions_those_of_their_labels() -> None:
    backbone = open_backbone(image_settings("text"))
    examples = loaded(image_settings("text", **ALL), backbone)
    images, labels = stored()
    assert np.array_equal(examples.rows["pixels"].numpy()[:, 0], images)
    texts = sorted(f"a photo of a {name}" for name in CLASSES)
    assert [texts[n - 1] for n in examples.rows["caption"].tolist()] == [f"a photo of a {name}" for name in labels]
    encoder = cast(Any, backbone.processor)
    assert torch.allclose(examples.shared["hidden"], encoder.embed(["", *texts]), atol=1e-6)


def test_a_class_conditional_backbone_is_told_classes() -> None:
    _, labels = stored()
    for kind in ("dit", "classes"):  # one knows their names, the other their numbers only
        examples = loaded(image_settings(kind, **ALL))
        assert [CLASSES[n] for n in examples.rows["class"].tolist()] == labels


def save(folder: Path, **arrays: Any) -> Path:
    """A data set without what the others have: eight images to train on and eight to test on."""
    folder.mkdir()
    generator = np.random.default_rng(4)
    images = np.stack([draw(n % 3, generator) for n in range(8)])
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", images=images, **arrays)
    return folder


def test_a_class_conditional_backbone_needs_labels_that_it_knows(tmp_path: Path) -> None:
    bare = save(tmp_path / "bare")
    for kind in ("dit", "classes"):
        settings = image_settings(kind, dataset=str(bare), partition__by="iid")
        with pytest.raises(DataError, match="bare: a class-conditional backbone needs labels, and there are none"):
            loaded(settings)
        with pytest.raises(DataError, match="needs labels"):
            TASK.load_data(settings, open_backbone(settings), Share(0, 2))
    labels, names = np.arange(8) % 4, np.array([*CLASSES, "triangle"])
    foreign = save(tmp_path / "foreign", labels=labels, names=names)
    with pytest.raises(SettingsError, match="label 'triangle' is no class of this backbone; it knows disc"):
        loaded(image_settings("dit", dataset=str(foreign)))


def test_captions_come_before_labels_and_images_without_either_get_the_empty_prompt(tmp_path: Path) -> None:
    captions = np.array([f"drawing number {n}" for n in range(8)])
    both = save(tmp_path / "both", captions=captions, labels=np.zeros(8, int), names=np.array(CLASSES))
    examples = loaded(image_settings("text", dataset=str(both), partition__by="iid"))
    assert sorted(examples.rows["caption"].tolist()) == list(range(1, 9)) and len(examples.shared["hidden"]) == 9
    bare = save(tmp_path / "bare")
    settings = image_settings("text", dataset=str(bare), partition__by="iid")
    examples = loaded(settings)
    hidden = examples.shared["hidden"]
    assert all(torch.equal(hidden[n], hidden[0]) for n in examples.rows["caption"].tolist())
    assert TASK.prompts(settings, open_backbone(settings)) == ("",)


def test_clients_share_out_every_image_and_hold_some_back() -> None:
    settings = image_settings("text", holdout_fraction=0.25)
    backbone = open_backbone(settings)
    owned = [TASK.load_data(settings, backbone, Share(n, 3)) for n in range(3)]
    few = TASK.load_data(
        image_settings("text", holdout_fraction=0.25, partition__max_examples=2), backbone, Share(0, 3)
    )
    assert len(few.train) == 2 < len(owned[0].train)
    assert len(few.holdout) == len(owned[0].holdout)
    parts = [part for data in owned for part in (data.train, data.holdout)]
    with np.load(tiny_images() / "train.npz") as arrays:
        whole = sorted(image.tobytes() for image in arrays["images"])
    assert sorted(row.numpy().tobytes() for part in parts for row in part.rows["pixels"]) == whole
    assert all(len(data.holdout) == round(0.25 * (len(data.train) + len(data.holdout))) for data in owned)


def test_a_devices_own_folder_is_all_its_own(tmp_path: Path) -> None:
    own = save(tmp_path / "own", labels=np.arange(8) % 3, names=np.array(CLASSES))
    settings = image_settings("text", holdout_fraction=0.25, dataset="", partition__by="iid")
    backbone = open_backbone(settings)
    data = TASK.load_data(settings, backbone, Share(folder=str(own)))
    assert (len(data.train), len(data.holdout)) == (6, 2)
    with pytest.raises(DataError, match="dataset = '': this client has no data of its own"):
        TASK.load_data(settings, backbone, Share())
    assert TASK.load_test(settings, backbone) is None


@pytest.mark.parametrize(("wanted", "rows"), [(0, 48), (5, 5), (48, 48), (1000, 48)])
def test_test_sequences_limits_the_rows_that_the_loss_is_measured_on(wanted: int, rows: int) -> None:
    assert len(loaded(image_settings("text", test_sequences=wanted))) == rows


@pytest.mark.parametrize(("wanted", "real", "others"), [(0, None, None), (12, 12, 12), (30, 30, 18), (99, 48, 0)])
def test_generated_images_are_compared_with_as_many_real_ones(wanted: int, real: int, others: int) -> None:
    found = loaded(image_settings("text", metrics__samples=wanted)).reference
    if not wanted:
        assert found is None
        return
    assert isinstance(found, Reference) and not found.own
    assert found.pixels.shape == (real, SIDE, SIDE, 1) and len(found.others) == others
    assert found.prompts == tuple(f"a photo of a {label}" for label in found.labels)
    chosen = {image.tobytes() for image in (*found.pixels, *found.others)}
    assert len(chosen) == real + others, "the floor is of other images than the measure"


def test_a_client_compares_with_its_own_images() -> None:
    settings = image_settings("text", metrics__personal_samples=6, holdout_fraction=0.5)
    data = TASK.load_data(settings, open_backbone(settings), Share(1, 3))
    found = data.holdout.reference
    assert isinstance(found, Reference) and found.own and found.pixels.shape == (6, SIDE, SIDE, 1)
    own = {row.numpy().tobytes() for row in data.holdout.rows["pixels"]}
    assert {image.tobytes() for image in found.pixels} <= own, "an image that it trained on"
    assert data.train.reference is None


def test_files_that_change_between_two_messages_are_read_again(own_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    write_images(folder / "train.npz", 4, 1)
    settings = image_settings("text", dataset=str(folder))
    backbone, shares = open_backbone(settings), (Share(0, 2), Share(folder=str(folder)))
    first = [TASK.load_data(settings, backbone, share) for share in shares]
    again = [TASK.load_data(settings, backbone, share) for share in shares]
    write_images(folder / "train.npz", 6, 3)
    changed = [TASK.load_data(settings, backbone, share) for share in shares]
    for one, same, other in zip(first, again, changed, strict=True):
        assert torch.equal(one.train.rows["pixels"], same.train.rows["pixels"])
        assert len(other.train) + len(other.holdout) > len(one.train) + len(one.holdout)
    assert len(changed[1].train) + len(changed[1].holdout) == 18


def test_a_data_set_of_the_hub_is_decoded_once_per_machine(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(tiny_images() / "train.npz") as arrays:
        images, labels = arrays["images"][:12], arrays["labels"][:12]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    plain, decoded = datasets.load_dataset, _sources.load_images

    def served(name: str, config: str | None = None, revision: str | None = None) -> Any:
        assert (name, config, revision) == ("owner/shapes", None, None)
        return plain("parquet", data_files={"train": str(tmp_path / "train.parquet")}, cache_dir=str(tmp_path / "hub"))

    counted: list[str] = []

    def counting(source: str, *arguments: Any, **options: Any) -> Any:
        counted.append(source)
        return decoded(source, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", served)
    monkeypatch.setattr(_sources, "load_images", counting)
    settings = image_settings("text", dataset="owner/shapes")
    for _ in range(2):
        _sources._on_hub.cache_clear()  # as another process of this machine
        found = _sources.training_pictures(settings, open_backbone(settings), settings.dataset)
        assert np.array_equal(found.pixels[..., 0], images)
        assert found.labels == tuple(CLASSES[label] for label in labels) and found.classes == CLASSES
        assert TASK.load_test(settings, open_backbone(settings)) is None
    assert counted == ["owner/shapes"]
    # Other content of the data set has another fingerprint.
    datasets.Dataset.from_dict({k: v[:6] for k, v in rows.items()}, features).to_parquet(tmp_path / "train.parquet")
    _sources._on_hub.cache_clear()
    assert len(_sources.training_pictures(settings, open_backbone(settings), settings.dataset)) == 6
    assert counted == ["owner/shapes"] * 2


def test_rows_are_copied_once_at_most() -> None:
    pixels = np.arange(6 * 1 * 4 * 4, dtype=np.uint8).reshape(6, 1, 4, 4)
    encoded = Encoded({"pixels": pixels, "caption": np.array([1, 2, 1, 2, 3, 3])}, {"hidden": np.eye(4)})
    some = encoded.take(np.array([1, 3, 4]))
    assert np.array_equal(some.rows["pixels"], pixels[[1, 3, 4]]) and some.rows["pixels"].is_contiguous()
    assert some.shared["hidden"][some.rows["caption"]].tolist() == np.eye(4)[[2, 2, 3]].tolist()
    assert len(some.shared["hidden"]) == 3
    neighbours = encoded.take(np.array([2, 3, 4]))
    assert np.shares_memory(neighbours.rows["pixels"].numpy(), pixels)
    assert np.array_equal(neighbours.rows["pixels"], pixels[2:5])
    assert len(encoded.take(np.array([], np.int64)).rows["pixels"]) == 0


def test_broken_test_images_are_told_of_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = class_folders(tmp_path / "own", 3, broken=2)
    settings = image_settings("text", dataset=str(folder), **ALL)
    found = loaded(settings)
    assert (len(found), found.skipped) == (9, 2)
    assert "own: 2 images cannot be read and are left out" in caplog.text
    assert TASK.load_data(settings, open_backbone(settings), Share()).skipped == 2


def test_prompts_are_those_of_the_settings_or_of_the_data() -> None:
    def asked(kind: str, **changes: Any) -> tuple[str, ...]:
        settings = image_settings(kind, **changes)
        return TASK.prompts(settings, open_backbone(settings))

    assert asked("text", samples__prompts="a disc | a cross ") == ("a disc", "a cross")
    assert set(asked("text")) == {f"a photo of a {name}" for name in CLASSES}
    assert set(asked("dit")) == set(CLASSES) and set(asked("classes")) == {"0", "1", "2"}
    assert set(asked("unconditional")) == {""}
    assert asked("dit", dataset="", partition__by="iid") == ("0", "1", "2")
    assert set(asked("text", dataset="", partition__by="iid")) == {""}


def test_images_of_another_size_are_scaled_for_the_backbone() -> None:
    assert loaded(image_settings("text", resolution=32)).rows["pixels"].shape[1:] == (1, 32, 32)
    assert loaded(image_settings("latent", resolution=32)).rows["moments"].shape[1:] == (8, 16, 16)
