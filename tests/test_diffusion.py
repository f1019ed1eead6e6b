"""The diffusion task: losses and samplers against plain formulas and diffusers' own, exports in a fresh process."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from pipelines import CLASSES, MAKERS, image_settings, loud, tiny_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgen_app.errors import BackboneError, CheckpointError, SettingsError
from fedgen_app.federation.aggregation import change_norm
from fedgen_app.learning import adapters, training
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.export import card, save_peft
from fedgen_app.learning.task import Examples
from fedgen_app.settings import SampleSettings
from fedgen_app.tasks import _likeness, _measure, _objective
from fedgen_app.tasks._denoiser import predict
from fedgen_app.tasks._objective import denoising_loss
from fedgen_app.tasks._pictures import Reference
from fedgen_app.tasks._pipeline import Pipeline
from fedgen_app.tasks._sampling import _scheduler, generate, pass_seconds
from fedgen_app.tasks.diffusion import TASK

STEPS = 100  # of the tiny pipelines' schedules
SCHEDULES: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "velocity": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "zero terminal": {
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "learned variance": {"prediction_type": "epsilon", "variance_type": "learned_range"},
    "sample": {"prediction_type": "sample"},
}


def told(backbone: Backbone) -> Pipeline:
    return cast(Pipeline, backbone.processor)


def rescheduled(tmp_path: Path, kind: str, schedule: str) -> str:
    """A copy of a pipeline with another schedule."""
    folder = tmp_path / f"{kind}-{schedule.replace(' ', '-')}"
    shutil.copytree(tiny_pipeline(kind), folder)
    DDPMScheduler(STEPS, clip_sample=False, **SCHEDULES[schedule]).save_pretrained(folder / "scheduler")
    return str(folder)


def signal(schedule: DDPMScheduler) -> Tensor:
    """alpha-bar, the share of the image's variance that is left, at every step."""
    return torch.cumprod(1 - schedule.betas.double(), 0)


def batch_of(backbone: Backbone, count: int = 12) -> dict[str, Tensor]:
    found = TASK.load_test(image_settings(backbone.reference, test_sequences=count), backbone)
    assert found is not None
    return {**found.rows, **found.shared}


def loss_of(backbone: Backbone, batch: dict[str, Tensor], seed: int = 3, **changes: Any) -> float:
    settings = image_settings(backbone.reference, diffusion__caption_dropout=0.0, **changes)
    backbone.model.eval()
    with torch.no_grad():
        return float(TASK.loss(settings, backbone)(backbone.model, batch, torch.Generator().manual_seed(seed)))


def plain_loss(backbone: Backbone, batch: dict[str, Tensor], weigh: Callable[[Tensor], Tensor], seed: int = 3) -> float:
    """The formulas of the papers on a text pipeline in pixel space; weigh: a factor from each row's alpha-bar."""
    schedule = DDPMScheduler.from_pretrained(Path(backbone.reference) / "scheduler")
    noise = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(STEPS, (len(batch["pixels"]),), generator=noise)
    clean = (batch["pixels"] / 127.5 - 1).double()
    drawn = torch.randn(clean.shape, generator=noise).double()
    left = signal(schedule)[timesteps]
    share = left.view(-1, 1, 1, 1)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * drawn
    targets = {
        "epsilon": drawn,
        "v_prediction": share.sqrt() * drawn - (1 - share).sqrt() * clean,
        "sample": clean,
    }
    with torch.no_grad():
        said = backbone.model(noisy.float(), timesteps, encoder_hidden_states=batch["hidden"][batch["caption"]]).sample
    errors = ((said.double() - targets[schedule.config.prediction_type]) ** 2).flatten(1).mean(1)
    return float((errors * weigh(left)).mean())


