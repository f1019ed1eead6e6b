"""What image generators cost here: training and sampling beside the loops that a person would write with diffusers.

    python benchmarks/diffusion.py [--backbone FOLDER] [--parts latent] [--turns 7] [--batches 6] [--markdown FILE]

The two sides take turns in one process and only ratios are printed. Both train the same LoRA layers of the same
weights, held in the same type, on the same images in batches of the same size, with AdamW and a clipped gradient.

- Training in pixel space: ``learning.training.train`` beside a bare loop with DDPMScheduler, on a text-conditional
  backbone (the bundled one, or ``--backbone``; the bare loop gets its prompts embedded beforehand, as ours does) and on
  an unconditional one that is built here.
- Training in latent space, on a small Stable Diffusion that is built here: beside the loop of diffusers' LoRA example,
  which encodes images and prompts in every step. Ours reads the caches; what it costs to fill them is printed apart.
- Sampling: ``tasks.diffusion.generate`` beside the pipelines' own call, with DDIM and the adapter in place.

How many operations the autoencoder, the text encoder and a training step of the UNet take is counted and printed as
well, beside Stable Diffusion 1.x at 512 pixels: the gain of the caches hangs on that relation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fedgen_assets  # noqa: E402
from fedgen_app.learning.backbone import Backbone, load_task, lora_config, open_backbone  # noqa: E402
from fedgen_app.learning.task import Examples, Share  # noqa: E402
from fedgen_app.learning.training import Plan, train  # noqa: E402
from fedgen_app.settings import Settings, defaults  # noqa: E402
from fedgen_app.tasks import _sources  # noqa: E402
from fedgen_app.tasks._sampling import generate  # noqa: E402

CLASSES = ("shirt", "sneaker", "bag")
PARTS = ("text", "unconditional", "latent")
GUIDANCE = 2.0
# Side of the latent model's images. At a quarter of the widths, the parts of a step have here the proportions that
# those of Stable Diffusion have at 512 (the last table counts them): a text encoder's work does not shrink with images.
LATENT_PIXELS = 256
Turn = Callable[[], object]


def write_images(folder: Path, count: int, side: int, channels: int) -> Path:
    """Random images with labels: what is in them does not matter here."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    folder.mkdir()
    np.savez(folder / "train.npz", images=images, labels=np.arange(count) % len(CLASSES), names=np.array(CLASSES))
    return folder


