"""Train a small text-conditional diffusion model in pixel space from nothing: a UNet and a CLIP text encoder.

    python scripts/pretrain_diffusion.py --images fashion-rest/ --classes t-shirt,trouser,pullover,dress,coat,shirt \
        --output fedgen_assets/diffusion --minutes 55 --threads 1

Only the images of ``--classes`` are seen. Captions name the class in several wordings; one in ten is empty, so that
guidance works. The result is a folder in diffusers' format (model_index.json, unet, text_encoder, tokenizer,
scheduler), with a moving average of the weights; what was done stands in training.json. With --checkpoint DIR an
interrupted training goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _training import Recipe, arguments, draw_of, load_state, save_state, without_machine_notes, write_report
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from fedgen_app.data.images import load_images
from fedgen_app.learning import attention

WORDINGS = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a photograph of a {}",
    "a small photo of a {}",
    "a photo of one {}",
    "this is a {}",
    "the {}",
    "a {}",
    "{}",
)
EMPTY = 0.1  # fraction of captions left out, for classifier-free guidance (arXiv 2207.12598)


@dataclass(frozen=True)
class Shape:
    """Size of the model. Cross-attention stands only in the last two blocks: at 8x8 and 4x4 for 32x32 images."""

    channels: tuple[int, ...] = (16, 32, 64, 64)
    resolution: int = 32
    head: int = 16
    text_width: int = 64
    text_layers: int = 2
    text_length: int = 24


@dataclass(frozen=True)
class DiffusionRecipe(Recipe):
    """AdamW, cosine decay to a twentieth, moving average."""

    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    floor: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    flip: bool = False


class Conditional(nn.Module):
    """UNet and text encoder as one module, so that both train, and are averaged, together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, wording: Tensor) -> Tensor:
        """Prediction for noisy (batch, channels, h, w); tokens: the distinct captions, wording: each image's own."""
        hidden = self.text_encoder(tokens).last_hidden_state[wording]
        return self.unet(noisy, timesteps, hidden).sample


