"""Does VMoBA hold up in training, and without any? A small video transformer on real clips.

How to run it: docs/quality.md. Each file feeds those below it:

    make_clip.py            a video file -> the clip that the demo ships with
    clips.py                video files -> one small file of frames, made once
    windows.py              that file -> training windows of a seed and step, held-out windows
    runs.py                 the runs of the training study: variants, sizes, seeds, and which comes first
    train.py                one run: steps, held-out loss, checkpoint

The training study, full attention against VMoBA and others:

    probe.py                a trained model's own query and key: density, recall, tiles, exactness, speed
    worker.py               one run as a process
    run.py                  all runs, one process per GPU at a time -> results JSON
    results.py, tables.py, plot.py, report.py    results JSON -> Markdown and picture

Whole denoises with the weights of full attention:

    variants.py             the attentions, and the parts of the study
    stepped.py              an attention over the steps of a denoise
    fidelity.py             how close each is to full attention's own videos
    study.py                one model: trains, measures and tunes
    denoises.py             the command -> results JSON
    denoise_report.py, denoise_plot.py           results JSON -> Markdown and picture
    denoise_speed.py, denoise_speed_plot.py      these and results of bench.models -> fidelity against speed

    conditioning.py         the model that ships -> how far rounding moves the gradients of single samples

The model itself is vmoba_flex/demo/model.py, of which a small one ships with the demo.
"""
