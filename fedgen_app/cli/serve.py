"""``fedgen serve``: a finished run's adapters as a service for devices that cannot, or need not, do all themselves."""

from __future__ import annotations

import importlib.util
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.cli import mixing
from fedgen_app.cli.finished import adapter_file, settings_of
from fedgen_app.errors import SettingsError
from fedgen_app.fleet.spec import is_loopback
from fedgen_app.serving.guard import VARIABLE, Limits, read_tokens

USUAL = Limits()


def serve(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8443,
    certificate: Annotated[Path | None, typer.Option(help="Certificate chain, PEM; needed beyond loopback.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"Bearer tokens, one per line; default: one in {VARIABLE}.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where the same backbone lies here; default: as the run says.")
    ] = "",
    most_images: Annotated[int, typer.Option(min=1, max=256, help="Images of one request.")] = USUAL.images,
    most_steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps of one image.")] = USUAL.steps,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images of one forward pass.")] = USUAL.batch,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Requests that may wait.")] = USUAL.waiting,
    rate: Annotated[int, typer.Option(min=1, help="Requests of one client per minute.")] = USUAL.per_minute,
    burst: Annotated[int, typer.Option(min=1, help="Requests of one client at once.")] = USUAL.burst,
    most_alike: Annotated[
        int, typer.Option(min=1, max=2048, help="Connections of one address that are served.")
    ] = USUAL.alike,
) -> None:
    """Serve images, half-finished images or mixed adapters for encoded prompts."""
    folder = run_dir.resolve()
    settings = settings_of(folder)
    clusters = mixing.clusters_in(folder / "clusters")
    if not clusters and not adapter_file(folder, "", "").is_file():
        raise SettingsError(f"{folder}: no adapters in it; to go on with the run: fedgen resume {folder}")
    tokens = read_tokens(token_file, os.environ.get(VARIABLE, ""))
    _safe(host, certificate, key, tokens)
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise SettingsError(f"fedgen serve needs {package}: pip install 'fedgen-edge[serve]'")

    from fedgen_app.serving.engine import open_engine
    from fedgen_app.serving.run import Address
    from fedgen_app.serving.run import serve as serve_on

    limits = Limits(
        images=most_images,
        steps=most_steps,
        batch=batch,
        waiting=queue,
        per_minute=rate,
        burst=burst,
        alike=most_alike,
    )
    engine = open_engine(folder, settings, clusters, limits, backbone)
    if engine.frame.shapes is None:
        typer.echo("no images: prompts for this backbone would be plain text; mixed adapters alone", err=True)
    serve_on(engine, tokens, limits, Address(host, port, certificate, key), lambda line: typer.echo(line, err=True))


def _safe(host: str, certificate: Path | None, key: Path | None, tokens: Sequence[str]) -> None:
    """Nothing in the clear, and nothing open to everybody, beyond this machine.

    Raises:
        SettingsError: it would be, or the certificate and its key are none.
    """
    if (certificate is None) != (key is None):
        raise SettingsError("--certificate and --key go together")
    if not is_loopback(host):
        missing = ["--certificate and --key"] * (certificate is None) + [f"--token-file, or {VARIABLE}"] * (not tokens)
        if missing:
            raise SettingsError(f"--host {host}: beyond this machine needs {' and '.join(missing)}")
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # never ask for one
        except (OSError, ValueError) as error:  # not there, no PEM, or not of one another
            raise SettingsError(f"--certificate {certificate}, --key {key}: {error}") from None
