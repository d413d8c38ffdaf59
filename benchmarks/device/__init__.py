"""Many adapters on one compressed base, on this machine, beside merged models and PEFT: memory, switches, speed, a soak.

    python -m benchmarks.device PART [PART ...] [--tiny]

after `make run`. Parts, of which each writes its table in docs/device.md, and what it measured into docs/device.json:

    decode     tokens a second of the 4-bit and the 8-bit base with an adapter beside transformers + PEFT, round by round
    many       1, 4, 16 and 64 adapters: memory, switches, first tokens, requests a second; beside N merged models and PEFT
    contexts   a context for each adapter against one that switches, by llama.cpp's own functions
    soak       requests at random, adapters that come and go, each answer beside a fresh run of its adapter

Adapters are those of the run, then copies of them whose values are others. `--tiny` takes a random model, for a look at
whether all of it works.
"""
