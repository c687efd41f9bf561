"""The ways to attend a selection.

choose.py        which dispatch and which kernels a call takes
one_device.py    one call on one device, from inputs that have been checked
packed.py        a row for each pair: the cost is the density
shared.py        one choice for each tile of queries
tiles.py         FlexAttention over the tiles that any of their queries wants
dense.py         full attention
compiled.py      FlexAttention, compiled once
chunked.py       an exact path for training on a CPU
"""
