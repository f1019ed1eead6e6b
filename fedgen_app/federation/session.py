"""A run on the server's side: opened new or resumed, written down as it goes, closed with a status in any case."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from fedgen_app.errors import CheckpointError, RunError, SettingsError
from fedgen_app.federation import clustering
from fedgen_app.federation.client import run_folder
from fedgen_app.federation.clustering import Numbers
from fedgen_app.federation.groups import Groups
from fedgen_app.federation.method import ClientId, GlobalState, Method, lora_of
from fedgen_app.federation.resuming import newest_checkpoint, same_run
from fedgen_app.federation.roster import Roster, in_order
from fedgen_app.federation.summary import clusters_of, keep_clusters
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter, merged
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.export import card, exported_file, load_peft, save_peft, shape_row, span, usage_of
from fedgen_app.learning.task import Examples, Metrics, Sample, Task
from fedgen_app.runs import report, signs
from fedgen_app.runs.folder import Checkpoint, RunFolder, read_json
from fedgen_app.runs.personal import load_kept
from fedgen_app.settings import Settings, shown_source

# Called with every event of a run in this process; the command line adds its display here.
listeners: list[Callable[[Mapping[str, Any]], None]] = []
SAMPLED_CLIENTS = 2
SAMPLED_CLUSTERS = 8


def new_name(settings: Settings) -> str:
    """``<time>-<task>-<method>-<random>``: a plain name that tells nothing of this machine."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{settings.task}-{settings.method}-{secrets.token_hex(3)}"


