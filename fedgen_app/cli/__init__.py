"""The ``fedgen`` command. Bad input ends with exit status 2 before torch or Flower is even imported."""

from __future__ import annotations

import sys

import typer

from fedgen_app.cli import (
    audit_prompts,
    backbone,
    device_worker,
    doctor,
    estimate,
    generate,
    presets,
    provision,
    reproduce,
    resume,
    run,
    serve,
    sweep,
)
from fedgen_app.errors import FedgenError

app = typer.Typer(
    name="fedgen",
    help="Federated LoRA for generative models: the backbone stays frozen, only small adapters travel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("resume")(resume.resume)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("audit-prompts")(audit_prompts.audit_prompts)
app.command("sweep")(sweep.sweep)
app.command("reproduce")(reproduce.reproduce)
app.command("provision")(provision.provision)
app.command("register")(provision.register)
app.command("device-worker")(device_worker.device_worker)
app.command("doctor")(doctor.doctor)
app.add_typer(backbone.app, name="backbone")
app.command("estimate")(estimate.estimate)
app.command("presets")(presets.presets)


def main() -> None:
    """Entry point: an error that we raise on purpose is one message on standard error and an exit status."""
    try:
        app()
    except FedgenError as error:
        print(f"fedgen: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
