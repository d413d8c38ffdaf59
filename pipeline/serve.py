"""Serve the deployment `ca-lora/local`: `python -m pipeline.serve RUNS`, started by `make ui`."""

import sys

from pipeline.flow import ca_lora

if __name__ == "__main__":
    ca_lora.serve(
        name="local", limit=int(sys.argv[1]), pause_on_shutdown=False, print_starting_message=False, tags=["dvc"]
    )
