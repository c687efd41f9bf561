"""Query, key, value and a call -> output: the ways to attend.

choose.py        which dispatch and which backend a call takes
one_device.py    one call on one device, by one dispatch
packed.py        a row for each pair: the cost is the density
shared.py        one choice for each tile of queries
tiles.py         FlexAttention over each tile that one of its queries wants
dense.py         full attention
compiled.py      FlexAttention, compiled once
chunked.py       an exact path for training on a CPU
"""