@pytest.mark.parametrize("schedule", ["epsilon", "velocity", "sample"])
def test_the_loss_is_the_papers_formula(schedule: str, tmp_path: Path) -> None:
    backbone = loud(rescheduled(tmp_path, "text", schedule))
    batch = batch_of(backbone)
    assert loss_of(backbone, batch) == pytest.approx(plain_loss(backbone, batch, torch.ones_like), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("schedule", ["epsilon", "velocity", "sample"])
def test_min_snr_weights_are_the_papers(schedule: str, gamma: float, tmp_path: Path) -> None:
    def weigh(left: Tensor) -> Tensor:
        ratio = left / (1 - left)
        least = torch.minimum(ratio, torch.full_like(ratio, gamma))
        return {"epsilon": least / ratio, "velocity": least / (ratio + 1), "sample": least}[schedule]

    backbone = loud(rescheduled(tmp_path, "text", schedule))
    batch = batch_of(backbone)
    weighted = loss_of(backbone, batch, diffusion__min_snr=gamma)
    assert weighted == pytest.approx(plain_loss(backbone, batch, weigh), rel=1e-4)
    assert weighted != pytest.approx(loss_of(backbone, batch), rel=1e-2)


def test_latents_are_drawn_anew_from_the_same_moments() -> None:
    backbone = loud("latent")
    batch = batch_of(backbone)
    moments = batch["moments"]
    noise = torch.Generator().manual_seed(0)
    one, other = (_objective._clean(told(backbone), batch, noise) for _ in range(2))
    assert not torch.equal(one, other)
    many = torch.stack([_objective._clean(told(backbone), batch, noise) for _ in range(400)]) / 0.5  # scaling_factor
    assert torch.allclose(many.mean(0), moments[:, :4], atol=0.4 * float(many.std(0).max()))
    assert float(many.std(0).mean()) == pytest.approx(float((0.5 * moments[:, 4:]).exp().mean()), rel=0.02)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_a_schedule_that_ends_in_pure_noise_gives_no_nan(gamma: float, sampler: str, tmp_path: Path) -> None:
    backbone = loud(rescheduled(tmp_path, "text", "zero terminal"))
    assert float(told(backbone).noise.alphas_cumprod[-1]) == 0
    last = torch.full((1,), STEPS - 1)
    assert torch.isfinite(_objective._weights(told(backbone), last, 5.0)).all()
    batch = batch_of(backbone)
    assert all(math.isfinite(loss_of(backbone, batch, seed, diffusion__min_snr=gamma)) for seed in range(10))
    images = generate(backbone, ["a photo of a disc"] * 3, 0, options(sampler=sampler, steps=5))
    assert len({image.tobytes() for image in images}) == 3, "NaN would be the same black everywhere"


def test_the_measured_loss_counts_every_row_and_every_timestep_equally() -> None:
    backbone = loud("text")
    batch = batch_of(backbone, 6)
    shared, seen = {"hidden": batch["hidden"]}, []
    examples = Examples({k: v for k, v in batch.items() if k not in shared}, {}, shared)
    plain = _objective._errors

    def watched(*arguments: Any) -> Tensor:
        errors = plain(*arguments)
        seen.extend(
            zip(arguments[2]["pixels"].flatten(1).sum(1).tolist(), arguments[3].tolist(), errors.tolist(), strict=True)
        )
        return errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_objective, "_errors", watched)
        measured = denoising_loss(backbone, examples, 5)
    assert measured == pytest.approx(sum(error for _, _, error in seen) / len(seen), rel=1e-6)
    rows = [row for row, _, _ in seen]
    assert len(seen) >= _objective.LEAST_DRAWS and {rows.count(row) for row in set(rows)} == {len(seen) // 6}
    steps = [step for _, step, _ in seen]
    often = [steps.count(step) for step in range(STEPS)]
    assert max(often) - min(often) <= 1
    assert denoising_loss(backbone, examples, 5) == measured != denoising_loss(backbone, examples, 6)


def test_rows_told_another_thing_have_another_loss() -> None:
    for kind, name in (("text", "caption"), ("latent", "caption"), ("dit", "class"), ("classes", "class")):
        backbone = loud(kind)
        batch = batch_of(backbone)
        turned = batch | {name: batch[name].roll(1)}
        assert abs(loss_of(backbone, batch) - loss_of(backbone, turned)) > 1e-6, kind


def test_training_changes_nothing_but_the_adapter() -> None:
    for changes in ({}, {"lora__text_encoder": True}):
        settings = image_settings("text", **changes)
        backbone = open_backbone(settings)
        adapters.write(backbone.model, adapters.fresh(backbone.layout, 0))
        frozen = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".lora_" not in n}
        found = TASK.load_test(settings, backbone)
        assert found is not None
        plan = training.Plan(3, 0, 4, 1, 1e-2, 0.01, 1.0, 0)
        training.train(backbone.model, TASK.loss(settings, backbone), found, plan)
        after = dict(backbone.model.named_parameters())
        assert all(torch.equal(frozen[name], after[name]) for name in frozen)
        learned = adapters.read(backbone.model)
        for part in ("unet.", "text_encoder.") if changes else ("",):
            keys = [key for key in learned if key.startswith(f"base_model.model.{part}") and ".lora_B" in key]
            assert keys and all(learned[key].abs().max() > 0 for key in keys), part


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(**changes: Any) -> dict[str, Tensor]:
        backbone = loud("text", **changes)
        batch = batch_of(backbone)
        backbone.model.train()
        loss = TASK.loss(image_settings("text", **changes), backbone)
        loss(backbone.model, batch, torch.Generator().manual_seed(0)).backward()
        return {key: cast(Tensor, p.grad) for key, p in adapters.parameters(backbone.model).items()}

    plain, saving = gradients(), gradients(gradient_checkpointing=True)
    assert all(torch.allclose(plain[key], saving[key], atol=1e-6) and plain[key].abs().max() > 0 for key in plain)


