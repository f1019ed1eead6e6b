"""The GAN task: its losses by hand, the loop that trains two halves, what is drawn and exported."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from networks import LATENT, adapted, network_settings, tiny_networks
from pipelines import CLASSES, tiny_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgen_app.errors import AdapterError, BackboneError, DataError, SettingsError
from fedgen_app.federation.compatibility import check_method
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.export import card, save_peft
from fedgen_app.learning.task import Examples
from fedgen_app.learning.training import Plan, planned_steps
from fedgen_app.tasks import _small, gan
from fedgen_app.tasks._adversarial import Adversarial, train
from fedgen_app.tasks.gan import TASK, draws, sliced_wasserstein

KIND = "gan-classes"
PLAN = Plan(2, 0, 8, 1, 1e-2, 0.0, 1.0, seed=7)


def rows(count: int = 24, kind: str = KIND) -> Examples:
    backbone = adapted(kind)
    found = TASK.load_test(network_settings(kind, test_sequences=count, metrics__samples=0), backbone)
    assert found is not None and len(found) == count
    return found


def trained(plan: Plan = PLAN, r1: float = 1.0, kind: str = KIND, **arguments: Any) -> dict[str, Tensor]:
    backbone = adapted(kind)
    train(backbone.model, Adversarial(LATENT, r1), rows(kind=kind), plan, **arguments)
    return adapters.read(backbone.model)


def start(kind: str = KIND) -> dict[str, Tensor]:
    return adapters.read(adapted(kind).model)


def half_of(key: str) -> str:
    return key.split(".")[2]


def test_the_losses_are_the_papers_formulas() -> None:
    backbone, batch = adapted(KIND), dict(rows().rows)
    model, noise = cast(Any, backbone.model).eval(), torch.Generator().manual_seed(3)
    value = Adversarial(LATENT, 0.7).discriminator(model, batch, noise)
    fakes = model.generator(torch.randn((24, LATENT), generator=torch.Generator().manual_seed(3)), batch["class"])
    real = batch["pixels"].float() / 127.5 - 1
    probability = torch.sigmoid(model.discriminator(real, batch["class"])).double()
    mistaken = torch.sigmoid(model.discriminator(fakes, batch["class"])).double()
    slopes = []
    for image, number in zip(real, batch["class"], strict=True):  # one by one, so that no image sees another
        given = image[None].clone().requires_grad_(True)
        model.discriminator(given, number[None]).sum().backward(inputs=[given])
        slopes.append(float((given.grad**2).sum()))
    plain: Tensor = -(probability.log() + (1 - mistaken).log()).mean() + 0.35 * sum(slopes) / len(slopes)
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    without = Adversarial(LATENT, 0.0).discriminator(model, batch, torch.Generator().manual_seed(3))
    assert float((value - without).detach()) == pytest.approx(0.35 * sum(slopes) / 24, rel=1e-2) and slopes[0] > 0
    fooled = Adversarial(LATENT, 0.7).generator(model, batch, torch.Generator().manual_seed(3))
    assert float(fooled.detach()) == pytest.approx(float(-mistaken.log().mean().detach()), rel=1e-4)


def test_both_halves_learn_against_each_other() -> None:
    before, after = start(), trained()
    for half in ("generator", "discriminator"):
        keys = [key for key in after if half_of(key) == half]
        assert keys and all(not torch.equal(after[key], before[key]) for key in keys), half
    backbone, batch = adapted(KIND), dict(rows(48).rows)
    objective, model = Adversarial(LATENT, 0.0), backbone.model

    def losses(adapter: dict[str, Tensor]) -> tuple[float, float]:
        adapters.write(model, adapter)
        noises = (torch.Generator().manual_seed(1) for _ in range(2))
        with torch.no_grad():
            return tuple(  # type: ignore[return-value]
                float(part(model, batch, noise))
                for part, noise in zip((objective.discriminator, objective.generator), noises, strict=True)
            )

    alone = {
        half: trained(replace(PLAN, epochs=6), trains=lambda key, half=half: half_of(key) == half)
        for half in ("discriminator", "generator")
    }
    judged, fooled = losses(start())
    assert losses(alone["discriminator"])[0] < judged - 0.05, "the discriminator does not tell better"
    assert losses(alone["generator"])[1] < fooled - 0.05, "the generator does not fool better"


def test_only_the_keys_that_train_change_and_each_half_has_its_own_optimiser() -> None:
    before = start()
    for half in ("generator", "discriminator"):
        after = trained(trains=lambda key, half=half: half_of(key) == half)
        assert all(torch.equal(after[key], before[key]) == (half_of(key) != half) for key in after)
    only = trained(trains=lambda key: ".lora_B." in key)
    assert all(torch.equal(only[key], before[key]) == (".lora_A." in key) for key in only)
    with pytest.raises(AdapterError, match="no tensor"):
        trained(trains=lambda key: False)


def test_nothing_but_the_adapter_changes() -> None:
    backbone = adapted(KIND)
    frozen = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".lora_" not in n}
    buffers = {n: b.clone() for n, b in backbone.model.named_buffers()}
    train(backbone.model, Adversarial(LATENT, 1.0), rows(), PLAN)
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
    assert {n: b.tolist() for n, b in backbone.model.named_buffers()} == {n: b.tolist() for n, b in buffers.items()}


def test_the_proximal_term_pulls_both_halves_towards_the_anchor() -> None:
    anchor = {key: torch.full_like(tensor, 0.1) for key, tensor in start().items()}

    def distances(mu: float) -> dict[str, float]:
        after = trained(replace(PLAN, epochs=8, clip_norm=0.0, proximal=mu), anchor=anchor)
        return {
            half: sum(float(((after[k] - anchor[k]) ** 2).sum()) for k in after if half_of(k) == half)
            for half in ("generator", "discriminator")
        }

    free, near = distances(0.0), distances(100.0)
    assert all(near[half] < 0.5 * free[half] for half in free)


def test_the_gradients_are_those_of_the_loss_the_proximal_term_and_the_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, Tensor] = {}
    original = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        seen.update({id(p): p.grad.clone() for p in self.param_groups[0]["params"]})
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)

    def gradients(mu: float, **arguments: Any) -> dict[str, Tensor]:
        backbone, plan = adapted(KIND), replace(PLAN, max_steps=1, clip_norm=0.0, learning_rate=0.0, proximal=mu)
        train(backbone.model, Adversarial(LATENT, 1.0), rows(), plan, **arguments)
        return {key: seen[id(p)] for key, p in adapters.parameters(backbone.model).items()}

    plain, zeros = gradients(0.0), {key: torch.zeros_like(tensor) for key, tensor in start().items()}
    drift = {key: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for key, t in start().items()}
    moved, pulled = gradients(0.0, drift=drift), gradients(3.0, anchor=zeros)
    for key, tensor in start().items():
        torch.testing.assert_close(moved[key], plain[key] + drift[key], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pulled[key], plain[key] + 3 * tensor, atol=1e-5, rtol=1e-4)


def test_accumulated_batches_are_one_larger_batch() -> None:
    # 24 rows: 16 + 8 accumulated against 24 at once. With the generator still and no noise in it, nothing else differs.
    parts, whole = ({"batch_size": 16, "accumulate": 2}, {"batch_size": 24, "accumulate": 1})

    class Silent(Adversarial):
        def _drawn(self, model: Any, batch: Any, noise: Any) -> Tensor:
            count = len(batch["pixels"])
            drawn: Tensor = model.generator(torch.ones(count, LATENT), batch["class"])
            return drawn

    found = []
    for changes in (parts, whole):
        backbone = adapted(KIND)
        train(backbone.model, Silent(LATENT, 1.0), rows(), replace(PLAN, clip_norm=0.0, **changes))
        found.append(adapters.read(backbone.model))
    before = start()
    moved = math.sqrt(sum(float(((found[1][k] - before[k]) ** 2).sum()) for k in before))
    apart = math.sqrt(sum(float(((found[0][k] - found[1][k]) ** 2).sum()) for k in before))
    assert moved > 0.05 and apart < 0.02 * moved


def test_steps_are_those_planned_and_decay_ends_at_zero() -> None:
    seen: list[tuple[int, int]] = []
    backbone = adapted(KIND)
    plan = replace(PLAN, batch_size=10)
    done = train(
        backbone.model, Adversarial(LATENT, 1.0), rows(), plan, on_step=lambda step, of: seen.append((step, of))
    )
    assert done.steps == planned_steps(24, plan) == 6 and seen == [(n + 1, 6) for n in range(6)]
    assert done.examples == 48 and 1 < done.loss < 10
    constant, falling = trained(), trained(replace(PLAN, decay=True))
    before = start()
    lengths = [sum(float((after[k] - before[k]).abs().sum()) for k in before) for after in (falling, constant)]
    assert 0 < lengths[0] < lengths[1]


def test_one_seed_gives_one_adapter_bit_for_bit() -> None:
    first = adapters.digest(trained())
    torch.rand(3)  # somebody else draws from the global generator
    assert adapters.digest(trained()) == first != adapters.digest(trained(replace(PLAN, seed=8)))


def test_the_loop_refuses_what_it_cannot_train() -> None:
    backbone = adapted(KIND)
    with pytest.raises(DataError, match="no example"):
        train(backbone.model, Adversarial(LATENT, 1.0), Examples({"pixels": torch.zeros(0, 1, 16, 16)}), PLAN)
    with pytest.raises(TypeError, match="both halves"):
        train(backbone.model, lambda model, batch, noise: torch.zeros(()), rows(), PLAN)


def test_r1_is_the_settings_own() -> None:
    loss = TASK.loss(network_settings(KIND, gan__r1=0.25), adapted(KIND))
    assert loss == Adversarial(LATENT, 0.25)


def images_of(backbone: Backbone, texts: list[str], seed: int) -> np.ndarray:
    return _small.generate(backbone, draws, texts, seed)


@pytest.mark.parametrize("kind", ["gan", KIND])
def test_the_same_seed_draws_the_same_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = adapted(kind)
    texts = list(CLASSES) * 2 if kind == KIND else [""] * 6
    first = images_of(backbone, texts, 3)
    assert first.dtype == np.uint8 and first.shape == (6, 16, 16, 1)
    assert len({image.tobytes() for image in first}) == 6
    monkeypatch.setattr(_small, "AT_ONCE", 2)
    assert abs(images_of(backbone, texts, 3).astype(int) - first).max() <= 1
    assert abs(images_of(backbone, texts, 4).astype(int) - first).max() > 5
    with backbone.model.disable_adapter():
        assert abs(images_of(backbone, texts, 3).astype(int) - first).max() > 5


def test_a_class_changes_what_is_drawn_and_has_a_name_or_a_number() -> None:
    backbone = adapted(KIND)
    disc, square, number = (images_of(backbone, [text], 0).astype(int) for text in ("disc", "square", "1"))
    assert abs(disc - square).max() > 5 and np.array_equal(square, number)
    with pytest.raises(SettingsError, match="'3' is no class"):
        images_of(backbone, ["3"], 0)
    with pytest.raises(SettingsError, match="'sandal' is no class"):
        TASK.sample(network_settings(KIND), backbone, ["sandal"], 0)


def test_the_sliced_wasserstein_distance_is_that_of_the_projections() -> None:
    noise = torch.Generator().manual_seed(0)
    one, other = torch.rand((5, 7), generator=noise), torch.rand((15, 7), generator=noise)
    directions = torch.randn((7, gan.DIRECTIONS), generator=torch.Generator().manual_seed(9)).double()
    squares = []
    for direction in directions.T:
        direction = direction / direction.norm()
        near = sorted([float(x @ direction) for x in one.double()] * 3)
        far = sorted(float(x @ direction) for x in other.double())
        squares.append(sum((a - b) ** 2 for a, b in zip(near, far, strict=True)) / 15)
    assert sliced_wasserstein(one, other, 9) == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-5)
    assert sliced_wasserstein(one, one.flip(0), 9) == pytest.approx(0, abs=1e-12)


def test_a_shift_of_all_pixels_is_its_own_distance() -> None:
    # Along a direction u a shift by c moves everything by c times the sum of u, whose mean square is one.
    one = torch.rand((8, 256), generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(one, one + 0.5, 1) == pytest.approx(0.5, rel=0.15)


def test_the_distance_falls_where_the_images_come_closer() -> None:
    backbone, found = adapted(KIND, scale=0.0), rows()
    far = gan.distance(backbone, found, 0)["sliced_wasserstein"]
    plan = replace(PLAN, epochs=40)
    adapters.write(backbone.model, adapters.fresh(backbone.layout, 0))
    train(backbone.model, Adversarial(LATENT, 1.0), found, plan)
    assert gan.distance(backbone, found, 0)["sliced_wasserstein"] < 0.8 * far


def test_without_classes_no_class_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgen_app.tasks._quality.MIN_PER_CLASS", 4)
    found = {}
    for kind in ("gan", KIND):
        settings, backbone = network_settings(kind, metrics__samples=24), adapted(kind)
        examples = TASK.load_test(settings, backbone)
        assert examples is not None
        found[kind] = TASK.evaluate(settings, backbone, examples, 0)
    assert set(found[KIND]) - set(found["gan"]) == {"kid_by_class"}
    assert set(found[KIND]["kid_by_class"]) == set(CLASSES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora__text_encoder": True}, "lora.text-encoder = true"),
        ({"gradient_checkpointing": True}, "gradient-checkpointing = true"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        open_backbone(network_settings(KIND, **changes))


def test_another_resolution_is_refused() -> None:
    with pytest.raises(SettingsError, match="resolution = 32: this backbone takes 16 only"):
        TASK.load_test(network_settings(KIND, resolution=32), adapted(KIND))


def test_a_folder_that_holds_something_else_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((tiny_networks(KIND) / "model.safetensors").read_bytes()[:-50])
    (broken / "config.json").write_bytes((tiny_networks(KIND) / "config.json").read_bytes())
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    (uneven / "model.safetensors").write_bytes((tiny_networks(KIND) / "model.safetensors").read_bytes())
    facts = json.loads((tiny_networks(KIND) / "config.json").read_text())
    (uneven / "config.json").write_text(json.dumps(facts | {"generator": [12, 8]}))
    for folder in (tiny_networks("vae"), tiny_pipeline("text"), broken, uneven):
        with pytest.raises(BackboneError, match=str(folder)):
            open_backbone(network_settings(KIND, backbone=str(folder)))


def test_every_layer_of_both_halves_carries_an_adapter() -> None:
    backbone = adapted(KIND)
    layers = {
        name
        for name, module in cast(Any, backbone.model).get_base_model().named_modules()
        if type(module).__module__.startswith("peft") and hasattr(module, "lora_A")
    }
    assert len(layers) * 2 == len(backbone.layout)
    assert {half_of(key) for key, _ in backbone.layout} == {"generator", "discriminator"}
    assert {len(shape) for _, shape in backbone.layout} == {2, 4}


OPEN = """
import json, sys, torch
from safetensors.torch import load_file, save_file

