"""Whole transformers of diffusers, with dense attention and with ours.

run.py      the command
shapes.py   the models, and how they are built
rows.py     all rows, the most urgent first
dense.py    dense attention by others, in place of diffusers' call
setup.py    a model, checked and compiled
worker.py   measures the rows
report.py   rows -> JSON and table; tables.py: -> the pages
"""
