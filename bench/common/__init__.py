"""What the benchmarks share.

sizes.py        a size of the latent grid
timing.py       time and memory of a call
machine.py      device, versions and errors
report.py       rows of results -> JSON, and the table next to it
supervisor.py   the command line, and the process that starts the measuring one again
"""
