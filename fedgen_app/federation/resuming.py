"""Whether a run may go on with these settings, and from which checkpoint."""

from __future__ import annotations

from pathlib import Path

from fedgen_app.errors import SettingsError
from fedgen_app.runs.folder import Checkpoint, checkpoint_numbers, load_checkpoint, read_json, remove_checkpoint
from fedgen_app.settings import Settings

# What may differ when a run goes on: where it lies, who computes it, how patiently, what is kept and shown.
# Not how images are drawn (samples.steps, ...): what is measured hangs on it. Where the feature extractor comes from
# may differ, as Task.check compares which one it is.
FREE_ON_RESUME = (
    *("output-dir", "resume-from", "resume-round", "expected-clients", "device", "keep-checkpoints"),
    "metrics.features",
    *("samples.count", "samples.per-prompt", "samples.every", "samples.prompts", "samples.length", "samples.batch"),
)
FREE_GROUPS = ("round.",)


def same_run(path: Path, settings: Settings) -> None:
    """Refuse to go on with other settings than the run began with.

    Raises:
        SettingsError: names every setting that differs.
    """
    if not (path / "settings.json").exists():
        return  # it ended before anything was written: there is nothing to go on from
    before, now = read_json(path / "settings.json"), settings.flat()
    differ = [k for k in now if k not in FREE_ON_RESUME and not k.startswith(FREE_GROUPS) and now[k] != before.get(k)]
    if differ:
        told = "; ".join(f"{key} = {now[key]!r}, was {before.get(key)!r}" for key in differ)
        raise SettingsError(f"{path}: the run began with other settings: {told}")


def newest_checkpoint(path: Path, settings: Settings) -> Checkpoint | None:
    """The checkpoint to go on from; later ones, which the user passed over, are removed."""
    checkpoint = load_checkpoint(path, settings.resume_round or None)
    for number in checkpoint_numbers(path):
        if checkpoint is not None and number > checkpoint.number:
            remove_checkpoint(path, number)
    return checkpoint
