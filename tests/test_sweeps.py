"""Sweep files: what they become, what is refused before anything starts, and what the tables make of the runs."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from fedgen_app.cli import presets, reproduce
from fedgen_app.cli.reproduce import Scale
from fedgen_app.errors import SettingsError
from fedgen_app.settings import Value, defaults, plugins
from fedgen_app.sweeps import markdown, plots, records, runner, spec, tables
from fedgen_app.sweeps.plan import Sweep, expand
from fedgen_app.sweeps.records import Record, Row, Spread, rows_of, spread
from fedgen_app.sweeps.spec import Target

STANDARD = defaults(ROOT)


def plan(text: str, folder: Path = Path("/sweep"), here: bool = True) -> Sweep:
    file = spec.parse(tomllib.loads(text), "s.toml")
    return expand(
        file, source=folder / "s.toml", output=folder / "out", defaults=STANDARD, load_preset=presets.load, here=here
    )


BASE = """
clients = 2
[grid]
lora.rank = [2, 8]
partition.alpha = [0.3, 1]
seed = [0, 1]
"""


def test_every_combination_is_a_run_with_a_name_of_its_own() -> None:
    found = plan(BASE)
    assert [run.name for run in found.runs][:3] == [
        "lora.rank-2_partition.alpha-0.3_seed-0",
        "lora.rank-2_partition.alpha-0.3_seed-1",
        "lora.rank-2_partition.alpha-1_seed-0",
    ]
    assert len({run.name for run in found.runs}) == len(found.runs) == 8
    last = found.runs[-1]
    assert (last.settings["lora.rank"], last.settings["partition.alpha"], last.settings["seed"]) == (8, 1.0, 1)
    assert last.settings["expected-clients"] == 2
    assert set(last.settings) == set(STANDARD)
    assert found.axes == {"lora.rank": (2, 8), "partition.alpha": (0.3, 1)}


def test_the_later_table_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("expected-clients = 7\nbatch-size = 3\nmax-steps = 3\nlocal-epochs = 3\n")
    (tmp_path / "other.toml").write_text("max-steps = 4\nlocal-epochs = 4\nlearning-rate = 0.4\n")
    text = """
    preset = "mine.toml"
    [set]
    local-epochs = 5
    learning-rate = 0.5
    [variants.plain]
    [variants."its own"]
    preset = "other.toml"
    learning-rate = 0.6
    """
    plain, own = plan(text, tmp_path).runs
    keys = ("expected-clients", "batch-size", "max-steps", "local-epochs", "learning-rate")
    assert [plain.settings[key] for key in keys] == [7, 3, 3, 5, 0.5]
    assert [own.settings[key] for key in keys] == [7, 3, 4, 5, 0.6]
    assert (plain.name, own.name) == ("plain_seed-0", "its-own_seed-0")


def test_what_is_excluded_is_not_run() -> None:
    found = plan(BASE + "[[exclude]]\nlora.rank = 8\npartition.alpha = 1\n[[exclude]]\nseed = 1\nlora.rank = 2\n")
    kept = {(run.point["lora.rank"], run.point["partition.alpha"], run.seed) for run in found.runs}
    assert kept == {(2, 0.3, 0), (2, 1, 0), (8, 0.3, 0), (8, 0.3, 1)}


def test_names_that_would_meet_are_told_apart() -> None:
    names = [run.name for run in plan('clients = 2\n[variants."a b"]\n[variants."A-b"]\n[variants.c]').runs]
    assert len({name.lower() for name in names}) == 3
    assert names[2] == "c_seed-0" and all(name.lower().startswith("a-b_seed-0_") for name in names[:2])
    (long,) = plan(f'clients = 2\n[variants."{"x" * 300}"]').runs
    assert len(long.name) <= 120


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("colour = 3", "s.toml: colour = 3: a sweep file has no such key"),
        ("clients = 0", "s.toml: clients = 0: should be greater than or equal to 1"),
        ("[grid]\nseed = [0]", "clients is missing"),
        ("clients = 2\n[grid]\nlora.rank = 2", "s.toml: grid.lora.rank = 2: should be a valid list"),
        ("clients = 2\n[grid]\nseed = []", "s.toml: grid.seed = []: "),
        ("clients = 2\n[grid]\nseed = [1, 1]", "s.toml: grid.seed = [1, 1]: 1 stands there twice"),
        ("clients = 2\n[grid]\nlora.rang = [2]", "s.toml: grid.lora.rang = [2]: no such setting"),
        ("clients = 2\n[grid]\nlora.rank = [2, 0]", "lora.rank = 0: should be greater than or equal to 1"),
        ("clients = 2\n[set]\nbatch-size = [2]", "s.toml: set.batch-size = [2]: should be a number"),
        ("clients = 2\n[set]\nseed = 2", "s.toml: set.seed = 2: seeds stand in grid.seed"),
        ("clients = 2\n[set]\noutput-dir = '/x'", "s.toml: set.output-dir = '/x': the sweep sets it itself"),
        ("clients = 2\n[set]\nlora.rank = 3\n[grid]\nlora.rank = [2]", "set.lora.rank = 3: grid.lora.rank = [2] says"),
        (
            "clients = 2\n[variants.a]\nlora.rank = 3\n[grid]\nlora.rank = [2]",
            "variants.a.lora.rank = 3: grid.lora.rank",
        ),
        ("clients = 2\n[variants.a]\nmethd = 'x'", "variants.a.methd = 'x': no such setting"),
        ("clients = 2\n[set]\nmethod = 'fedmagic'", "method = 'fedmagic': should be one of"),
        ("clients = 2\nrows = ['seed']", "rows = 'seed': should be an axis of this sweep other than the seed"),
        ("clients = 2\n[[exclude]]\nlora.rank = 2", "exclude.lora.rank = 2: no run of this sweep has it"),
        ("clients = 2\n[grid]\nseed = [0]\n[[exclude]]\nseed = 0", "exclude leaves no run"),
        ("clients = 2\n[target]\nmetric = 'wp'\nvalue = 2", "target.metric = 'wp': should be 'word_perplexity'"),
        ("clients = 2\n[target]\nmetric = 'fid'\nvalue = 'low'", "target.value = 'low': should be a valid number"),
        ("clients = 2\npreset = 'quickest'", "quickest: no such file, and no preset of that name"),
        ("clients = 2\n[set]\nbackbone = 'prepared:x'", "backbone = 'prepared:x': there is no [prepare.x]"),
        ("clients = 2\n[set]\nbackbone = '/no/such'", "backbone = '/no/such': no such file or folder"),
        ("clients = 2\n[prepare.x]\n", "prepare.x = {}: should have either call or script"),
        ("clients = 2\n[prepare.x]\ncall = 'rm -rf'", "prepare.x.call = 'rm -rf': "),
        ("clients = 2\n[prepare.'../x']\ncall = 'a:b'", "prepare.../x: should be fit for a folder's name"),
        ("engine = 'spark'", "engine = 'spark': should be 'in-process' or 'flower'"),
    ],
)
def test_mistakes_are_named_with_key_and_value(text: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(text)
    assert told in str(caught.value)


def test_mistakes_are_told_all_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        plan("clients = 2\n[set]\nbatch-size = 0\n[grid]\nlora.rank = [0, 2, 5000]\nmethod = ['x', 'fedgen-edge']")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4, "each mistake once, however many runs have it"
    assert [line.split(": ")[1].split(" = ")[0] for line in lines].count("lora.rank") == 2


def test_a_prepared_backbone_becomes_a_folder_of_the_output(tmp_path: Path) -> None:
    text = """
    clients = 2
    [grid]
    backbone = ["prepared:one", "bundled"]
    [prepare.one]
    script = "make.py"
    [prepare.unused]
    call = "a:b"
    """
    found = plan(text, tmp_path)
    assert [run.settings["backbone"] for run in found.runs] == [str(tmp_path / "out" / "prepared" / "one"), "bundled"]
    assert [run.prepared for run in found.runs] == [("backbone",), ()]
    assert found.runs[0].name == "backbone-one_seed-0"
    assert list(found.steps) == ["one"] and found.steps["one"].script == str(tmp_path / "make.py")


def test_a_step_brings_those_that_it_builds_on(tmp_path: Path) -> None:
    text = """
    clients = 2
    [set]
    backbone = "prepared:second"
    [prepare.second]
    call = "a:b"
    arguments = { start = "prepared:first" }
    [prepare.first]
    call = "a:c"
    arguments = { strength = 0.1 }
    """
    found = plan(text, tmp_path)
    assert list(found.steps) == ["first", "second"]
    before, after = (runner.recipes(plan(t, tmp_path), tmp_path) for t in (text, text.replace("0.1", "0.2")))
    assert before["second"]["step"] == after["second"]["step"], "the folder's name is the same"
    assert before["second"] != after["second"]
    for wrong, told in (("prepared:second", "builds on itself"), ("prepared:zero", r"there is no \[prepare.zero\]")):
        with pytest.raises(SettingsError, match=told):
            plan(text.replace("prepared:first", wrong), tmp_path)


def test_runs_that_stand_on_a_step_that_changed_are_not_taken_for_these(tmp_path: Path) -> None:
    text = 'clients = 2\n[set]\nbackbone = "prepared:one"\n[prepare.one]\ncall = "a:b"\narguments = { strength = 0.1 }'
    sweep, output = plan(text, tmp_path), tmp_path / "out"
    folder = runner.folder_of(output, sweep.runs[0])
    folder.mkdir(parents=True)
    (folder / "launch.json").write_text(json.dumps({"run_config": sweep.runs[0].settings}))
    runner.check_folders(sweep, output, STANDARD)
    runner.note_of(output, "one").parent.mkdir()
    runner.note_of(output, "one").write_text(json.dumps(runner.recipes(sweep, output)["one"]))
    runner.check_folders(sweep, output, STANDARD)
    with pytest.raises(SettingsError, match=r"stands on another \[prepare.one\]"):
        runner.check_folders(plan(text.replace("0.1", "0.9"), tmp_path), output, STANDARD)


def test_a_preset_has_no_seed_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("expected-clients = 2\nseed = 7\n")
    for text in ('preset = "mine.toml"', 'clients = 2\n[variants.a]\npreset = "mine.toml"'):
        with pytest.raises(SettingsError, match="preset 'mine.toml' has seed = 7"):
            plan(text, tmp_path)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("name", reproduce.names())
def test_every_study_is_valid_at_every_scale(name: str, scale: Scale) -> None:
    file = spec.parse(reproduce.load(name, scale), name)
    known = set(plugins("methods")), set(plugins("tasks"))
    wanted = [str(table.get(key, "")) for table in file.variants.values() for key in ("method", "task")]
    awaited = {value for value in wanted if value and value not in known[0] | known[1]}
    source = reproduce.FOLDER / f"{name}.toml"
    try:
        found = expand(
            file, source=source, output=Path("/out"), defaults=STANDARD, load_preset=presets.load, here=False
        )
    except SettingsError as error:
        lines = [line for line in str(error).splitlines() if not any(f"= {value!r}" in line for value in awaited)]
        assert lines == []
        pytest.skip(f"waits for {', '.join(sorted(awaited))}")
    assert found.runs and (scale == Scale.SMOKE or len({run.seed for run in found.runs}) == 3)


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match="table2: no such study .*table1-language"):
        reproduce.load("table2", Scale.SMOKE)


# The tables, from figures written down here.


def results(values: Sequence[float], personal: float, source: str = "server", **more: Any) -> dict[str, Any]:
    """results.json of a run whose word perplexity was ``values`` after each round."""
    state = {"frozen": {"word_perplexity": 200.0}, "global": {"word_perplexity": values[-1] + 10}}
    state["personal"] = {"word_perplexity": personal}
    rounds = [
        {
            "round": n + 1,
            "metrics": {"word_perplexity": v} if source == "server" else None,
            "uplink_bytes": 1000,
            "downlink_bytes": 1500,
            "seconds": 2.0,
        }
        for n, v in enumerate(values)
    ]
    metrics = {"word_perplexity": values[-1]} if source == "server" else state["personal"]
    final = {"metrics": metrics, "source": source, "personal": state, "uplink_bytes_per_client_round": 500}
    return {
        "task": "language",
        "status": "completed",
        "frozen": {"word_perplexity": 150.0},
        "rounds": rounds,
        "final": final,
        "personal": [{"client": 0, "examples": 30, **state}],
        "signs": [],
    } | more


TABLE = """
clients = 2
[variants.a]
[variants.b]
[variants.own]
method = "local-only"
[grid]
seed = [0, 1, 2]
[target]
metric = "word_perplexity"
value = 100.0
"""


def gathered(sweep: Sweep, found: Mapping[str, Sequence[dict[str, Any] | None]]) -> list[Row]:
    """Rows from results.json by variant and seed; None: the run failed."""
    made = []
    for run in sweep.runs:
        one = found[str(run.point["variant"])][run.seed]
        made.append(records.read(run, one, sweep.target) if one else Record(run, "failed", "disk full"))
    return rows_of(made)


@pytest.fixture
def sweep() -> Sweep:
    return plan(TABLE)


@pytest.fixture
def rows(sweep: Sweep) -> list[Row]:
    return gathered(
        sweep,
        {
            "a": [results([120, 99, 90], 80), results([110, 105, 100], 85), results([100, 98, 95], 90)],
            "b": [results([140, 120, 105], 80), results([140, 99, 107], 85), None],
            "own": [results([300, 300, 300], p, source="clients") for p in (70.0, 75.0, 80.0)],
        },
    )


def cells(lines: Sequence[str], first: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def test_means_and_deviations_over_the_seeds(rows: list[Row]) -> None:
    found = rows[0].spread("server_word_perplexity")
    assert found == Spread(95.0, 5.0, 3), "n - 1: the deviation of 90, 95 and 100 is 5"
    assert spread([3.0]) == Spread(3.0, None, 1)
    assert rows[1].spread("clients_personal_word_perplexity") == Spread(82.5, pytest.approx(3.5355, rel=1e-4), 2)
    assert rows[0].spread("uplink_bytes") == Spread(3000, 0.0, 3) and rows[0].spread("seconds") == Spread(6.0, 0.0, 3)
    assert rows[0].spread("downlink_bytes") == Spread(4500, 0.0, 3)


def test_server_and_clients_never_share_a_column(sweep: Sweep, rows: list[Row]) -> None:
    assert rows[2].spread("server_word_perplexity") is None
    lines = markdown.table_of(sweep, rows)
    head, own = cells(lines, "variant"), cells(lines, "own")
    at = {name: number for number, name in enumerate(head)}
    assert own[at["word perplexity, server's test set"]] == "–"
    assert own[at["word perplexity, clients' hold-outs, personal"]] == "75 ± 5"
    assert own[at["rounds to word_perplexity 100".replace("_", " ")]] == "not measured"
    assert any("No global model on the server's test set: own" in line for line in markdown.notes(sweep, rows))


def test_a_client_s_own_model_is_no_rival_of_global_ones(sweep: Sweep) -> None:
    seeds = {name: [results([n + i, n + i], n + i) for i in range(3)] for name, n in (("a", 100), ("b", 200))}
    own = [results([float(i), float(i)], float(i), source="clients") for i in range(3)]
    lines = markdown.table_of(sweep, gathered(sweep, {**seeds, "own": own}))
    at = {name: number for number, name in enumerate(cells(lines, "variant"))}
    shared, personal = (at[f"word perplexity, clients' hold-outs, {state}"] for state in ("global", "personal"))
    assert cells(lines, "a")[shared].startswith("**") and not cells(lines, "own")[shared].startswith("**")
    assert cells(lines, "own")[personal].startswith("**")


def test_seeds_that_diverged_are_counted_and_never_win(sweep: Sweep) -> None:
    wild = results([90.0, 80.0], 70.0)
    wild["rounds"][-1] |= {"metrics": None, "not_finite": ["word_perplexity"]}
    wild["final"]["metrics"] = None
    seeds = {"a": [results([1.0, 1.0], 1.0), results([2.0, 2.0], 1.0), wild], "b": [results([50.0, 50.0], 1.0)] * 3}
    lines = markdown.table_of(sweep, gathered(sweep, {**seeds, "own": [None] * 3}))
    assert cells(lines, "a")[1] == "1.5 ± 0.7071 (2 of 3 seeds)"


def test_the_set_up_names_what_the_file_sets() -> None:
    told = dict(
        markdown.setup(plan("clients = 2\n[set]\nlora.rslora = true\n[variants.a]\npartition.max-examples = 3"))
    )
    assert told["lora.rslora"] == "true" and told["partition.max-examples"] == "3"


def test_centralised_training_has_no_uplink_to_compare(tmp_path: Path) -> None:
    file = 'clients = 2\n[grid]\nmethod = ["fedgen-edge", "centralized"]'
    sweep = plan(file)
    rows = rows_of([records.read(run, results([3.0, 2.0], 1.0), None) for run in sweep.runs])
    lines = markdown.table_of(sweep, rows)
    at = cells(lines, "method").index("uplink in all")
    assert cells(lines, "fedgen-edge")[at : at + 2] == ["2.0 kB", "3.0 kB"]
    assert cells(lines, "centralized")[at : at + 2] == ["–", "–"]
    assert [one.curve.uplink for row in rows for one in row.done if one.curve] == [(1000, 2000), ()]
    assert len(plots.draw(sweep, rows, tmp_path)) == 3


def test_the_target_is_a_number_only_where_every_seed_got_there(sweep: Sweep, rows: list[Row]) -> None:
    assert rows[0].target() == ("", Spread(2.0, 1.0, 3))
    assert rows[1].target() == ("not reached by 1 of 2", None)
    never = gathered(sweep, dict.fromkeys("ab", [results([150, 140], 1.0)] * 3) | {"own": [None] * 3})
    assert never[0].target() == ("not reached", None) and never[2].target() == ("not measured", None)


def test_the_frozen_backbone_is_a_row(sweep: Sweep, rows: list[Row]) -> None:
    lines = markdown.table_of(sweep, rows)
    line = cells(lines, "frozen backbone")
    assert line[1] == "150 ± 0" and line[2] == "200 ± 0" and line[-1] == "3"
    assert lines.index(next(x for x in lines if x.startswith("| frozen"))) == 2, "above the rows"


def test_clusters_have_a_rand_index_and_kid_by_class(sweep: Sweep) -> None:
    def clustered(rand: float, kid: float) -> dict[str, Any]:
        one = results([100.0], 80.0, clustering={"adjusted_rand": rand})
        one["final"]["personal"]["global"]["kid_by_class"] = {"bag": kid, "coat": 2.0}
        return one

    seeds = {"a": [clustered(0.5, 3.0), clustered(1.0, 5.0), clustered(0.9, 4.0)], "b": [results([100.0], 80.0)] * 3}
    lines = markdown.table_of(sweep, found := gathered(sweep, {**seeds, "own": [None] * 3}))
    at = {name: number for number, name in enumerate(cells(lines, "variant"))}
    index, kid = at["adjusted Rand index of the clusters"], at["KID of bag, clients' hold-outs, global"]
    assert cells(lines, "a")[index] == "0.80 ± 0.26" and cells(lines, "b")[index] == "–"
    assert cells(lines, "a")[kid] == "4 ± 1" and found[0].spread("adjusted_rand") is not None
    assert not any("Rand" in line for line in markdown.notes(sweep, found))
    of = plan(TABLE.replace("[variants.a]", '[variants.a]\nclusters.by = "oracle"'))
    assert any("1 is the truth" in line for line in markdown.notes(of, gathered(of, {**seeds, "own": [None] * 3})))


def test_frozen_backbones_that_differ_are_rows_of_their_own(sweep: Sweep) -> None:
    stale = {"frozen": {"word_perplexity": 180.0}}
    found = gathered(
        sweep,
        {
            "a": [results([100], 80)] * 3,
            "b": [results([110], 80, **stale)] * 3,
            "own": [results([105], 80)] * 3,
        },
    )
    lines = markdown.table_of(sweep, found)
    assert cells(lines, "frozen backbone of a and own")[1] == "150 ± 0"
    assert cells(lines, "frozen backbone of b")[1] == "180 ± 0"


def test_bold_only_beyond_the_spread() -> None:
    clear = {1: Spread(10.0, 1.0, 3), 2: Spread(13.0, 1.0, 3)}
    assert markdown.best_of(clear) == 1
    assert markdown.best_of(clear | {2: Spread(13.0, 2.5, 3)}) is None, "10 + 1 reaches 13 - 2.5"
    assert markdown.best_of({1: Spread(10.0, None, 1), 2: Spread(99.0, None, 1)}) is None, "one seed has no spread"
    assert markdown.best_of({1: Spread(10.0, 1.0, 3)}) is None


def test_the_bound_is_never_bold(sweep: Sweep) -> None:
    figures = {"a": [results([v], v) for v in (90.0, 91.0, 92.0)], "b": [results([v], v) for v in (60.0, 61.0, 62.0)]}
    found = gathered(sweep, figures | {"own": [results([v], v) for v in (120.0, 121.0, 122.0)]})
    assert "**61 ± 1**" in cells(markdown.table_of(sweep, found), "b")
    for record in found[1].records:
        record.run.settings["method"] = "centralized"
    lines = markdown.table_of(sweep, found)
    assert "61 ± 1" in cells(lines, "b") and "**91 ± 1**" in cells(lines, "a")


def test_other_axes_make_tables_of_their_own() -> None:
    two = plan(BASE + "[[exclude]]\nseed = 1\n")
    two = replace(two, rows=("lora.rank",))
    found = rows_of([records.read(run, results([90.0], 80.0), None) for run in two.runs])
    assert [(title, len(part)) for title, part in markdown.sections(two, found)] == [
        ("partition.alpha 0.3", 2),
        ("partition.alpha 1", 2),
    ]


def test_extractors_never_share_a_table(sweep: Sweep) -> None:
    def images(features: str) -> dict[str, Any]:
        found = results([20.0], 1.0, task="diffusion")
        found["final"]["metrics"] = {"fid": 20.0, "features": features, "samples": 500}
        return found

    found = gathered(sweep, {"a": [images("inception")] * 3, "b": [images("small")] * 3, "own": [images("small")] * 3})
    parts = markdown.sections(sweep, found)
    assert [[str(row.point["variant"]) for row in part] for _, part in parts] == [["a"], ["b", "own"]]
    assert "n 500, inception" in parts[0][0] and "n 500, small" in parts[1][0]


def test_all_is_written_and_a_gap_is_named(sweep: Sweep, rows: list[Row], tmp_path: Path) -> None:
    every = [record for row in rows for record in row.records]
    tables.write_runs(tmp_path / "runs.csv", sweep, every)
    tables.write_rows(tmp_path / "table.csv", sweep, rows)
    drawn = plots.draw(sweep, rows, tmp_path)
    markdown.write(tmp_path / "table.md", sweep, rows, command="fedgen sweep s.toml", plots=drawn, jobs=2, threads=1)
    runs = list(csv.DictReader((tmp_path / "runs.csv").open(encoding="utf-8")))
    assert len(runs) == 9 and [r["status"] for r in runs].count("failed") == 1
    assert float(runs[0]["server_word_perplexity"]) == 90.0 and runs[-1]["server_word_perplexity"] == ""
    table = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert [row["variant"] for row in table] == ["a", "b", "own"]
    assert float(table[0]["server_word_perplexity_sd"]) == 5.0 and table[1]["server_word_perplexity_n"] == "2"
    assert table[2]["server_word_perplexity_mean"] == "" and table[2]["final_source"] == "clients"
    assert table[1]["rounds_to_target_mean"] == "" and table[1]["rounds_to_target"] == "not reached by 1 of 2"
    assert table[1]["missing"] == "b_seed-2"
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "- b_seed-2: failed: disk full" in text and "fedgen sweep s.toml" in text and "| 2 of 3 |" in text
    for _, name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    assert {"against-rounds.png", "against-bytes.png", "personal-gain.png"} <= {name for _, name in drawn}


def test_a_curve_along_every_numeric_axis(tmp_path: Path) -> None:
    found = plan(BASE)
    made = rows_of([records.read(run, results([90.0 + run.seed], 80.0), None) for run in found.runs])
    names = [name for _, name in plots.draw(found, made, tmp_path)]
    assert {"along-lora.rank.png", "along-partition.alpha.png"} <= set(names)
    assert not {"against-rounds.png", "against-bytes.png"} & set(names)  # measured once, with the same bytes


def test_one_measurement_is_drawn_against_bytes_where_these_differ(tmp_path: Path) -> None:
    found = plan("clients = 2\n[grid]\nlora.rank = [2, 4]")

    def sent(rank: int) -> dict[str, Any]:
        one = results([90.0], 80.0)
        one["rounds"][0]["uplink_bytes"] = 1000 * rank
        return one

    made = rows_of([records.read(run, sent(int(run.point["lora.rank"])), None) for run in found.runs])
    assert "against-bytes.png" in {name for _, name in plots.draw(found, made, tmp_path)}


def test_training_loss_is_drawn_where_rounds_are_counted_by_it(tmp_path: Path) -> None:
    text = 'clients = 2\n[grid]\nlora.rank = [2, 4]\n[target]\nmetric = "{}"\nvalue = 90.0\n'
    for metric, drawn in (("train_loss", True), ("word_perplexity", False)):
        found = plan(text.format(metric))
        one = results([90.0, 80.0], 80.0)
        for number, loss in enumerate((100.0, None)):
            one["rounds"][number]["train_loss"] = loss
        made = rows_of([records.read(run, one, found.target) for run in found.runs])
        assert made[0].records[0].losses == {1: 100.0}
        assert ("train-loss.png" in {name for _, name in plots.draw(found, made, tmp_path)}) == drawn


def test_gains_stand_side_by_side_where_all_clients_have_as_many_examples(tmp_path: Path) -> None:
    found = plan("clients = 2\n[grid]\nlora.rank = [2, 4]")
    for counts, against in (((10, 10), False), ((10, 20), True)):
        one = results([90.0], 80.0)
        state = {"word_perplexity": 2.0}
        one["personal"] = [
            {"client": client, "examples": count, "frozen": state, "global": state, "personal": state}
            for client, count in enumerate(counts)
        ]
        one["final"]["personal"] = dict.fromkeys(("frozen", "global", "personal"), state)
        made = rows_of([records.read(run, one, None) for run in found.runs])
        titles = [title for title, name in plots.draw(found, made, tmp_path) if name == "personal-gain.png"]
        assert [("against" in title) for title in titles] == [against]


def test_signs_stand_once_for_each_point(sweep: Sweep) -> None:
    swings = results([90.0], 80.0, signs=["unstable aggregation: 18%; do this"])
    found = gathered(
        sweep, {"a": [swings, results([90.0], 80.0), swings], "b": [results([90.0], 1.0)] * 3, "own": [None] * 3}
    )
    assert markdown.signs(sweep, found) == ["- a (in 2 of 3 runs): unstable aggregation: 18%; do this"]


def test_a_gain_has_no_ratio_of_kid() -> None:
    (run,) = plan("clients = 2").runs
    found = results([1.0], 1.0)
    state = {"kid": -0.01, "denoising_loss": 0.2}
    found["final"]["personal"] = {"frozen": state, "global": state, "personal": {"kid": 0.01, "denoising_loss": 0.1}}
    found["personal"] = []
    assert records.read(run, found, None).figures["personal_gain"] == 0.5


def test_runs_with_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    sweep = plan("clients = 2\n[grid]\nlora.rank = [2]", tmp_path)
    folder = runner.folder_of(tmp_path / "out", sweep.runs[0])
    folder.mkdir(parents=True)

    def launched(**changes: Value) -> None:
        config = sweep.runs[0].settings | changes | {"output-dir": "/elsewhere", "resume-from": "/elsewhere"}
        (folder / "launch.json").write_text(json.dumps({"run_config": config}))

    launched()
    runner.check_folders(sweep, tmp_path / "out", STANDARD)
    launched(**{"batch-size": 99})
    with pytest.raises(SettingsError, match="batch-size = 8, but the run there has 99"):
        runner.check_folders(sweep, tmp_path / "out", STANDARD)


def test_a_run_that_has_begun_is_resumed() -> None:
    (run,) = plan("clients = 2\n[set]\nlora.rslora = true").runs
    asked = runner.arguments_of(run, Path("/no/such"), "in-process", ROOT, STANDARD)
    assert asked[:2] == ["run", str(ROOT)] and "--set=lora.rslora=true" in asked and "--set=expected-clients=2" in asked
    assert not any("lora.rank" in one for one in asked), "defaults are not repeated"


def test_a_target_may_be_what_clients_had_while_they_trained() -> None:
    found = results([120.0, 99.0, 90.0], 80.0)
    for entry, loss in zip(found["rounds"], (None, 0.7, 0.6), strict=True):
        entry |= {"train_loss": loss, "metrics": None}  # of a method without a global model
    sweep = plan("clients = 2\n[target]\nmetric = 'train_loss'\nvalue = 0.65")
    assert any("while they trained" in line for line in markdown.notes(sweep, []))
    (run,) = sweep.runs
    reached = [records.read(run, found, Target(metric="train_loss", value=value)) for value in (0.65, 0.5)]
    assert [record.reached for record in reached] == [True, False] and reached[0].figures["rounds_to_target"] == 3


def test_a_target_counts_measured_rounds_alone() -> None:
    found = results([120.0, 99.0, 90.0], 80.0)
    found["rounds"][1]["metrics"] = None
    (run,) = plan("clients = 2").runs
    assert records.read(run, found, Target(metric="word_perplexity", value=100.0)).figures["rounds_to_target"] == 3
