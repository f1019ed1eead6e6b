"""What commands find in the folder of a finished run, before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings


def settings_of(folder: Path) -> Settings:
    """The settings of a run.

    Raises:
        SettingsError: the folder is none of a run.
    """
    try:
        run_config = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder}: not a run folder: {error}") from None
    return Settings.from_run_config(run_config)


def adapter_file(folder: Path, client: str, cluster: str) -> Path:
    """Where a client's or a cluster's adapter should lie; of neither the global one.

    Raises:
        SettingsError: the value is no id.
    """
    for option, value in (("--client", client), ("--cluster", cluster)):
        if value and (Path(value).name != value or value.startswith(".")):
            raise SettingsError(f"{option} {value}: should be an id such as {', '.join(adapters_in(folder)[:3])}")
    part = f"clients/{client}" if client else f"clusters/{cluster}" if cluster else "global"
    whole = folder / part / "model.safetensors"  # where all weights learned
    return whole if whole.is_file() else folder / part / "adapter_model.safetensors"


def adapters_in(folder: Path) -> list[str]:
    """The adapters that a run left, by their folders."""
    return [str(f.parent.relative_to(folder)) for f in sorted(folder.glob("**/*model.safetensors"))]