for job in json.loads(sys.stdin.read()):
    names = {"FOLDER": job["folder"]}
    exec(job["code"], names)
    with torch.no_grad():
        part, given = getattr(names["model"].eval(), job["part"]), load_file(job["given"])
        said = part(given["latents"], given.get("numbers"))
    assert names["images"].shape == (4, 1, 16, 16) and names["images"].abs().max() <= 1
    save_file({"said": said if isinstance(said, torch.Tensor) else said[0]}, job["said"])
assert "diffusers" not in sys.modules
"""


def exported(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, str], Tensor]:
    """A job for the fresh process, and what it should say."""
    from fedgen_app.learning.backbone import load_task

    settings, backbone = network_settings(kind, **changes), adapted(kind, **changes)
    usage = load_task(settings.task).usage(settings, backbone)
    save_peft(folder, backbone, adapters.read(backbone.model), card(backbone, settings, "t", "n", {}, {}, usage))
    given = {"latents": torch.randn(5, LATENT, generator=torch.Generator().manual_seed(2))}
    if kind.endswith("classes"):
        given["numbers"] = torch.tensor([0, 1, 2, 1, 0])
    save_file(given, folder / "given")
    part = "generator" if settings.task == "gan" else "decoder"
    with torch.no_grad():
        said = getattr(cast(Any, backbone.model).eval(), part)(given["latents"], given.get("numbers"))
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    job = {"folder": str(folder), "code": code, "part": part, "given": str(folder / "given"), "said": f"{folder}/said"}
    return job, said if isinstance(said, Tensor) else said[0]


@pytest.mark.slow
def test_exports_open_in_a_fresh_process_by_the_cards_own_code(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"gan": {}, KIND: {"lora__rslora": True}, "vae": {}, "vae-classes": {}}
    made = [exported(tmp_path / kind, kind, **changes) for kind, changes in kinds.items()]
    jobs = json.dumps([job for job, _ in made])
    done = subprocess.run([sys.executable, "-c", OPEN], input=jobs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for job, expected in made:
        assert torch.allclose(load_file(job["said"])["said"], expected, atol=1e-5), job["folder"]


def test_neither_task_imports_diffusers() -> None:
    code = "import sys, fedgen_app.tasks.gan, fedgen_app.tasks.vae; assert 'diffusers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_sum_of_the_losses_gives_each_half_the_gradient_of_its_own() -> None:
    """SCAFFOLD measures a client's gradient through it."""
    backbone, batch = adapted(KIND), dict(rows().rows)
    objective, model = Adversarial(LATENT, 1.0), backbone.model.eval()
    own = adapters.parameters(model)

    def gradients(loss: Any, noise: torch.Generator) -> dict[str, Tensor]:
        for parameter in own.values():
            parameter.requires_grad_(True)
        slopes = torch.autograd.grad(loss(model, batch, noise), list(own.values()), allow_unused=True)
        return {key: slope for key, slope in zip(own, slopes, strict=True) if slope is not None}

    noise = torch.Generator().manual_seed(1)
    halves = {half: gradients(getattr(objective, half), noise) for half in ("discriminator", "generator")}
    got = gradients(objective, torch.Generator().manual_seed(1))
    for key, slope in got.items():
        torch.testing.assert_close(slope, halves[half_of(key)][key])
    assert set(got) == set(own) and all(p.requires_grad for p in own.values())


@pytest.mark.parametrize(("method", "changes"), [("apfl", {}), ("hetlora", {"hetlora__penalty": 0.1})])
def test_methods_that_act_through_one_loss_are_refused(method: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="loop of its own"):
        check_method(network_settings(KIND, method=method, **changes))
