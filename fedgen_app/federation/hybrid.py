"""What a run's clusters are to generation: their adapters, and the mixture of them that suits a prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fedgen_app.errors import SettingsError
from fedgen_app.federation.clustering import Numbers, attention
from fedgen_app.federation.protection import rotation
from fedgen_app.federation.requirement import space_of
from fedgen_app.federation.summary import CENTROIDS, MAP
from fedgen_app.learning.adapters import Adapter, load_adapter
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.encoder import encode, mark_of
from fedgen_app.learning.export import ADAPTER_FILE
from fedgen_app.learning.mixture import Mixture
from fedgen_app.learning.task import Task
from fedgen_app.runs.folder import read_json
from fedgen_app.settings import Settings

EXPLICIT = "give weights instead, such as --mix 0:0.7,1:0.3"


def adapters_of(folder: Path, clusters: Collection[int]) -> dict[int, Adapter]:
    """The adapters of a run's clusters, as exported: residuals are in them.

    Args:
        folder: ``clusters`` of the run folder.

    Raises:
        AdapterError: one is damaged.
    """
    return {cluster: load_adapter(folder / str(cluster) / ADAPTER_FILE) for cluster in sorted(clusters)}


def centroids_of(folder: Path) -> tuple[dict[int, Numbers], str]:
    """The direction of each cluster's requirements, and the mark of their space.

    Args:
        folder: ``clusters`` of the run folder.

    Raises:
        SettingsError: the run was not clustered by prompts.
        AdapterError: the file is damaged.
        CheckpointError: likewise.
    """
    if not (folder / CENTROIDS).is_file():
        raise SettingsError(f"--mix auto: the clusters of this run do not come from prompts; {EXPLICIT}")
    centres = {int(name): tensor.double().numpy() for name, tensor in load_adapter(folder / CENTROIDS).items()}
    return centres, str(read_json(folder / MAP).get("space", ""))


def likened(vector: Numbers, centres: Mapping[int, Numbers], temperature: float) -> Mixture:
    """Softmax of the similarity to the centroids divided by the temperature, as clusters listen to each other.

    Args:
        vector: A direction (width,) in the centroids' space.
    """
    return Mixture.of(attention({c: float(vector @ centre) for c, centre in centres.items()}, temperature))


def turned(
    settings: Settings, task: Task, backbone: Backbone, texts: Sequence[str], key: bytes, encoder: str = ""
) -> tuple[Numbers, str]:
    """Prompts as the run's devices encode them, but without noise, (texts, width), and the mark of their space.

    Args:
        key: The secret of the devices, where they have one.
        encoder: This device's own place of the encoder that ``clusters.encoder`` names.

    Raises:
        SettingsError: there is no text to go by.
        DataError: a prompt has no direction.
    """
    if not all(text.strip() for text in texts):
        raise SettingsError(f"--mix auto: there is no prompt to go by; name one with --prompt, or {EXPLICIT}")
    rows = encode(settings, task, backbone, texts, encoder)
    width = rows.shape[1]
    return rows @ rotation(key, width).T if key else rows, space_of(mark_of(settings, backbone, encoder), key, width)


def mixtures_for(
    settings: Settings,
    task: Task,
    backbone: Backbone,
    texts: Sequence[str],
    folder: Path,
    key: bytes = b"",
    encoder: str = "",
) -> list[Mixture]:
    """The mixture that suits each prompt: encoded as the run's devices encode, without noise.

    Args:
        folder: ``clusters`` of the run folder.
        key, encoder: As in ``turned``.

    Raises:
        SettingsError: the run was not clustered by prompts, there is no text to go by, or the prompts' directions are
            not in the centroids' space: another key, or another encoder.
        DataError: a prompt has no direction.
    """
    centres, space = centroids_of(folder)
    rows, own = turned(settings, task, backbone, texts, key, encoder)
    if own != space:
        secret = "the devices turned what they sent with a secret key, or used another encoder; with --cluster-key FILE"
        why = "the devices of this run have another key or encoder" if key else f"{secret} a device can"
        raise SettingsError(f"--mix auto: this prompt cannot be compared with the clusters: {why}; or {EXPLICIT}")
    return [likened(row, centres, settings.clusters.temperature) for row in rows]
