"""Train the small feature extractor that measures images where Inception-v3's weights are not at hand.

    python scripts/train_features.py --images fashion-rest/ --output fedgen_assets/features --minutes 6

``--images`` is the folder that scripts/make_pictures.py writes with --rest: train.npz and test.npz without any bundled
image. Classes alone would teach the features to forget what differs within a class, and images that are blurred, noisy
or moved would teach them to overlook it. So three linear heads read the features: the class, a 16x16 thumbnail of what
was shown, and how much noise and blur was in it. The heads are thrown away. What was done stands in training.json.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass

import torch
from _training import Recipe, arguments, write_report
from safetensors.torch import save
from torch import Tensor, nn

from fedgen_app.data.images import load_images
from fedgen_app.tasks._features import SIDE, WIDTH, prepare, small_network

THUMBNAIL = 16


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    """AdamW, cosine decay to nothing."""

    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    shift: float = 3.0  # pixels, each way
    zoom: float = 0.1
    degraded: float = 0.5  # fraction of images with noise, and of those with blur
    noise: float = 0.4  # largest standard deviation; pixels are from -1 to 1
    blur: float = 1.2  # standard deviation in pixels of the Gaussian that is mixed in
    thumbnail_weight: float = 2.0
    degradation_weight: float = 2.0


class Heads(nn.Module):
    """What the features have to tell."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.label = nn.Linear(WIDTH, classes)
        self.thumbnail = nn.Linear(WIDTH, THUMBNAIL**2)
        self.degradation = nn.Linear(WIDTH, 2)


def move(images: Tensor, recipe: FeatureRecipe, draw: torch.Generator) -> Tensor:
    """Images (n, 1, h, w) from -1 to 1, shifted and zoomed at random; black comes in at the edges."""
    count = len(images)
    theta = torch.zeros(count, 2, 3)
    zoom = 1 + recipe.zoom * (2 * torch.rand(count, generator=draw) - 1)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = recipe.shift * (2 * torch.rand(count, 2, generator=draw) - 1) * 2 / SIDE
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def gaussian(deviation: float, reach: int = 3) -> Tensor:
    """Kernel (1, 1, 2 reach + 1, 2 reach + 1) with sum 1."""
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    kernel = line[:, None] * line[None, :]
    return (kernel / kernel.sum())[None, None]


