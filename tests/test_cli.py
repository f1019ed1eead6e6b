"""The ``fedgen`` command: what it refuses before anything starts, and what it shows of a finished run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FEDGEN, ROOT, TOPICS, command, events, results, run_arguments, tiny_config
from safetensors.torch import load_file

from fedgen_app.cli import presets
from fedgen_app.cli import run as cli_run
from fedgen_app.errors import SettingsError
from fedgen_app.settings import KEYS, Settings, defaults

WITH_MODULES = """
import sys
sys.argv = ["fedgen", *sys.argv[1:]]
from fedgen_app.cli import main
try:
    main()
finally:
    print("loaded:", *sorted({"torch", "flwr", "transformers", "peft", "numpy", "ray"} & set(sys.modules)))
"""


def test_mistakes_are_told_all_at_once_and_before_torch(tmp_path: Path) -> None:
    output = tmp_path / "run"
    mistakes = {"lora.rank": "0", "learning-rate": "fast", "partition.by": "age", "methd": "x", "task": "poetry"}
    arguments = [f"--set={key}={value}" for key, value in mistakes.items()]
    done = subprocess.run(
        [sys.executable, "-c", WITH_MODULES, "run", "--output", output, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    for key, value in mistakes.items():
        assert f"{key} = '{value}'" in done.stderr
    for hint in (
        "did you mean method",
        "'auto', 'iid', 'label', 'topic' or 'single-label'",
        "one of diffusion, gan, language, vae",
        "greater than",
    ):
        assert hint in done.stderr, hint
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == "loaded:"
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "task": "x",
    "method": "../x",
    "seed": "-1",
    "resume-round": "-1",
    "dtype": "int8",
    "device": "tpu",
    "threads": "-1",
    "backbone-bits": "3",
    "backbone": "",
    "text-column": "",
    "holdout-fraction": "1",
    "test-sequences": "-1",
    "num-server-rounds": "0",
    "fraction-train": "0",
    "selection": "largest",
    "expected-clients": "1.5",
    "evaluate-every": "never",
    "keep-checkpoints": "0",
    "local-epochs": "0",
    "max-steps": "-1",
    "batch-size": "0",
    "accumulate": "0",
    "learning-rate": "nan",
    "weight-decay": "-1",
    "clip-norm": "inf",
    "warmup-rounds": "-1",
    "sequence-length": "7",
    "resolution": "7",
    "gradient-checkpointing": "perhaps",
    "lora.rank": "2000",
    "lora.ranks": "4,16",
    "lora.alpha": "0",
    "lora.dropout": "1",
    "lora.rslora": "perhaps",
    "lora.convolutions": "perhaps",
    "lora.text-encoder": "perhaps",
    "partition.by": "x",
    "partition.alpha": "0",
    "partition.min-examples": "0",
    "partition.max-examples": "-1",
    "personal.epochs": "-1",
    "personal.max-steps": "-1",
    "personal.learning-rate": "0",
    "personal.proximal": "-1",
    "round.quorum": "1.1",
    "round.grace": "-1",
    "round.deadline": "0",
    "round.roll-call": "0",
    "admission.max-update-norm": "-1",
    "admission.norm-action": "ignore",
    "admission.max-weight": "nan",
    "wire.codec": "zip",
    "samples.count": "-1",
    "samples.length": "0",
    "samples.per-prompt": "0",
    "samples.every": "-1",
    "samples.sampler": "euler",
    "samples.steps": "0",
    "samples.guidance": "-1",
    "samples.batch": "0",
    "diffusion.caption": "a photo",
    "diffusion.caption-dropout": "1",
    "diffusion.min-snr": "-1",
    "aggregation.robust": "median",
    "aggregation.attackers": "0.5",
    "aggregation.norm-bound": "0",
    "aggregation.layer-wise": "perhaps",
    "aggregation.residual-rank": "0",
    "clusters.by": "prompt",
    "clusters.choose": "elbow",
    "clusters.count": "0",
    "clusters.threshold": "0",
    "clusters.warmup": "0",
    "clusters.loss-examples": "-1",
    "clusters.every": "-1",
    "clusters.interact-every": "-1",
    "clusters.strength": "2",
    "clusters.temperature": "0",
    "clusters.noise": "-1",
    "clusters.delta": "1",
    "fedprox.mu": "0",
    "fedper.personal-blocks": "0",
    "ditto.mu": "-1",
    "apfl.mix": "2",
    "apfl.mix-learning-rate": "-1",
    "hetlora.gamma": "0",
    "hetlora.penalty": "-1",
    "fedrot.strength": "2",
    "fedavgm.learning-rate": "0",
    "fedavgm.momentum": "1",
    "fedopt.learning-rate": "0",
    "fedopt.beta1": "1",
    "fedopt.beta2": "1",
    "fedopt.tau": "0",
    "gan.r1": "-1",
    "metrics.samples": "-1",
    "metrics.personal-samples": "-1",
    "metrics.features": "/no/such/weights",
    "metrics.classes": "bag,coat,bag",
    # Checked against this machine.
    "dataset": "/no/such/place",
    "lora.init": "/no/such/adapter",
    "clusters.encoder": "/no/such/encoder",
    "clusters.key": "/no/such/key",
    "resume-from": "/no/such/run",
}
FREE = {"output-dir", "backbone-revision", "label-column", "lora.targets", "samples.prompts"}


def test_every_setting_can_be_wrong_or_is_free_text() -> None:
    assert set(WRONG) | FREE == KEYS


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_named(key: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = command("run", ROOT, "--output", output, f"--set={key}={WRONG[key]}")
    assert ended.status == 2
    assert ended.err.startswith(f"fedgen: {key} = "), ended.err
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lora.rank"], "--set lora.rank: should be KEY=VALUE"),
        (["--set", "=3"], "--set =3: should be KEY=VALUE"),
        (["--preset", "quickest"], "no preset of that name (cifar10"),
        (["--clients", "3", "--superlink", "fleet"], "--superlink fleet has the clients that it has"),
        (["--clients", "0"], "0 is not in the range"),
        (["--engine", "spark"], "'spark' is not one of"),
        (["/no/such/app"], "/no/such/app: no Flower app here"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = command("run", "--output", output, *arguments)
    assert ended.status == 2
    shown = " ".join(ended.err.replace("│", " ").split())
    assert message in shown
    assert not output.exists()


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    ended = command(*run_arguments(file / "run"))
    assert ended.status == 2 and "Traceback" not in ended.err
    assert f"{file / 'run'}: cannot be written: Not a directory" in ended.err
    assert file.read_text() == "kept"


def test_a_home_folder_of_nobody_is_a_missing_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for key in ("backbone", "dataset", "lora.init"):
        ended = command("run", ROOT, "--output", output, f"--set={key}=~nosuchuser/m")
        assert ended.status == 2 and "Traceback" not in ended.err
        assert ended.err.startswith(f"fedgen: {key} = ") and "~nosuchuser/m" in ended.err, ended.err
    assert not output.exists()


def test_two_runs_never_share_a_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_run_config(defaults(ROOT))
    made = [cli_run._default_folder(settings) for _ in range(5)]
    assert len(set(made)) == 5 and all(folder.is_dir() for folder in made)
    assert sorted((tmp_path / "runs").iterdir()) == sorted(made)
    # Five calls within one second, or the names would differ without any care.
    assert any(folder.name.endswith("-fedgen-edge-2") for folder in made)


def test_a_default_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SettingsError, match="cannot be made: "):
        cli_run._default_folder(Settings.from_run_config(defaults(ROOT)))


def test_presets_lists_all_and_each_is_valid() -> None:
    ended = command("presets")
    lines = ended.out.splitlines()
    assert ended.status == 0
    assert [line.split()[0] for line in lines] == sorted(f.stem for f in (ROOT / "fedgen_app/presets").glob("*.toml"))
    assert all(len(line.split()) > 4 for line in lines)
    for name in presets.names():
        Settings.from_run_config(defaults(ROOT) | presets.load(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapters are loud enough to be told apart."""
    output = tmp_path_factory.mktemp("cli") / "run"
    loud = {"learning_rate": 0.1, "personal__learning_rate": 0.1, "samples__length": 25, "warmup_rounds": 0}
    ended = command(*run_arguments(output, seed=7, lora__rslora=True, clip_norm=0.0, **loud))
    assert ended.status == 0, ended.err
    (output.parent / "shown").write_text(ended.out)
    return output


