"""common/video.py against files that ffmpeg has written: every frame shows its own number."""

import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from common.media import sample_video

WIDTH, HEIGHT, FRAMES, FPS = 192, 64, 72, 24


def draw(number):
    """Twelve black or white blocks, six across: the number in binary."""
    frame = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(12):
        x, y = bit % 6 * 32, bit // 6 * 32
        frame[y : y + 32, x : x + 32] = 235 if number >> bit & 1 else 20
    return frame


def read_number(frame):
    """(64, 192, 3) -> the number that it shows."""
    centres = frame.reshape(2, 32, 6, 32, 3)[:, 8:24, :, 8:24].mean((1, 3, 4))  # (2, 6)
    return sum(1 << bit for bit, value in enumerate(centres.flatten()) if value > 128)


def ffmpeg(*words, data=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1"]
    return subprocess.run([*command, *map(str, words)], input=data, capture_output=True, check=True)


RAW = b"".join(draw(number).tobytes() for number in range(FRAMES))
H264 = "-c:v libx264 -preset ultrafast -bf 0 -g 12"
B_FRAMES = "-c:v libx264 -preset veryfast -bf 3 -g 24"
OPEN = "-c:v libx264 -preset veryfast -x264-params open-gop=1:bframes=3:b-pyramid=normal:"
OPEN += "keyint=12:min-keyint=12:scenecut=0"
HEVC = "-c:v libx265 -preset ultrafast -x265-params log-level=none:open-gop=1:bframes=3:keyint=12"
REFRESH = "-c:v libx264 -preset veryfast -x264-params intra-refresh=1:keyint=12:bframes=0"
VP8 = "-c:v libvpx -b:v 500k -cpu-used 8 -g 24 -auto-alt-ref 1 -lag-in-frames 16 -deadline good"
VP9 = "-c:v libvpx-vp9 -b:v 500k -cpu-used 8 -g 24 -auto-alt-ref 1 -lag-in-frames 16"
AV1 = "-c:v libsvtav1 -preset 13 -g 24"
XVID = "-c:v mpeg4 -q:v 4 -bf 2 -g 24 -vtag XVID"
MPEG2 = "-c:v mpeg2video -q:v 4 -bf 2 -g 12 -flags -cgop"

# {file: how the 72 frames are encoded}
ENCODED = {
    "plain.mp4": H264,
    "plain.avi": H264,
    "fragments.mp4": f"{H264} -movflags frag_keyframe+empty_moov",
    "late.mkv": f"{H264} -output_ts_offset 5",
    "ten_bits.mkv": f"{H264} -pix_fmt yuv420p10le",
    "fields.mp4": "-c:v libx264 -preset veryfast -flags +ildct+ilme -g 12",
    "b_frames.mp4": B_FRAMES,
    "b_frames.mov": B_FRAMES,
    "b_frames.mkv": B_FRAMES,
    "b_frames.avi": B_FRAMES,
    "b_frames.ts": B_FRAMES,
    "b_frames.flv": B_FRAMES,
    "b_frames.mpg": f"{B_FRAMES} -f mpeg",
    "open_gop.mp4": OPEN,
    "open_gop.mkv": OPEN,
    "open_gop.ts": OPEN,
    "refresh.mp4": REFRESH,
    "refresh.ts": REFRESH,
    "hevc.mp4": HEVC,
    "hevc.mkv": HEVC,
    "hevc.ts": HEVC,
    "vp8.webm": VP8,
    "vp9.webm": VP9,
    "av1.mp4": AV1,
    "av1.webm": AV1,
    "mpeg4.mp4": "-c:v mpeg4 -q:v 4 -bf 2 -g 12",
    "mpeg4.avi": "-c:v mpeg4 -q:v 4 -g 24",
    "xvid.avi": XVID,
    "mpeg1.mpg": "-c:v mpeg1video -q:v 4 -bf 2 -g 12",
    "mpeg2.mpg": f"{MPEG2} -f vob",
    "mpeg2.ts": MPEG2,
    "mpeg2.mkv": MPEG2,
    "windows.wmv": "-c:v wmv2 -q:v 4 -g 24",
    "flash.flv": "-c:v flv -q:v 4 -g 24",
    "theora.ogv": "-c:v libtheora -q:v 9 -g 24",
    "mjpeg.avi": "-c:v mjpeg -q:v 4",
    "prores.mov": "-c:v prores_ks -profile:v 0 -pix_fmt yuv422p10le",
    "picture.gif": "-pix_fmt rgb8",
    "picture.webp": "-c:v libwebp_anim -lossless 1 -loop 0",
    "picture.apng": "-c:v apng -f apng -pix_fmt rgb24",
}
# {file: (source, how it is copied)}
COPIED = {
    "cut.mp4": ("b_frames.mp4", "-ss 0.7 -t 1.5"),
    "cut.mov": ("open_gop.mp4", "-ss 0.7 -t 1.5"),
    "cut.mkv": ("open_gop.mkv", "-ss 0.7 -t 1.5"),
    "cut.ts": ("open_gop.ts", "-ss 0.7 -t 1.5"),
    "cut_hevc.mp4": ("hevc.mp4", "-ss 0.7 -t 1.5"),
    "cut_hevc.ts": ("hevc.ts", "-ss 0.7 -t 1.5"),
    "cut_mpeg2.ts": ("mpeg2.ts", "-ss 0.7 -t 1.5"),
    "from_ts.mp4": ("b_frames.ts", ""),
    "from_mp4.ts": ("hevc.mp4", ""),
}


@pytest.fixture(scope="session")
def folder():
    """Folder of all videos, once for every process of the tests on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()
        for name, words in ENCODED.items():
            pixels = [] if "-pix_fmt" in words or "webp" in name else ["-pix_fmt", "yuv420p"]
            ffmpeg(*source, *pixels, *words.split(), folder / name, data=RAW)
        for name, (whole, words) in COPIED.items():
            before = words.split()
            ffmpeg(*before[:2], "-i", folder / whole, *before[2:], "-c", "copy", folder / name)
        yield folder


def shown_numbers(path):
    """What ffmpeg shows from the first to the last frame."""
    words = "-fps_mode passthrough -f rawvideo -pix_fmt rgb24 -"
    pixels = np.frombuffer(ffmpeg("-i", path, *words.split()).stdout, np.uint8)
    return [read_number(frame) for frame in pixels.reshape(-1, HEIGHT, WIDTH, 3)]


@pytest.mark.parametrize("name", [*ENCODED, *COPIED])
def test_no_wrong_frame_and_no_wrong_time(folder, name):
    path = folder / name
    numbers = list(range(FRAMES)) if name in ENCODED else shown_numbers(path)
    truth = (np.array(numbers) - numbers[0]) / FPS
    # GIF counts hundredths of a second, and some containers milliseconds.
    slack = 0.011 if name == "picture.gif" else 1.1e-3
    for count in (8, 16, 32, 1000):
        found = sample_video(str(path), count)
        expected = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
        assert found.indices == expected.tolist()
        assert [read_number(frame) for frame in found.frames] == [numbers[i] for i in expected]
        np.testing.assert_allclose(found.times, truth[expected], atol=slack)