def make_unconditional(folder: Path) -> Path:
    """A DDPM for 32x32 grey images with attention at 8x8."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )
    DDPMPipeline(unet, DDPMScheduler(1000)).save_pretrained(folder)
    return folder


def make_latent(folder: Path) -> Path:
    """Stable Diffusion 1.x with all its layers and a quarter of all widths: UNet, autoencoder and text encoder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(fedgen_assets.path("language"))
    tokenizer.model_max_length = 77
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    width = 768 // 4
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=width // 64,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT_PIXELS // 8,
        block_out_channels=(80, 160, 320, 320),
        attention_head_dim=2,  # the number of heads: a quarter too, which keeps them 40 to 160 wide
        cross_attention_dim=width,
        norm_num_groups=16,
    )
    schedule = DDPMScheduler(1000, beta_schedule="scaled_linear", clip_sample=False)
    StableDiffusionPipeline(
        vae=make_autoencoder((32, 64, 128, 128)),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """Stable Diffusion's autoencoder with so many channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
    )


class Case:
    """One backbone on both sides: ours opened by the project, the other one by diffusers and PEFT."""

    def __init__(
        self, folder: Path, data: Path, batch: int, batches: int, options: argparse.Namespace, dtype: str = ""
    ) -> None:
        """Open both and fill our caches; ``seconds`` says how long that took."""
        chosen = {
            "task": "diffusion",
            "backbone": str(folder),
            "dataset": str(data),
            "device": options.device,
            "dtype": dtype or options.dtype,
            "batch-size": batch,
            "partition.by": "iid",
            "samples.guidance": GUIDANCE,
            "samples.steps": options.steps,
            "samples.batch": batch,
        }
        self.settings = Settings.from_run_config(defaults(ROOT) | chosen)
        self.task = load_task("diffusion")
        self.backbone: Backbone = open_backbone(self.settings)
        self.pipeline: Any = self.backbone.processor
        self.batch, self.batches = batch, batches
        began = time.perf_counter()
        loaded = self.task.load_data(self.settings, self.backbone, Share(0, 1)).train
        self.seconds, self.images = time.perf_counter() - began, batch * batches
        rows = {name: tensor[: self.images] for name, tensor in loaded.rows.items()}
        assert len(next(iter(rows.values()))) == self.images
        self.examples = Examples(rows, loaded.counts, loaded.shared)
        # The other side: diffusers' own pipeline, its denoiser frozen, with the same LoRA layers in it.
        missing = {} if self.pipeline.has_vae or self.pipeline.condition == "none" else {"vae": None}
        self.theirs: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=self.backbone.dtype, **missing)
        self.theirs.to(self.backbone.device)
        self.theirs.set_progress_bar_config(disable=True)
        self.unet = self.theirs.unet.requires_grad_(False)
        config = lora_config(self.unet, self.task, self.settings.lora)
        self.carrier = get_peft_model(self.unet, config)  # in place: self.unet has the layers too
        self.schedule = DDPMScheduler.from_config(self.theirs.scheduler.config)

    def ours(self) -> None:
        """Our training, as a client does it."""
        plan = Plan(1, self.batches, self.batch, 1, 1e-3, 0.0, 1.0, seed=1)
        train(self.backbone.model, self.task.loss(self.settings, self.backbone), self.examples, plan)

    def theirs_trained(self, prepare: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
        """The loop of diffusers' examples; ``prepare`` gives clean inputs and hidden states of a batch's rows."""
        unet, device, dtype = self.unet, self.backbone.device, self.backbone.dtype
        trained = [p for p in self.carrier.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        unet.train()
        for indices in torch.randperm(self.images).split(self.batch):
            clean, hidden = prepare(indices)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (len(clean),), device=device).long()
            noisy = self.schedule.add_noise(clean, noise, timesteps).to(dtype)
            velocity = self.schedule.config.prediction_type == "v_prediction"
            target = self.schedule.get_velocity(clean, noise, timesteps) if velocity else noise
            predicted = unet(noisy, timesteps, *([] if hidden is None else [hidden.to(dtype)])).sample
            loss = nn.functional.mse_loss(predicted.float(), target.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()

    def bare(self) -> Turn:
        """Pixels; prompts embedded beforehand."""
        device = self.backbone.device
        pixels = self.examples.rows["pixels"].to(device)
        hidden, caption = self.examples.shared.get("hidden"), self.examples.rows.get("caption")
        states = None if hidden is None else hidden.to(device)

        def prepare(indices: Tensor) -> tuple[Tensor, Tensor | None]:
            told = None if states is None or caption is None else states[caption[indices].to(device)]
            return pixels[indices.to(device)].float() / 127.5 - 1, told

        return lambda: self.theirs_trained(prepare)

    def stock(self) -> Turn:
        """Latents and prompts encoded in every step, as train_text_to_image_lora.py does."""
        device, vae, encoder = self.backbone.device, self.theirs.vae, self.theirs.text_encoder
        vae.requires_grad_(False)
        encoder.requires_grad_(False)
        found = _sources.pictures(self.settings, self.pipeline, self.settings.dataset, "train")
        assert found is not None
        scaled = torch.from_numpy(found.pixels[: self.images]).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = scaled.contiguous().to(device, self.backbone.dtype)
        prompts = list(_sources.prompts_of(self.settings, found))[: self.images]
        tokens = self.pipeline.tokens(prompts).to(device)

        def prepare(indices: Tensor) -> tuple[Tensor, Tensor | None]:
            latents = vae.encode(pixels[indices.to(device)]).latent_dist.sample() * vae.config.scaling_factor
            return latents.float(), encoder(tokens[indices.to(device)]).last_hidden_state

        return lambda: self.theirs_trained(prepare)

    def sample_ours(self) -> None:
        """A batch of ours."""
        generate(self.backbone, self.prompts(), 1, self.settings.samples)

    def sample_theirs(self) -> Turn:
        """A batch of the pipeline's own."""
        self.unet.eval()
        config, steps = self.theirs.scheduler.config, self.settings.samples.steps
        schedule = DDIMScheduler.from_config(config, timestep_spacing="trailing")
        if self.pipeline.condition == "none":
            drawing: Any = DDIMPipeline(self.unet, schedule)
            drawing.set_progress_bar_config(disable=True)
            return lambda: drawing(batch_size=self.batch, num_inference_steps=steps, output_type="np")
        self.theirs.scheduler = schedule
        return lambda: self.theirs(self.prompts(), num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np")

    def prompts(self) -> list[str]:
        """A batch of captions."""
        wordings = [self.settings.diffusion.caption.format(name) for name in CLASSES]
        told = [""] if self.pipeline.condition == "none" else wordings
        return [told[i % len(told)] for i in range(self.batch)]


def timed(turn: Turn, device: torch.device) -> float:
    """Seconds of one turn, until the device is done."""
    began = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(first: Turn, second: Turn, turns: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of both sides in turns; one turn of each before, which nobody times."""
    first(), second()
    pairs = [(timed(first, device), timed(second, device)) for _ in range(turns)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def row(name: str, other: str, ours: list[float], theirs: list[float], goal: str) -> list[str]:
    """Our time over theirs: median, lowest, highest of the turns."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    return [name, other, f"{middle:.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", f"{1 / middle:.2f}", goal]


def counted(unet: nn.Module, vae: AutoencoderKL, text: nn.Module, side: int) -> list[float]:
    """Operations per image: UNet forward, UNet in a LoRA step, autoencoder's encoder, text encoder.

    A multiplication and its addition are two. Nothing is computed (meta tensors).
    """
    places = (torch.zeros(1, 4, side // 8, side // 8, device="meta"), torch.zeros(1, device="meta"))
    hidden = torch.zeros(1, 77, int(unet.config.cross_attention_dim), device="meta")
    with torch.device("meta"):
        settings = Settings.from_run_config(defaults(ROOT) | {"task": "diffusion"})
        learning = get_peft_model(unet.requires_grad_(False), lora_config(unet, load_task("diffusion"), settings.lora))
    passes: list[Turn] = [
        torch.no_grad()(lambda: learning(*places, hidden)),
        lambda: learning(*places, hidden).sample.sum().backward(),
        torch.no_grad()(lambda: vae.encoder(torch.zeros(1, 3, side, side, device="meta"))),
        torch.no_grad()(lambda: text(torch.zeros(1, 77, dtype=torch.long, device="meta"))),
    ]
    found = []
    for work in passes:
        with FlopCounterMode(display=False) as counter:
            work()
        found.append(float(counter.get_total_flops()))
    return found


def relations(folder: Path) -> list[list[str]]:
    """Rows of what the parts of a step cost, here and in Stable Diffusion 1.x."""
    with torch.device("meta"):
        parts = {
            f"a quarter of it, {LATENT_PIXELS} px: the model built here": (
                UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
                AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
                CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
                LATENT_PIXELS,
            ),
            "Stable Diffusion 1.x, 512 px": (
                UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
                make_autoencoder((128, 256, 512, 512)),
                CLIPTextModel(
                    CLIPTextConfig(
                        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                    )
                ),
                512,
            ),
        }
    parts_of_a_step = ["UNet, forward", "UNet, a LoRA step", "autoencoder's encoder", "text encoder"]
    rows = [["model", *parts_of_a_step, "encoders / LoRA step", "what caches can gain at most"]]
    for name, (unet, vae, text, side) in parts.items():
        found = counted(unet, vae, text, side)
        share = (found[2] + found[3]) / found[1]
        rows.append(
            [name, *(f"{count / 1e9:.1f}" for count in found), f"{share:.2f}", f"{1 + share:.2f} times as fast"]
        )
    return rows


def show(title: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"\n### {title}\n", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def measure(args: argparse.Namespace, scratch: Path) -> str:
    """All tables as Markdown."""
    head = ["model", "compared with", "time, median ratio", "lowest", "highest", "times as fast", "goal"]
    training, sampling, filled = [head], [head], ""
    if "text" in args.parts:
        place = fedgen_assets.path("diffusion") if args.backbone == "bundled" else Path(args.backbone).resolve()
        shape = json.loads((place / "unet" / "config.json").read_text())
        text = prepared(args, scratch, place, "text-data", args.batch_size, shape["sample_size"], shape["in_channels"])
        times = alternate(text.ours, text.bare(), args.turns, text.backbone.device)
        training.append(row("text, pixels", "bare loop", *times, "at most 1.10"))
    if "unconditional" in args.parts:
        folder = make_unconditional(scratch / "unconditional")
        plain = prepared(args, scratch, folder, "plain-data", args.batch_size, 32, 1)
        times = alternate(plain.ours, plain.bare(), args.turns, plain.backbone.device)
        training.append(row("unconditional, pixels", "bare loop", *times, "at most 1.10"))
        # DDIMPipeline cannot give out bfloat16: both in float32.
        plain = prepared(args, scratch, folder, "plain-data-2", args.batch_size, 32, 1, "float32")
        times = alternate(plain.sample_ours, plain.sample_theirs(), args.turns, plain.backbone.device)
        sampling.append(row("unconditional, pixels, float32", "DDIMPipeline", *times, ""))
    if "latent" in args.parts:
        folder = make_latent(scratch / "latent")
        latent = prepared(args, scratch, folder, "latent-data", args.latent_batch_size, LATENT_PIXELS, 3)
        times = alternate(latent.ours, latent.stock(), args.turns, latent.backbone.device)
        training.append(row("latent", "stock LoRA loop", *times, "1.5 times as fast"))
        share = latent.seconds / statistics.median(times[1])
        filled = (
            "\nThe latent model's caches are filled once per device, outside these times: that took "
            f"{share:.1f} times as long\nas the stock loop takes for one pass over the same images, reading them and "
            "writing the files included.\n"
        )
        times = alternate(latent.sample_ours, latent.sample_theirs(), args.turns, latent.backbone.device)
        sampling.append(row("latent, guided", "StableDiffusionPipeline", *times, ""))
        filled += show("Operations per image, in thousand millions", relations(folder))
    title = f"Training, {args.turns} turns of {args.batches} batches: our time over the other's"
    result = show(title, training) + filled
    return result + show(
        f"Sampling, {args.turns} turns of a batch, DDIM, {args.steps} steps, guidance {GUIDANCE:g}", sampling
    )


def prepared(
    args: argparse.Namespace,
    scratch: Path,
    folder: Path,
    name: str,
    batch: int,
    side: int,
    channels: int,
    dtype: str = "",
) -> Case:
    """A case with so many random images that the training part is full."""
    data = write_images(scratch / name, -(-batch * args.batches * 10 // 9) + 2, side, channels)
    return Case(folder, data, batch, args.batches, args, dtype)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="bundled", help="a text-conditional pipeline in pixel space")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, default=6, help="of a turn of training")
    parser.add_argument("--batch-size", type=int, default=32, help="in pixel space")
    parser.add_argument("--latent-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of sampling")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["FEDGEN_CACHE"] = str(scratch / "cache")
        text = measure(args, scratch)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