def test_set_is_typed_by_the_settings_declaration(folder: Path) -> None:
    kept = json.loads((folder / "settings.json").read_text())
    expected = tiny_config(folder, seed=7, lora__rslora=True, clip_norm=0.0)
    for key in ("seed", "lora.rslora", "clip-norm", "learning-rate", "backbone", "lora.alpha"):
        assert type(kept[key]) is type(expected[key]), key
    assert (kept["seed"], kept["lora.rslora"], kept["learning-rate"]) == (7, True, 0.1)
    assert kept["expected-clients"] == 3


def test_the_command_shows_each_round_and_the_table(folder: Path) -> None:
    shown, found = (folder.parent / "shown").read_text(), results(folder)
    assert found["status"] == "completed"
    assert "round 1/2: 3/3 clients" in shown and "round 2/2: 3/3 clients" in shown
    for number in (found["frozen"], found["final"]["metrics"], found["final"]["personal"]["personal"]):
        value = number["word_perplexity"]
        assert (f"{value:.4g}" if value < 1e4 else f"{value:,.0f}") in shown
    assert f"{found['final']['uplink_reduction']:.2%} less" in shown
    assert f"adapter: {folder / 'global'}" in shown


def test_a_folder_that_holds_a_run_is_not_run_into(folder: Path) -> None:
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    ended = command(*run_arguments(folder))
    assert ended.status == 2 and f"fedgen resume {folder}" in ended.err
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