class Session:
    """What the ServerApp writes down; see ``Session.open``."""

    def __init__(self, settings: Settings, name: str, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
        self.settings = settings
        self.name = name
        self.folder = folder
        self.checkpoint = checkpoint
        self.completed = False
        self.groups = Groups.single(GlobalState({}))  # after the last round that was saved
        self._kinds: Mapping[ClientId, str] = {}
        self.unplaced: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = list(checkpoint.facts["history"]) if checkpoint else []
        self.frozen: Metrics | None = checkpoint.facts["frozen"] if checkpoint else None
        self.left_out: list[dict[str, Any]] = []
        self.results: dict[str, Any] = report.opening(settings.task, settings.method, name)

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: Settings) -> Iterator[Session]:
        """Open the run folder, go on from its newest checkpoint where ``resume-from`` names one.

        Raises:
            SettingsError: the folder holds another run already.
            CheckpointError: the checkpoint is damaged.
        """
        resumed = bool(settings.resume_from)
        name = new_name(settings)
        path = run_folder(settings, name)
        if not resumed and (path / "settings.json").exists():
            raise SettingsError(f"output-dir = {str(path)!r}: holds a run already; to go on: fedgen resume {path}")
        before = read_json(path / "results.json") if resumed and (path / "results.json").exists() else {}
        name = before.get("run", name)
        with RunFolder(path, settings.keep_checkpoints) as folder:
            if before.get("status") == "completed" and not settings.resume_round:
                session = cls(settings, name, folder, None)
                session.completed = True
                yield session
                return
            if resumed:
                same_run(path, settings)  # before newest_checkpoint, which removes what the user goes back behind
            session = cls(settings, name, folder, newest_checkpoint(path, settings) if resumed else None)
            if not resumed:
                folder.write_settings(settings.flat())
                folder.write_results(session.results)
            try:
                yield session
            except BaseException as error:
                session._close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
                raise

    def _close(self, status: str, reason: str) -> None:
        self.results |= {"status": status, "reason": reason}
        with contextlib.suppress(RunError, OSError):  # a full disk: the error that ended the run is the one to show
            self.event("end", status=status, reason=reason)
            self.folder.write_results(self.results)

    def event(self, kind: str, **fields: object) -> None:
        """Append to events.jsonl, and say it where a person reads along."""
        self.folder.event(kind, **fields)
        if kind == "left-out":
            self.left_out.append({key: fields[key] for key in ("client", "node", "reason")})
        if kind == "unplaced":
            self.unplaced.append({key: fields[key] for key in ("client", "reason")})
        if kind == "round":
            self.folder.write_results(self.results)
        for listener in listeners:
            listener({"event": kind, **fields})
        if text := report.line({"event": kind, **fields}):
            log(INFO, text)

    def begin(self, task: Task, method: Method, backbone: Backbone, test: Examples | None) -> None:
        """Make or restore the state, and say in results.json what the run stands on.

        Raises:
            CheckpointError: the run was made with another backbone, or measured in another way.
            SettingsError: a setting does not suit the backbone.
            AdapterError: ``lora.init`` does not fit.
        """
        self._task, self._method, self._backbone = task, method, backbone
        if self.checkpoint is None:
            init, seed = self.settings.lora.init, self.settings.seed
            self.groups = Groups.single(GlobalState(load_peft(Path(init), backbone) if init else backbone.fresh(seed)))
        else:
            self.groups = Groups.restored(self.checkpoint.parts, self.checkpoint.facts)
            made = self.checkpoint.facts["fingerprint"]
            if made != backbone.fingerprint:
                raise CheckpointError(f"the run was made with backbone {made}, this one is {backbone.fingerprint}")
        if self.settings.clusters.by == "loss" and task.train is not None:
            raise SettingsError(
                f"clusters.by = 'loss': the losses of task = {self.settings.task} do not say what suits"
            )
        task.check(self.settings, backbone, test, self.frozen)
        size = sum(tensor.numel() for tensor in self.groups.shared.adapter.values())
        rank = self.settings.lora.rank if method.weights == "adapter" else None
        self.results |= report.foundation(backbone, rank, size)
        self.results |= {"rounds": self.history, "frozen": self.frozen, "left_out": self.left_out}
        self.folder.write_results(self.results)

    def keep_frozen(self, metrics: Metrics) -> None:
        """The frozen backbone's metrics on the server's test set."""
        self.frozen = self.results["frozen"] = metrics
        self.folder.write_results(self.results)
        self.event("frozen", metrics=metrics)

    def save(self, number: int, groups: Groups, history: Sequence[Mapping[str, Any]]) -> None:
        """Checkpoint after a round, and the rounds so far in results.json."""
        facts = {
            "run": self.name,
            "fingerprint": self._backbone.fingerprint,
            "frozen": self.frozen,
            "history": list(history),
            **groups.facts(),
        }
        self.folder.save_checkpoint(number, groups.parts(), facts)
        self.results["rounds"] = list(history)
        self.folder.write_results(self.results)
        every = self.settings.samples.every
        if every and number % every == 0 and self.settings.samples.count:
            target, own = self.folder.path / "samples" / f"round-{number:04d}", f"state/round-{number:04d}.safetensors"
            self._sample(target, groups, history[-1]["clients"], own)
        self.groups = groups

    def keep_personal(self, entries: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
        """The clients' own metrics, and who could not be used."""
        self.results |= {"personal": entries, "personal_rejected": rejected}
        self.event("personal", clients=len(entries))

    def plot_ownership(self, roster: Roster) -> None:
        """partition.png: who owns what; in a simulation only, as nobody knows it elsewhere."""
        if not roster.simulated:
            return
        from fedgen_app.data.partition import plot_partition

        split = self._task.split(self.settings, self._backbone, roster.simulated)
        with _written(self.folder.path / "partition.png") as file:
            plot_partition(split, file)
        alpha = self.settings.partition.alpha if split.by in ("label", "topic") else None
        self.results["partition"] = {"by": split.by, "alpha": alpha, "clients": roster.simulated}
        self._kinds = dict(split.mostly()) if split.labels else {}

    def count_skipped(self, roster: Roster, test: Examples | None) -> None:
        """How many records could not be read: to train on (on devices client by client too), and to test on."""
        self._roster, self._test = roster, test
        members = {str(client): roster.members[client].skipped for client in in_order(roster.members)}
        of = {client: count for client, count in members.items() if count}
        total = max(of.values(), default=0) if roster.simulated else sum(of.values())
        by_client = {} if roster.simulated else of
        self.results["data"] = {
            "skipped": total,
            "skipped_by_client": by_client,
            "skipped_test": test.skipped if test else 0,
        }

    def truth(self) -> Mapping[ClientId, str]:
        """What each simulated client's data mostly is.

        Raises:
            SettingsError: nobody knows: these are devices, or the data has neither labels nor topics.
        """
        if not self._kinds:
            raise SettingsError("clusters.by = 'oracle': for simulations alone, of data with labels or topics")
        return self._kinds

    def draw_clusters(
        self,
        where: Mapping[ClientId, int],
        clients: Sequence[ClientId],
        products: Numbers,
        later: Collection[ClientId] = (),
    ) -> None:
        """clusters/map.png: the clients that were compared in a plane, and who came ``later`` with another mark."""
        file = self.folder.path / "clusters" / "map.png"
        with _written(file.parent) as folder:
            folder.mkdir(exist_ok=True)
        shown = f"{len(clients)} of {len(where)}" if len(clients) < len(where) else len(clients)
        title = f"{shown} clients by {self.settings.clusters.by}"
        places, points = [where[client] for client in clients], clustering.plane(products)
        with _written(file):
            clustering.draw_map(clients, places, points, title, file, later)

    def finish(self, groups: Groups) -> None:
        """Export the global adapter and the clusters', generate samples, write the results."""
        self.count_skipped(self._roster, self._test)  # again: newcomers came meanwhile
        self.results["final"] = report.final(self.results)
        self.results["signs"] = signs.signs(self.results)
        final, facts, path = self.results["final"], self._facts(), self.folder.path
        own = (final["personal"] or {}).get("frozen")  # the clients' hold-outs, where the server has no test set
        frozen = self.frozen if final["source"] == "server" else own
        measured = {"frozen": frozen or {}, "global": final["metrics"] or {}}
        if groups.clustered:
            self.results |= clusters_of(groups, self.results["personal"], self.settings, self.unplaced, self._kinds)
            keep_clusters(path / "clusters", groups)
        if self._method.has_global:
            self._export(path / "global", "global adapter", groups.shared, facts, measured)
            for entry in self.results.get("clusters", ()):
                state = groups.states[entry["cluster"]]
                of_it = facts | {"clients in this cluster": str(len(entry["clients"]))}
                seen = {kind: entry[kind] or {} for kind in ("frozen", "metrics")}
                title = f"adapter of cluster {entry['cluster']}"
                self._export(path / "clusters" / str(entry["cluster"]), title, state, of_it, seen)
        if self.settings.samples.count:
            clients = [entry["client"] for entry in self.results["personal"]]
            self._sample(path / "samples", groups, clients, "")
        self.results["status"] = "completed"
        state = groups.shared
        residual = {f"residual/{key}": tensor for key, tensor in state.residual.items()}
        self.results["adapter"]["sha256"] = adapters.digest(state.adapter | residual)
        self.folder.write_results(self.results)
        self.event("end", status="completed", reason="")

    def _export(
        self, folder: Path, title: str, state: GlobalState, facts: Mapping[str, str], measured: Mapping[str, Metrics]
    ) -> None:
        task, backbone = self._task, self._backbone
        note = _origin(self._method)
        whole = merged(state.adapter, state.residual, lambda rank: lora_of(self.settings).at(rank).scaling)
        rows = {**facts, **shape_row(self.settings, whole)}
        usage = usage_of(task, self.settings, backbone)
        save_peft(folder, backbone, whole, card(backbone, self.settings, title, note, rows, measured, usage))
        task.export(folder, backbone, whole)

    def _facts(self) -> dict[str, str]:
        s, final = self.settings, self.results["final"]
        clients = in_order({c for r in self.history for c in r["clients"]})
        uplink = final["uplink_bytes_per_client_round"]
        sent = "-" if uplink is None else f"{uplink} bytes, {final['uplink_reduction']:.2%} less than the full model"
        return {
            "data": shown_source(s.dataset) or "the devices' own",
            "split": report.split_line(self.results.get("partition")),
            "clients that took part": str(len(clients)),
            "rounds": f"{len(self.history)}, fraction {s.fraction_train:g} of the clients in each",
            "local training": f"{span(s.local_epochs, s.max_steps)}, batch {s.batch_size * s.accumulate}, "
            f"learning rate {s.learning_rate:g}",
            "uplink per client and round": sent,
            "measured on": "the server's test set" if final["source"] == "server" else "the clients' own hold-outs",
        }

    def _sample(self, target: Path, groups: Groups, clients: Sequence[ClientId], own: str) -> None:
        """Generate with no adapter, the global one, the clusters' and some clients' own, into the folder ``target``.

        Args:
            own: Which file of a client's folder holds its adapter; "": its exported one, with the residual in it.
        """
        task, backbone, options = self._task, self._backbone, self.settings.samples
        texts = [t for t in task.prompts(self.settings, backbone)[: options.count] for _ in range(options.per_prompt)]
        samples: dict[str, Sequence[Sample]] = {}

        def draw(name: str, adapter: Adapter, residual: Adapter | None) -> None:
            adapters.write(backbone.model, adapter, residual)
            samples[name] = task.sample(self.settings, backbone, texts, self.settings.seed)

        with backbone.model.disable_adapter():
            samples["frozen"] = task.sample(self.settings, backbone, texts, self.settings.seed)
        if self._method.has_global:
            draw("global", groups.shared.adapter, groups.shared.residual)
            for cluster in sorted(groups.states)[:SAMPLED_CLUSTERS] if groups.clustered else ():
                draw(f"cluster-{cluster}", groups.states[cluster].adapter, groups.states[cluster].residual)
        for client in clients[:SAMPLED_CLIENTS]:
            folder = self.folder.path / "clients" / str(client)
            file = folder / own if own else exported_file(folder)
            if file.exists():  # on a device a client's adapters are not here
                # Of a round: with the residual that the client trained beside; the next one holds its share already.
                draw(
                    f"client-{client}", load_kept(file).adapter, self.groups.state_of(client).residual if own else None
                )
        task.save_samples(target, samples)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Raise RunError where the file or folder cannot be written: a full disk."""
    try:
        yield path
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _origin(method: Method) -> str:
    if method.pooled:
        return "Trained in one place on the data of all simulated clients: no federation, a reference for one."
    what = "all weights" if method.weights == "model" else "LoRA adapters"
    return f"Trained by federated averaging of {what}: the data stayed on the clients."
