"""VMoBA inside hosts that have a slot for an attention of one's own: what each passes -> a call of ours.

    video.py        where a call's video lies, and attending it as a config says
    comfyui.py      ComfyUI: nodes that override a model's attention
    vllm_omni.py    vLLM-Omni: an attention backend, found by its entry point
    fastvideo.py    FastVideo: what its VMOBA_ATTN runs

Each module is imported where its host is; nothing here imports them.
"""