def build(shape: Shape, channels: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> Conditional:
    """A fresh model for images of so many channels."""
    torch.manual_seed(seed)
    plain, crossed = len(shape.channels) - 2, 2
    unet = UNet2DConditionModel(
        sample_size=shape.resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=shape.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * crossed,
        up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",) * plain,
        cross_attention_dim=shape.text_width,
        attention_head_dim=tuple(max(1, width // shape.head) for width in shape.channels),  # heads, by an old misnomer
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.text_width,
            intermediate_size=4 * shape.text_width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=shape.text_width // shape.head,
            max_position_embeddings=shape.text_length,
            projection_dim=shape.text_width,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    return Conditional(unet, text_encoder)


def noise_schedule() -> DDPMScheduler:
    """Cosine schedule (arXiv 2102.09672), 1000 steps, v prediction (arXiv 2202.00512)."""
    return DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def encode(captions: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """Token ids (captions, length), padded."""
    return tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def noised(
    pixels: Tensor, labels: Tensor, schedule: DDPMScheduler, recipe: DiffusionRecipe, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step's noisy images, their timesteps, the numbers of their captions, and the velocity to predict."""
    draw = draw_of(recipe.seed, step)
    chosen = torch.randint(len(pixels), (recipe.batch_size,), generator=draw)
    wording = 1 + labels[chosen] * len(WORDINGS)
    wording += torch.randint(len(WORDINGS), (recipe.batch_size,), generator=draw)
    wording[torch.rand(recipe.batch_size, generator=draw) < EMPTY] = 0
    timesteps = torch.randint(len(schedule), (recipe.batch_size,), generator=draw)
    images = pixels[chosen]
    noise = torch.randn(images.shape, generator=draw)
    if recipe.flip:
        mirrored = torch.rand(recipe.batch_size, generator=draw) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    noisy, target = schedule.add_noise(images, noise, timesteps), schedule.get_velocity(images, noise, timesteps)
    return noisy, timesteps, wording, target


def train(
    model: Conditional,
    pixels: Tensor,
    labels: Tensor,
    tokens: Tensor,
    recipe: DiffusionRecipe,
    checkpoint: Path | None,
) -> tuple[Conditional, int, float]:
    """Train in place.

    Args:
        pixels: (n, channels, h, w) in -1..1.
        labels: (n,) class of each image.
        tokens: (1 + classes x wordings, length): the empty caption first, then each class's wordings.

    Returns:
        The moving average, the steps, the seconds of training.
    """
    device = next(model.parameters()).device
    schedule = noise_schedule()
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    step, seconds = 0, 0.0
    if state := load_state(checkpoint, device):
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    saved, running = seconds, torch.zeros((), device=device)
    while (progress := recipe.progress(step, seconds)) < 1:
        started = time.monotonic()
        optimizer.param_groups[0]["lr"] = recipe.rate(step, progress)
        noisy, timesteps, wording, target = noised(pixels, labels, schedule, recipe, step)
        inputs = [tensor.to(device) for tensor in (noisy, timesteps, tokens, wording)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = model(*inputs)
        loss = nn.functional.mse_loss(predicted.float(), target.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        pace = min(recipe.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - pace)
        running += loss.detach()
        seconds += time.monotonic() - started
        if step % 100 == 0:
            speed = step * recipe.batch_size / seconds
            print(f"step {step}  {progress:.1%}  loss {running.item() / 100:.4f}  {speed:.0f} images/s", flush=True)
            running.zero_()
        if checkpoint and seconds - saved > 120:
            parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
            kept = {name: part.state_dict() for name, part in parts.items()}
            save_state(checkpoint, kept | {"step": step, "seconds": seconds})
            saved = seconds
    return averaged, step, seconds


def save_pipeline(folder: Path, model: Conditional, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    """Write the folder in diffusers' format: Stable Diffusion's components without a VAE; weights in float16."""
    half = copy.deepcopy(model).to(torch.float16)
    half.unet.save_pretrained(folder / "unet")
    half.text_encoder.save_pretrained(folder / "text_encoder")
    noise_schedule().save_pretrained(folder / "scheduler")
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder / "tokenizer")
    without_machine_notes(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": half.unet.config["_diffusers_version"],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def choose(images: np.ndarray, labels: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, Tensor]:
    """The images of the wanted classes, (n, h, w, channels), and the number of each one's class."""
    if missing := sorted(set(wanted) - set(labels)):
        raise SystemExit(f"--classes: no image of {', '.join(missing)}; there are {', '.join(sorted(set(labels)))}")
    kept = [i for i, label in enumerate(labels) if label in wanted]
    return images[kept], torch.tensor([wanted.index(labels[i]) for i in kept])


def read(source: str, resolution: int, names: Sequence[str], wanted: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The images of the wanted classes, (n, channels, h, w) in -1..1, and the number of each one's class."""
    found = load_images(source, "train", resolution=resolution)
    if found is None or found.labels is None:
        raise SystemExit(f"--images {source}: no training images with labels")
    labels = [names[int(label)] if names else label for label in found.labels]
    images, classes = choose(found.pixels, labels, wanted)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, classes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def main() -> None:
    """Train and save."""
    parser = arguments(__doc__, "folder for the pipeline")
    parser.add_argument("--images", type=str, required=True, help="what the setting `dataset` takes: a folder or file")
    parser.add_argument("--names", default="", help="names of the classes 0, 1, ..., where the data have only numbers")
    parser.add_argument("--classes", required=True, help="names of the classes to train on, comma-separated")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "fedgen_assets" / "language")
    parser.add_argument("--channels", default="16,32,64,64", help="of the UNet's blocks")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape(channels=tuple(int(c) for c in args.channels.split(",")), resolution=args.resolution)
    recipe = DiffusionRecipe(
        minutes=args.minutes,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        flip=args.flip,
    )
    wanted = _names(args.classes)

    pixels, classes = read(args.images, shape.resolution, _names(args.names), wanted)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    captions = ["", *(wording.format(name) for name in wanted for wording in WORDINGS)]
    tokens = encode(captions, tokenizer, shape.text_length)
    model = build(shape, pixels.shape[1], tokenizer, recipe.seed).to(args.device)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    print(f"{len(pixels)} images of {', '.join(wanted)}; parameters: {sizes}", flush=True)
    with attention.suited_to(torch.device(args.device)):
        averaged, steps, seconds = train(model, pixels, classes, tokens, recipe, args.checkpoint)
    save_pipeline(args.output, averaged.cpu(), tokenizer, shape.text_length)
    report = {
        "parameters": sizes,
        "classes": wanted,
        "images": len(pixels),
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "steps": steps,
        "images_seen": steps * recipe.batch_size,
        "minutes": round(seconds / 60, 1),
    }
    write_report(args.output, report)


if __name__ == "__main__":
    main()
