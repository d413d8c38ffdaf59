"""Serve the deployment `ca-lora/local`: `python -m pipeline.serve RUNS`, started by `make ui`."""

import sys

from prefect import serve
from prefect.deployments.runner import RunnerDeployment

from pipeline.flow import ca_lora


def deployment() -> RunnerDeployment:
    """The deployment, silent on its schedules and on pausing: what was set in the UI outlives a restart."""
    local: RunnerDeployment = ca_lora.to_deployment("local", tags=["dvc"])
    local.model_fields_set.difference_update({"schedules", "paused"})  # else Prefect sends its own, [] and False
    return local


if __name__ == "__main__":
    serve(deployment(), limit=int(sys.argv[1]), pause_on_shutdown=False, print_starting_message=False)