def options(**changes: Any) -> SampleSettings:
    chosen: dict[str, Any] = {"steps": 4, "guidance": 2.0, "sampler": "ddim", "batch": 64}
    return image_settings("text").samples.model_copy(update=chosen | changes)


PROMPTS = {
    "unconditional": ["", "", ""],
    "classes": ["0", "1", "2"],
    "text": ["a photo of a disc", "the captain", ""],
    "latent": ["a photo of a disc", "the captain", ""],
    "dit": ["disc", "1", "cross"],
}


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_seed_draws_the_same_images_whatever_the_batch(kind: str, sampler: str) -> None:
    backbone = loud(kind)
    texts = PROMPTS[kind]
    first = generate(backbone, texts, 3, options(sampler=sampler))
    assert first.dtype == np.uint8 and first.shape == (3, 16, 16, told(backbone).image_channels)
    assert np.array_equal(generate(backbone, texts, 3, options(sampler=sampler)), first)
    one_by_one = generate(backbone, texts, 3, options(sampler=sampler, batch=1)).astype(int)
    assert abs(one_by_one - first).max() <= 1  # a matrix product may round differently for another batch
    assert abs(generate(backbone, texts, 4, options(sampler=sampler)).astype(int) - first).max() > 5
    assert len({image.tobytes() for image in first}) == 3


