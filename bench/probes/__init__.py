"""Questions to a CUDA card, each with a figure for an answer.

    python -m bench.probes NAME [--tiny]    # one line of JSON

`bench.device` asks them and stores the answers; a question that is settled stays, since another card may answer
otherwise. `--tiny` runs a probe in small on the CPU, to test the probe itself; what only a card can be asked says so.
"""
