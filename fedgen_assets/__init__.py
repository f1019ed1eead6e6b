"""The small models and data sets that come with FedGen-Edge, so that a first run needs no download.

Each folder has a card (README.md) that says what it is, how it was made and under which terms; LICENSES.md lists them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the assets lie."""


def path(name: str) -> Path:
    """Folder of a bundled asset, such as "language" or "topics".

    Raises FileNotFoundError for a name that is not bundled, with the names that are.
    """
    names = sorted(entry.name for entry in FOLDER.iterdir() if (entry / "README.md").is_file())
    if name not in names:
        raise FileNotFoundError(f"no bundled asset {name!r}; there are: {', '.join(names)}")
    return FOLDER / name
