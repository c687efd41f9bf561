"""Benchmarks, and the training study.

    common/        what measures row by row shares: the file of results, the process that watches, times, the machine
    attention/     attention on one GPU, ours and dense kernels by others
    models/        whole transformers of diffusers
    distributed/   attention and a training step over several GPUs
    quality/       a small video transformer: training, and denoising without training
    pages.py       fills the numbers of the documentation in from the results
    results/       results by hardware and date, each with its command; NOTES.md tells how they came about

Each command runs from the repository's root: ``python -m bench.attention.run --help``.
"""
