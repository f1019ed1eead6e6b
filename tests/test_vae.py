"""The VAE task: a proper likelihood, the bound by hand and against the likelihood itself, what is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from networks import LATENT, adapted, network_config, network_settings
from pipelines import CLASSES
from torch import Tensor

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning import adapters, training
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.task import Examples
from fedgen_app.settings import check
from fedgen_app.tasks import _small, vae
from fedgen_app.tasks.vae import TASK, bound, draws, log_likelihood, measured_bound

KIND = "vae-classes"
PIXELS = 256


def rows(count: int = 24, kind: str = KIND) -> Examples:
    found = TASK.load_test(network_settings(kind, test_sequences=count, metrics__samples=0), adapted(kind))
    assert found is not None and len(found) == count
    return found


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.9])
@pytest.mark.parametrize("log_scale", [-20.0, -7.0, -3.0, 0.0, 2.0])
def test_the_probabilities_of_all_values_add_up_to_one(mean: float, log_scale: float) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    said = log_likelihood(values, torch.full((256,), mean), torch.full((256,), log_scale))
    assert torch.isfinite(said).all()
    assert float(said.double().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_the_likelihood_is_the_mass_between_the_edges() -> None:
    mean, scale = 0.1, 0.05
    logistic = torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(torch.zeros((), dtype=torch.double), 1.0),
        [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(mean, scale)],
    )
    for value in (100, 140, 180):
        centre = value / 127.5 - 1
        edges = torch.tensor([centre - 1 / 255, centre + 1 / 255], dtype=torch.double)
        mass = logistic.cdf(edges).diff()
        said = log_likelihood(torch.tensor([value], dtype=torch.uint8), torch.tensor(mean), torch.tensor(scale).log())
        assert float(said) == pytest.approx(float(mass.log()), rel=1e-3)


def test_gradients_are_finite_where_the_mean_is_far_off() -> None:
    mean = torch.tensor([1.0, -1.0, 0.3], requires_grad=True)
    log_scale = torch.tensor([-20.0, -7.0, -6.9], requires_grad=True)
    log_likelihood(torch.tensor([0, 255, 10], dtype=torch.uint8), mean, log_scale).sum().backward()
    assert mean.grad is not None and log_scale.grad is not None
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_scale.grad).all() and mean.grad.abs().min() > 0


def test_the_bound_is_that_of_the_paper_and_lies_above_the_likelihood() -> None:
    backbone, batch = adapted(KIND), {name: tensor[:2] for name, tensor in rows().rows.items()}
    model = cast(Any, backbone.model).eval()
    with torch.no_grad():
        missed, divergence = bound(model, batch, torch.Generator().manual_seed(4))
        mean, log_variance = model.encoder(batch["pixels"] / 127.5 - 1, batch["class"])
        posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        plain = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
        torch.testing.assert_close(divergence, plain)
        latent = mean + torch.randn(mean.shape, generator=torch.Generator().manual_seed(4)) * posterior.stddev
        said, scale = model.decoder(latent, batch["class"])
        torch.testing.assert_close(missed, -log_likelihood(batch["pixels"], said, scale).sum((1, 2, 3)))

        # log p(x) by importance sampling from the posterior; the bound's mean over draws cannot lie below it.
        times = 400
        each = {name: tensor.repeat_interleave(times, 0) for name, tensor in batch.items()}
        wide = torch.distributions.Normal(
            mean.repeat_interleave(times, 0), posterior.stddev.repeat_interleave(times, 0)
        )
        latents = wide.sample()
        said, scale = model.decoder(latents, each["class"])
        joint = log_likelihood(each["pixels"], said, scale).sum((1, 2, 3))
        weights = joint + torch.distributions.Normal(0.0, 1.0).log_prob(latents).sum(1) - wide.log_prob(latents).sum(1)
        likelihood = weights.view(2, times).logsumexp(1) - math.log(times)
        negative = torch.stack([sum(bound(model, batch, torch.Generator().manual_seed(n))) for n in range(100)]).mean(0)
    assert (negative > -likelihood).all()


def test_bits_per_dimension_count_every_row_equally_often() -> None:
    backbone, found = adapted(KIND), rows(5)
    seen: list[float] = []
    plain = vae.bound

    def watched(model: Any, batch: Any, noise: Any) -> tuple[Tensor, Tensor]:
        parts = plain(model, batch, noise)
        seen.extend(batch["pixels"].flatten(1).sum(1).tolist())
        totals.append(sum(part.double().sum() for part in parts))
        return parts

    totals: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "bound", watched)
        measured = measured_bound(backbone, found, 5)
    assert len(seen) >= vae.LEAST_DRAWS and {seen.count(row) for row in set(seen)} == {len(seen) // 5}
    assert measured["bits_per_dim"] == pytest.approx(float(sum(totals)) / len(seen) / PIXELS / math.log(2), rel=1e-6)
    assert measured_bound(backbone, found, 5) == measured != measured_bound(backbone, found, 6)
    assert 0 < measured["kl"] < measured["bits_per_dim"] * PIXELS * math.log(2)


def test_training_lowers_the_bound_and_changes_the_adapter_alone() -> None:
    backbone, found = adapted(KIND), rows()
    adapters.write(backbone.model, adapters.fresh(backbone.layout, 0))
    frozen = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".lora_" not in n}
    before = measured_bound(backbone, found, 0)["bits_per_dim"]
    loss = TASK.loss(network_settings(KIND), backbone)
    done = training.train(backbone.model, loss, found, training.Plan(40, 0, 8, 1, 1e-2, 0.0, 1.0, 0))
    assert measured_bound(backbone, found, 0)["bits_per_dim"] < min(before - 0.5, done.loss)
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
    assert all(tensor.abs().max() > 0 for tensor in adapters.read(backbone.model).values())


def test_what_is_drawn_is_the_decoders_mean() -> None:
    backbone = adapted(KIND)
    texts = [*CLASSES, "0"]
    images = _small.generate(backbone, draws, texts, 3)
    latents = torch.randn((4, LATENT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean, _ = cast(Any, backbone.model).decoder(latents, torch.tensor([0, 1, 2, 0]))
    assert images.shape == (4, 16, 16, 1) and len({image.tobytes() for image in images}) == 4
    assert np.abs((images[..., 0] / 127.5 - 1) - mean[:, 0].numpy()).max() <= 1 / 254


def test_an_adapter_goes_to_encoder_and_decoder() -> None:
    assert {key.split(".")[2] for key, _ in adapted("vae").layout} == {"encoder", "decoder"}


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"lora.text-encoder = true"):
        open_backbone(network_settings(KIND, lora__text_encoder=True))
    with pytest.raises(SettingsError, match=r"gradient-checkpointing = true"):
        open_backbone(network_settings(KIND, gradient_checkpointing=True))
    settings = check(network_config(tmp_path, KIND) | {"backbone": "bundled"})
    with pytest.raises(BackboneError, match="backbone = 'bundled': this task has none"):
        open_backbone(settings)
