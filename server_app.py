"""The ServerApp: settings, backbone, roll call, rounds, personalisation, results."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedgen_app.federation.compatibility import check_method
from fedgen_app.federation.hierarchy import Hierarchy
from fedgen_app.federation.method import lora_of
from fedgen_app.federation.placement import Placement
from fedgen_app.federation.roster import Roster
from fedgen_app.federation.session import Session
from fedgen_app.federation.strategy import FedLora
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.task import Metrics
from fedgen_app.settings import check

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation from the last checkpoint, or from the start, to the exported adapters."""
    settings = check(context.run_config)
    with Session.open(settings) as run:
        if run.completed:
            return
        task, method = load_task(settings.task), check_method(settings)
        backbone = open_backbone(settings, weights=method.weights)
        test = task.load_test(settings, backbone) if settings.evaluate_every else None
        run.begin(task, method, backbone, test)

        def evaluate(number: int, arrays: ArrayRecord) -> Metrics | None:
            if test is None or not method.has_global:
                return None
            state = strategy.state  # the arrays are its adapter alone, without the residual
            adapters.write(backbone.model, state.adapter, state.residual)
            return task.evaluate(settings, backbone, test, settings.seed)

        if test is not None and run.frozen is None:
            with backbone.model.disable_adapter():
                run.keep_frozen(task.evaluate(settings, backbone, test, settings.seed))

        rank = 0 if method.fit or method.weights == "model" else settings.lora.rank
        roster = Roster(backbone.fingerprint, settings.expected_clients, settings.round.roll_call, run.event, rank)
        roster.call(grid)
        run.plot_ownership(roster)
        run.count_skipped(roster, test)

        placement = Placement(settings, method, roster, run.truth, run.event, run.draw_clusters)
        strategy = FedLora(
            settings=settings,
            method=method,
            lora=lora_of(settings),
            roster=roster,
            hierarchy=Hierarchy(settings, method, lora_of(settings), run.groups, placement),
            history=run.history,
            layout=backbone.layout,
            run_name=run.name,
            save=run.save,
            report=run.event,
        )
        strategy.start(grid, evaluate_fn=evaluate)
        clustered = strategy.hierarchy.groups.clustered
        unmeasured = test is None or not method.has_global or clustered
        if settings.personal.epochs or (settings.evaluate_every and unmeasured):
            run.keep_personal(*strategy.personalise(grid, task.client_metrics(settings, backbone)))
        run.finish(strategy.hierarchy.groups)
