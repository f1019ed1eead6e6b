"""``fedgen backbone``: bring a backbone to the devices once, over the operator's own web server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import PydanticCustomError
from rich.console import Console

from fedgen_app.errors import SettingsError
from fedgen_app.federation.policy import bytes_of
from fedgen_app.runs.report import size

app = typer.Typer(help="Pack a backbone for the devices, install it there, show its fingerprint.", no_args_is_help=True)
TaskOption = Annotated[str, typer.Option(help="What it generates: language, diffusion, ...")]


def _bytes(option: str, text: str) -> int:
    try:
        found = bytes_of(int(text) if text.isdecimal() else text)
    except PydanticCustomError as error:
        raise SettingsError(f"{option} {text}: {error.message()}") from None
    assert isinstance(found, int)
    return found


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The backbone: safetensors and configurations.")],
    output: Annotated[Path, typer.Option(help="The folder that a web server will offer.")],
    key: Annotated[Path, typer.Option(help="Ed25519 private key, PEM; made where there is none, with KEY.pub.")],
    task: TaskOption = "language",
    chunk_size: Annotated[str, typer.Option(help="Bytes per chunk.")] = "1MiB",
) -> None:
    """Cut a backbone into signed chunks for any static web server."""
    from fedgen_app.fleet import pack as packing
    from fedgen_app.fleet.manifest import public_file

    count = _bytes("--chunk-size", chunk_size)
    if not 4096 <= count <= 64 * 1024**2:
        raise SettingsError(f"--chunk-size {chunk_size}: should be from 4KiB to 64MiB")
    packed = packing.pack(folder, output, key, task, count)
    for path, reason in packed.left_out:
        print(f"left out: {path}: {reason}")
    print(f"packed {len(packed.manifest.files)} files, {size(packed.manifest.total)}, into {output}")
    print(f"fingerprint {packed.manifest.fingerprint}")
    print(f"devices need {public_file(key)} and: fedgen backbone pull URL --to FOLDER --key {public_file(key).name}")


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="Where the packed backbone is offered: https://HOST/FOLDER.")],
    to: Annotated[Path, typer.Option(help="The folder to install it as.")],
    key: Annotated[Path, typer.Option(help="The public key that `pack` made.")],
    ca: Annotated[Path | None, typer.Option(help="Certificate of an own authority; default: the system's.")] = None,
    most: Annotated[str, typer.Option(help="Refuse more bytes than these.")] = "64GB",
    replace: Annotated[bool, typer.Option("--replace", help="Replace another backbone in that folder.")] = False,
) -> None:
    """Install a packed backbone, whole or not at all; after a cut the same command goes on."""
    from fedgen_app.fleet import pull as pulling
    from fedgen_app.fleet.source import Source

    console = Console()
    limit = _bytes("--most", most)
    status = console.status("asking") if console.is_terminal else None

    def report(done: int, of: int) -> None:
        if status:
            status.update(f"{size(done)} of {size(of)}")

    if status:
        status.start()
    try:
        with Source.open(url, ca) as source:
            installed = pulling.pull(source, to.expanduser().resolve(), key, limit, replace, report)
    finally:
        if status:
            status.stop()
    what = "was there already" if installed.was_there else f"installed, {size(installed.fetched)} fetched"
    print(f"{to}: {what}")
    print(f"fingerprint {installed.manifest.fingerprint}")


@app.command()
def fingerprint(
    folder: Annotated[Path, typer.Argument(help="The backbone's folder.")], task: TaskOption = "language"
) -> None:
    """Print the fingerprint by which server and devices compare their backbones."""
    from fedgen_app.fleet.pack import fingerprint_of

    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder")
    print(fingerprint_of(folder.resolve(), task))
