"""Attention and a training step over several GPUs.

run.py      the command: starts the ranks
rows.py     all rows, the most urgent first
calls.py    attention over ranks
step.py     a training step over ranks
worker.py   one rank: measures the rows
cost.py     a model of what a call costs
report.py   rows -> JSON and table; tables.py: -> the pages
"""