@pytest.mark.parametrize("schedule", ["learned variance", "zero terminal", "velocity", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_both_samplers_take_every_schedule(schedule: str, sampler: str, tmp_path: Path) -> None:
    backbone = loud(rescheduled(tmp_path, "latent", schedule))
    images = generate(backbone, ["disc", "cross"], 3, options(sampler=sampler))
    assert images.shape == (2, 16, 16, 3) and not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("solver", ["dpmsolver", "sde-dpmsolver++"])
def test_dpm_solver_is_the_one_that_draws_no_noise_whatever_the_folder_names(solver: str, tmp_path: Path) -> None:
    folder = Path(rescheduled(tmp_path, "text", "epsilon"))
    usual = generate(loud(str(folder)), ["disc"], 3, options(sampler="dpm-solver"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"algorithm_type": solver, "final_sigmas_type": "sigma_min"})
    )
    assert np.array_equal(generate(loud(str(folder)), ["disc"], 3, options(sampler="dpm-solver")), usual)


@pytest.mark.parametrize("kind", ["text", "latent", "dit"])
def test_guidance_one_is_unguided_and_zero_is_told_nothing(kind: str) -> None:
    backbone = loud(kind)
    pipeline = told(backbone)
    text = PROMPTS[kind][0]
    start = torch.randn(
        (1, pipeline.channels, pipeline.side, pipeline.side), generator=torch.Generator().manual_seed(3)
    )
    schedule = DDIMScheduler.from_config(
        pipeline.schedule, clip_sample=not pipeline.has_vae, timestep_spacing="trailing"
    )
    schedule.set_timesteps(4)
    if kind == "dit":
        tells = {"class": torch.tensor([0]), "none": torch.tensor([len(CLASSES)])}
    else:
        tells = {"class": pipeline.embed([text]), "none": pipeline.embed([""])}

    @torch.no_grad()
    def unguided(what: str) -> np.ndarray:
        current = start
        for step in schedule.timesteps:
            said = predict(pipeline, backbone.model, current, step.expand(1), tells[what])
            current = schedule.step(said, step, current).prev_sample
        if pipeline.has_vae:
            current = pipeline.vae.decode(current / pipeline.vae.config.scaling_factor).sample
        return ((current.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).numpy()

    def off(guidance: float, what: str) -> float:
        return float(abs(generate(backbone, [text], 3, options(guidance=guidance)) - unguided(what)).max())

    assert off(1.0, "class") <= 0.51 and off(1.000001, "class") <= 0.6
    assert off(0.0, "none") <= 0.51
    assert off(4.0, "class") > 2, "guidance changes nothing"


def test_ddim_is_diffusers_own_pipeline() -> None:
    backbone = loud("unconditional")
    network = backbone.model.get_base_model()
    schedule = DDIMScheduler.from_config(told(backbone).schedule, clip_sample=True, timestep_spacing="trailing")
    theirs = DDIMPipeline(network, schedule)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    expected = theirs(batch_size=3, generator=noise, num_inference_steps=7, eta=0.0, output_type="np").images * 255
    assert abs(generate(backbone, [""] * 3, 3, options(steps=7)) - expected).max() <= 0.51


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_stable_diffusion_draws_as_diffusers_own_pipeline(sampler: str) -> None:
    backbone = loud("latent")
    kind = {"ddim": DDIMScheduler, "dpm-solver": DPMSolverMultistepScheduler}[sampler]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline("latent"))
    pipeline.unet = backbone.model.get_base_model()
    pipeline.scheduler = kind.from_config(told(backbone).schedule, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    texts = ["a photo of a disc", "the captain and the crew"]
    expected = pipeline(
        texts, num_inference_steps=4, guidance_scale=3.0, latents=start, height=16, width=16, output_type="np"
    ).images
    assert abs(generate(backbone, texts, 3, options(guidance=3.0, sampler=sampler)) - expected * 255).max() <= 0.6


@pytest.mark.parametrize("length", [200, 1000])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_every_count_of_steps_is_that_many_timesteps_down_from_the_last(sampler: Any, length: int) -> None:
    schedule = {"num_train_timesteps": length}
    pipeline: Any = SimpleNamespace(schedule=schedule, has_vae=False, noise=range(length), device="cpu")
    for count in range(1, 101):
        scheduler = _scheduler(pipeline, options(steps=count, sampler=sampler))
        even = length - np.arange(count) * length / count - 1
        assert scheduler.timesteps.shape == (count,) and np.abs(scheduler.timesteps.numpy() - even).max() <= 0.51
        assert scheduler.num_inference_steps == count
        if sampler == "dpm-solver":
            assert len(scheduler.sigmas) == count + 1 and scheduler.sigmas[-1] == 0 < scheduler.sigmas[-2]
            current = torch.ones(1, 1, 2, 2)
            for timestep in scheduler.timesteps:  # in the order in which the solver itself counts its steps
                current = scheduler.step(torch.zeros_like(current), timestep, current).prev_sample
            assert current.isfinite().all()


def test_more_steps_than_the_schedule_has_are_all_of_them() -> None:
    backbone = loud("unconditional")
    drawn = [generate(backbone, [""], 3, options(steps=n)) for n in (STEPS, 1000)]
    assert np.array_equal(*drawn)


def test_an_unknown_class_is_named() -> None:
    backbone = loud("dit")
    for wrong in ("triangle", "3"):
        with pytest.raises(SettingsError, match=f"label '{wrong}' is no class of this backbone; it knows disc"):
            TASK.sample(image_settings("dit"), backbone, [wrong], 0)


def test_samples_have_the_resolution_of_the_run() -> None:
    for kind, side in (("text", 16), ("latent", 32)):
        drawn = TASK.sample(image_settings(kind, resolution=side), loud(kind), PROMPTS[kind][:1], 0)
        assert drawn[0].content.shape[:2] == (side, side)


def test_the_adapter_changes_what_is_drawn() -> None:
    for kind in MAKERS:
        backbone = loud(kind)
        drawn = TASK.sample(image_settings(kind), backbone, PROMPTS[kind], 0)
        with backbone.model.disable_adapter():
            plain = TASK.sample(image_settings(kind), backbone, PROMPTS[kind], 0)
        assert [s.prompt for s in drawn] == PROMPTS[kind]
        assert any(not np.array_equal(a.content, b.content) for a, b in zip(drawn, plain, strict=True)), kind


def test_lora_targets_are_attention_and_as_settings_say_convolutions_and_text() -> None:
    def ends(kind: str, **changes: Any) -> set[str]:
        layout = open_backbone(image_settings(kind, **changes)).layout
        return {key.removeprefix("base_model.model.").split(".lora_")[0].split(".")[-1] for key, _ in layout}

    assert ends("latent") == {"to_q", "to_k", "to_v", "0"}
    assert ends("latent", lora__convolutions=True) == {"to_q", "to_k", "to_v", "0", "conv1", "conv2"}
    assert ends("latent", lora__text_encoder=True) >= {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert ends("latent", lora__targets="to_q") == {"to_q"}
    with pytest.raises(BackboneError, match="no attention projection in Sequential: set lora.convolutions = true"):
        TASK.lora_targets(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3)), image_settings("text").lora)


def test_an_adapter_of_convolutions_is_measured_by_the_change_of_the_weights() -> None:
    backbone = loud("unconditional", lora__convolutions=True)
    new = adapters.read(backbone.model)
    assert {len(shape) for _, shape in backbone.layout} == {2, 4}
    old = adapters.fresh(backbone.layout, 0)
    whole = 0.0
    for name, layer in backbone.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            assert old[f"{name}.lora_B.weight"].abs().max() == 0
            whole += float((layer.get_delta_weight("default").detach().double() ** 2).sum())
    assert change_norm(new, old, image_settings("text").lora.scaling) == pytest.approx(math.sqrt(whole), rel=1e-5)


def test_a_client_without_images_enough_is_measured_by_its_loss_alone(caplog: pytest.LogCaptureFixture) -> None:
    settings = image_settings("text")
    backbone = loud("text")
    found = TASK.load_test(settings, backbone)
    assert found is not None and isinstance(found.reference, Reference)
    real = found.reference
    two = Reference(real.pixels[:2], real.prompts[:2], real.labels[:2], real.others[:0], own=True)
    measured = TASK.evaluate(settings, backbone, Examples(found.rows, {}, found.shared, two), 0)
    assert set(measured) == {"denoising_loss"}
    assert "need four images" in caplog.text


def out_of_reach(*_: object, **__: object) -> None:
    raise OSError("no net")


def test_clients_without_the_servers_extractor_do_not_take_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", out_of_reach)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    backbone = loud("text")
    found = TASK.load_test(image_settings("text"), backbone)
    assert found is not None and isinstance(found.reference, Reference)
    own = Examples(found.rows, {}, found.shared, dataclasses.replace(found.reference, own=True))
    for features in ("auto", str(tmp_path / "only-on-the-server.pth")):
        settings = image_settings("text", metrics__features=features)
        assert set(TASK.evaluate(settings, backbone, own, 0)) == {"denoising_loss"}


def test_extractors_that_vanished_are_noticed_before_a_client_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", out_of_reach)
    _likeness._inception_or_bundled.cache_clear()
    settings, backbone = image_settings("text", metrics__features="auto"), loud("text")
    test = TASK.load_test(settings, backbone)
    TASK.check(settings, backbone, test, None)
    TASK.check(settings, backbone, test, {"features": "fedgen-small-32", "fid": 1.0})
    with pytest.raises(CheckpointError, match="measured with inception-v3-2015-12-05, .* gives fedgen-small-32"):
        TASK.check(settings, backbone, test, {"features": "inception-v3-2015-12-05", "fid": 1.0})


def test_measuring_that_takes_long_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    settings, backbone = image_settings("text", num_server_rounds=5, evaluate_every=2), loud("text")
    test = TASK.load_test(settings, backbone)
    TASK.check(settings, backbone, test, None)
    assert "measuring takes" not in caplog.text, "a second or two is not worth a line"
    one = pass_seconds(backbone, "a photo of a disc", settings.samples, 16)
    assert 0 < one < 5
    monkeypatch.setattr(_measure, "pass_seconds", lambda *_: 60.0)
    TASK.check(settings, backbone, test, None)
    # 12 images of 3 steps, a minute each; the frozen backbone and rounds 2, 4 and 5.
    assert "up to 36 min each time and 2.4 h in the whole run: 12 images of 3 steps, 4 times" in caplog.text
    monkeypatch.setattr(_measure, "pass_seconds", None)  # where nothing is drawn, nothing is timed
    TASK.check(settings, backbone, None, None)
    TASK.check(settings, backbone, TASK.load_test(image_settings("text", metrics__samples=0), backbone), None)


def test_a_card_asks_for_one_of_the_runs_own_prompts() -> None:
    def lines(**changes: Any) -> str:
        settings = image_settings("text", **changes)
        return "\n".join(TASK.usage(settings, open_backbone(settings)))

    assert any(f"pipeline('a photo of a {name}', height=128" in lines() for name in CLASSES)
    assert "pipeline('a big disc', height=128" in lines(samples__prompts="a big disc|a cross")
    assert "sneaker" not in lines()


@pytest.mark.parametrize("kind", ["text", "dit", "unconditional"])
def test_a_card_loads_the_revision_that_was_trained_on(kind: str) -> None:
    settings = image_settings(kind)
    opened = dataclasses.replace(open_backbone(settings), reference="owner/model", revision="v1.2")
    lines = [line for line in TASK.usage(settings, opened) if "from_pretrained('owner/model'" in line]
    assert lines and all("revision='v1.2'" in line for line in lines)
    assert "revision" not in "".join(TASK.usage(settings, open_backbone(settings)))


# What a card's code is followed by in the fresh process: the same input through what it loaded.
OPEN = """
import json, sys, torch
from safetensors.torch import load_file, save_file

for job in json.loads(sys.stdin.read()):
    names = {"FOLDER": job["folder"]}
    exec(job["code"], names)
    pipeline, given, said = names["pipeline"], load_file(job["given"]), {}
    part = getattr(pipeline, job["part"]).eval()
    with torch.no_grad():
        if "tokens" in given:
            given["encoder_hidden_states"] = pipeline.text_encoder.eval()(given.pop("tokens")).last_hidden_state
            said["hidden"] = given["encoder_hidden_states"].contiguous()
        said["sample"] = part(given.pop("sample"), **given).sample.contiguous()
    if "pixels" in names:
        said["pixels"] = names["pixels"]
    save_file(said, job["said"])
"""
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unconditional": ("unconditional", {}),
    "classes": ("classes", {"lora__rslora": True}),
    "text": ("text", {}),
    "text, rank-stabilised": ("text", {"lora__rslora": True}),
    "latent": ("latent", {}),
    "latent, convolutions": ("latent", {"lora__convolutions": True}),
    "latent, both encoders": ("latent", {"lora__text_encoder": True}),
    "latent, all": ("latent", {"lora__text_encoder": True, "lora__convolutions": True, "lora__rslora": True}),
    "dit": ("dit", {}),
}


