"""Attention on one GPU: ours and dense kernels by others, on the same tensors.

run.py      the command
shapes.py   sizes, and the problem of a row
rows.py     all rows, the most urgent first
peers.py    dense attention by others
checks.py   inputs, and checks of outputs and gradients
worker.py   measures the rows
stages.py   the time of each stage of a call; profiles.py: each stage next to its floor (floors.py)
report.py   rows -> JSON and table; tables.py: -> the pages; plot.py: -> the picture
tail.py     what a tail costs; tail_kernels.py: its kernels in several shapes
bits.py     hashes of a fixed set of calls, to compare two commits
"""