def test_the_default_folder_and_a_preset_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "unused", num_server_rounds=1, personal__epochs=0, samples__count=0)
    del config["output-dir"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in sorted(config.items(), key=lambda item: "." in item[0])]
    Path("mine.toml").write_text("\n".join(lines))
    ended = command("run", "--engine", "in-process", "--clients", "3", "--preset", "mine.toml", "--set", "seed=3")
    assert ended.status == 0, ended.err
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.endswith("-language-fedgen-edge")
    settings = json.loads((made / "settings.json").read_text())
    assert (settings["seed"], settings["num-server-rounds"], settings["output-dir"]) == (3, 1, str(made))


def test_relative_paths_are_seen_from_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(TOPICS.values()) * 6)
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in run_arguments(tmp_path / "run", num_server_rounds=1) if "dataset=" not in a]
    drop = ["--set=label-column=", "--set=partition.by=iid", "--set=dataset=./notes.txt"]
    ended = command(*arguments, *drop)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["dataset"] == str(tmp_path / "notes.txt")


def test_a_failed_run_is_exit_3_with_the_reason_last(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    arguments = [a for a in run_arguments(tmp_path / "run") if "label-column" not in a and "partition.by" not in a]
    ended = command(*arguments, f"--set=dataset={data}")
    assert ended.status == 3
    last = ended.err.strip().splitlines()[-1]
    assert "no client can take part (error)" in last
    # The reason of the clients is in their own log, which in one process is this one.
    assert results(tmp_path / "run")["status"] == "failed"
    assert events(tmp_path / "run")[-1]["status"] == "failed"


def test_generate_speaks_as_the_run_did(folder: Path, tmp_path: Path) -> None:
    said = {}
    for name, options in (("global", []), ("frozen", ["--frozen"]), ("client-1", ["--client", "1"])):
        ended = command("generate", folder, *options)
        assert ended.status == 0, ended.err
        said[name] = ended.out
        assert ended.out.count("\n---\n") == 2, "one sample for each of the three standing prompts"
        assert ended.out.split("\n\n---\n\n")[0] == (folder / "samples" / f"{name}.txt").read_text().rstrip("\n")
    assert len(set(said.values())) == 3


def test_generate_takes_prompt_count_seed_length_and_output(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.txt"
    asked = ["generate", folder, "--prompt", "the judge", "--count", "2", "--seed", "5", "--length", "6"]
    ended = command(*asked, "--output", file)
    assert (ended.status, ended.out) == (0, "")
    text = file.read_text()
    first, second = text.rstrip("\n").split("\n\n---\n\n")
    assert first != second and first.startswith("the judge") and second.startswith("the judge")
    assert command(*asked).out == text
    assert command(*[a if a != "5" else "6" for a in asked]).out != text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--client", "9"], "no such adapter in this run; there are clients/0, clients/1, clients/2, global"),
        (["--cluster", "0"], "no such adapter in this run"),
        (["--client", "../global"], "--client ../global: should be an id such as clients/0"),
        (["--client", ".."], "--client ..: should be an id"),
        (["--cluster", "/etc"], "--cluster /etc: should be an id"),
        (["--client", "0", "--frozen"], "exclude each other"),
        (["--count", "0"], "0 is not in the range"),
        (["--steps", "5"], "--steps 5: means nothing to the backbone of this language run; use --length, --prompt"),
    ],
)
def test_generate_refuses(folder: Path, options: list[str], message: str) -> None:
    ended = command("generate", folder, *options)
    assert ended.status == 2 and message in " ".join(ended.err.replace("│", " ").split())
    assert ended.out == ""


def test_generate_and_resume_want_a_run_folder(tmp_path: Path) -> None:
    for name in ("generate", "resume"):
        assert command(name, tmp_path / "gone").status == 2
        ended = command(name, tmp_path)
        assert ended.status == 2 and f"{tmp_path}: not a run folder" in ended.err
    (tmp_path / "settings.json").write_text("{broken")
    assert command("generate", tmp_path).status == 2


def test_generate_refuses_a_damaged_adapter(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "global" / "adapter_model.safetensors"
    load_file(file)
    file.write_bytes(file.read_bytes()[:-8])
    ended = command("generate", copy)
    assert ended.status == 3 and str(file) in ended.err and "Traceback" not in ended.err


def test_the_console_command_is_installed() -> None:
    done = subprocess.run([FEDGEN, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("run", "resume", "generate", "presets"))