def degrade(images: Tensor, recipe: FeatureRecipe, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with blur, then noise, and how much of each (n, 2) from 0 to 1: noise first."""
    count = len(images)
    amounts = torch.rand(count, 2, generator=draw)
    amounts *= torch.rand(count, 2, generator=draw) < recipe.degraded
    noise, blur = amounts[:, :1, None, None], amounts[:, 1:, None, None]
    smooth = nn.functional.conv2d(nn.functional.pad(images, (3,) * 4, value=-1.0), gaussian(recipe.blur))
    mixed = torch.lerp(images, smooth, blur)
    noisy = mixed + recipe.noise * noise * torch.randn(images.shape, generator=draw)
    # Pixels are stored as bytes: clipped and rounded.
    return ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1, amounts


def read(source: str, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Images (n, 1, 32, 32) from -1 to 1, the number of each one's class, and the names."""
    found = load_images(source, "train" if split == "train" else "test", resolution=SIDE, channels=1)
    if found is None or found.labels is None:
        raise SystemExit(f"--images {source}: no labelled {split} images")
    names = sorted(set(found.labels))
    pixels = torch.from_numpy(found.pixels).permute(0, 3, 1, 2)
    labels = torch.tensor([names.index(label) for label in found.labels])
    return prepare(pixels.expand(-1, 3, -1, -1)), labels, names


def train(layers: nn.Module, heads: Heads, images: Tensor, labels: Tensor, recipe: FeatureRecipe) -> tuple[int, float]:
    """Train in place; gives the steps and the seconds."""
    draw = torch.Generator().manual_seed(recipe.seed)
    parameters = [*layers.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    step, started = 0, time.monotonic()
    while (progress := recipe.progress(step, time.monotonic() - started)) < 1:
        optimizer.param_groups[0]["lr"] = recipe.rate(step, progress)
        chosen = torch.randint(len(images), (recipe.batch_size,), generator=draw)
        shown, amounts = degrade(move(images[chosen], recipe, draw), recipe, draw)
        features = layers(shown)
        thumbnail = nn.functional.adaptive_avg_pool2d(shown, THUMBNAIL).flatten(1)
        parts = (
            nn.functional.cross_entropy(heads.label(features), labels[chosen]),
            recipe.thumbnail_weight * nn.functional.mse_loss(heads.thumbnail(features), thumbnail),
            recipe.degradation_weight * nn.functional.mse_loss(heads.degradation(features), amounts),
        )
        optimizer.zero_grad()
        torch.stack(parts).sum().backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            told = "  ".join(f"{part.item():.3f}" for part in parts)
            speed = step * recipe.batch_size / (time.monotonic() - started)
            print(f"step {step}  {progress:.1%}  class, thumbnail, degradation {told}  {speed:.0f}/s", flush=True)
    return step, time.monotonic() - started


@torch.inference_mode()
def measure(layers: nn.Module, heads: Heads, images: Tensor, labels: Tensor, recipe: FeatureRecipe) -> dict[str, float]:
    """What the heads still read from the features of images not trained on, clean ones and degraded ones."""
    clean = torch.cat([layers(batch) for batch in images.split(256)])
    damaged, amounts = degrade(images, recipe, torch.Generator().manual_seed(recipe.seed))
    seen = torch.cat([layers(batch) for batch in damaged.split(256)])
    thumbnail = nn.functional.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
    missed = (heads.thumbnail(clean) - thumbnail).square().mean() / (thumbnail - thumbnail.mean(0)).square().mean()
    errors = (heads.degradation(seen) - amounts).square().mean(0) / amounts.var(0)
    return {
        "accuracy": round((heads.label(clean).argmax(1) == labels).float().mean().item(), 4),
        "accuracy_degraded": round((heads.label(seen).argmax(1) == labels).float().mean().item(), 4),
        "thumbnail_r2": round(1 - missed.item(), 3),
        "noise_r2": round(1 - errors[0].item(), 3),
        "blur_r2": round(1 - errors[1].item(), 3),
    }


def main() -> None:
    """Train, measure and save."""
    parser = arguments(__doc__, "folder for model.safetensors and training.json")
    parser.add_argument("--images", required=True, help="folder with train.npz and test.npz")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = FeatureRecipe(minutes=args.minutes, steps=args.steps)
    images, labels, names = read(args.images, "train")
    test_images, test_labels, test_names = read(args.images, "test")
    if names != test_names:
        raise SystemExit("--images: training and test images have different classes")
    torch.manual_seed(recipe.seed)
    layers, heads = small_network(), Heads(len(names))
    layers.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    print(f"{len(images)} images, {sum(p.numel() for p in layers.parameters())} parameters", flush=True)
    steps, seconds = train(layers, heads, images, labels, recipe)
    stored = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in layers.state_dict().items()
    }
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "model.safetensors"
    file.write_bytes(save(stored))
    layers.load_state_dict(stored)  # what is measured is what was saved, rounded to float16
    report = {
        "parameters": sum(p.numel() for p in layers.parameters()),
        "features": WIDTH,
        "classes": names,
        "images": len(images),
        "test_images": len(test_images),
        "recipe": asdict(recipe),
        "steps": steps,
        "images_seen": steps * recipe.batch_size,
        "minutes": round(seconds / 60, 1),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **measure(layers.eval(), heads, test_images, test_labels, recipe),
    }
    write_report(args.output, report)


if __name__ == "__main__":
    main()