def prepared(folder: Path, kind: str, changes: dict[str, Any]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """An exported adapter, an input for it, and what the model here says of it."""
    folder.mkdir()
    settings = image_settings(kind, **{"lora__rank": 4, "lora__alpha": 6.0, **changes})
    backbone = loud(kind, **{"lora__rank": 4, "lora__alpha": 6.0, **changes})
    pipeline, adapter = told(backbone), adapters.read(backbone.model)
    text = card(backbone, settings, "global adapter", "", {}, {}, TASK.usage(settings, backbone))
    save_peft(folder, backbone, adapter, text)
    TASK.export(folder, backbone, adapter)
    noise = torch.Generator().manual_seed(1)
    given = {
        "sample": torch.randn((3, pipeline.channels, pipeline.side, pipeline.side), generator=noise),
        "timestep": torch.tensor([3, 40, 99]),
    }
    said: dict[str, Tensor] = {}
    numbers = None
    with torch.no_grad():
        if pipeline.condition == "text":
            given["tokens"] = pipeline.tokens(["a photo of a disc", "the captain", ""])
            encoder = cast(Any, backbone.model).text_encoder if pipeline.learns_text else pipeline.text_encoder
            numbers = said["hidden"] = encoder.eval()(given["tokens"]).last_hidden_state
        elif pipeline.condition == "class":
            numbers = given["class_labels"] = torch.tensor([0, 1, 2])
        backbone.model.eval()
        said["sample"] = predict(pipeline, backbone.model, given["sample"], given["timestep"], numbers)
        with backbone.model.disable_adapter():
            bare = predict(pipeline, backbone.model, given["sample"], given["timestep"], numbers)
    assert (said["sample"] - bare).abs().max() > 1e-2, "the adapter does nothing"
    save_file(given, folder / "given.safetensors")
    code = text.split("```python\n")[1].split("```")[0]
    files = {name: str(folder / f"{name}.safetensors") for name in ("given", "said")}
    return {"folder": str(folder), "code": code, "part": pipeline.part, **files}, said


@pytest.mark.slow
def test_exports_open_in_a_fresh_process_by_the_cards_own_code(tmp_path: Path) -> None:
    made = {name: prepared(tmp_path / str(n), *what) for n, (name, what) in enumerate(EXPORTS.items())}
    jobs = json.dumps([job for job, _ in made.values()])
    done = subprocess.run([sys.executable, "-c", OPEN], input=jobs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (job, expected) in made.items():
        said = load_file(job["said"])
        channels = expected["sample"].shape[1]
        for what, value in expected.items():
            found = said[what][:, :channels] if what == "sample" else said[what]
            assert torch.allclose(found, value, atol=1e-5), (name, what, float((found - value).abs().max()))
        assert not name.startswith("text") or said["pixels"].shape == (1, 1, 16, 16)


def test_a_dit_is_told_apart_from_its_learned_variance() -> None:
    backbone = loud("dit")
    network = cast(DiTTransformer2DModel, backbone.model.get_base_model())
    assert (network.config.in_channels, network.config.out_channels) == (4, 8)
    given = torch.randn(2, 4, 8, 8)
    said = predict(told(backbone), backbone.model, given, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert said.shape == given.shape
