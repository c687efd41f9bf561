"""Does VMoBA hold up in training? A small video transformer on real clips, full attention against VMoBA.

How to run it: docs/quality.md. In the order of the data:

    clips.py     video files -> one small file of frames, made once
    windows.py   that file -> training windows of a seed and step, held-out windows
    runs.py      the runs: variants, sizes, seeds, and which comes first
    train.py     one run: steps, held-out loss, checkpoint
    probe.py     a trained model's own query and key: density, recall, tiles, exactness, speed
    worker.py    one run as a process
    run.py       all runs, one process per GPU at a time -> results JSON
    results.py, tables.py, plot.py, report.py    results JSON -> Markdown and picture
    conditioning.py    the model that ships -> how far rounding moves the gradients of single samples

The model itself is vmoba_flex/demo/model.py, of which a small one ships with the demo.
"""
