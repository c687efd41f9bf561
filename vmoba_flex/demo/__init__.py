"""The demo: VMoBA on a real clip, from video file to table and picture.

    show.py        the whole demo, in order
    clip.py        video file -> frames (F, 3, H, W)
    model.py       a video diffusion transformer; bench/quality trained the one that checkpoint.py reads
    denoise.py     frames -> noisy video -> frames again, under any attention
    run.py         the model's own query, key, value -> one `LayerResult` per layer
    tailed.py      which layers have a tail, and what it keeps
    story.py       what the picture tells
    picture.py     story -> one PNG, drawn with canvas.py
    pipeline.py    the same model as a pipeline, for `vmoba-flex compare demo`

It needs the extra `demo` (av, matplotlib, numpy, safetensors, tqdm), which is imported where it is used.
"""
