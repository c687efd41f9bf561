"""The demo: VMoBA on a real clip, from video file to table and picture.

    show.py     the whole demo, in order
    clip.py     video file -> frames (F, 3, H, W)
    model.py    frames -> query, key, value (1, heads, tokens, head_dim) of a video transformer block
    run.py      query, key, value -> one `LayerResult` per layer kind: full attention, 1D, 2D, 3D
    picture.py  frames and results -> one PNG, drawn with canvas.py

It needs the extra `demo` (av, matplotlib, tqdm), which is imported where it is used and not before.
"""
