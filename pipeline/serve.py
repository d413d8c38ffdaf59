"""Serve the deployment `ca-lora/local`: `python -m pipeline.serve RUNS`, started by `make ui`."""

import sys
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as Types
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from pipeline.checkout import sweep
from pipeline.flow import ca_lora
from pipeline.settings import ROOT

UNDER_WAY = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def as_it_was() -> dict[str, Any]:
    """What was set in the UI, to be said again: a deployment that is served without a word on its schedules loses them."""
    with get_client(sync_client=True) as client:
        try:
            before = client.read_deployment_by_name(f"{ca_lora.name}/local")
        except ObjectNotFound:
            return {}
    kept = [one.model_dump(include=set(DeploymentScheduleCreate.model_fields)) for one in before.schedules]
    return {"schedules": [DeploymentScheduleCreate(**one) for one in kept], "paused": before.paused}


def end_orphans() -> None:
    """Say of the runs that were under way when the last `make ui` ended that they ended too, and remove their checkouts."""
    wanted = FlowRunFilter(state=FlowRunFilterState(type=Types(any_=UNDER_WAY)))
    ours = DeploymentFilter(name=DeploymentFilterName(any_=["local"]))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours):
            kind = Cancelled if run.state_type == StateType.CANCELLING else Crashed
            told = "Ended with the server. Started again with the same settings, it goes on."
            client.set_flow_run_state(run.id, kind(message=told), force=True)
    sweep(ROOT)


if __name__ == "__main__":
    end_orphans()
    ca_lora.serve(
        "local",
        limit=int(sys.argv[1]),
        pause_on_shutdown=False,
        print_starting_message=False,
        tags=["dvc"],
        **as_it_was(),
    )
