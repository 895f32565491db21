"""common/video.py against files that ffmpeg has written: every frame shows its own number."""

import io
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import evaluate
import prior
from common.data import Example, MediaError, Medium
from common.media import Encoder, PromptFlags, sample_video
from common.video import load_image

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
    "first.mp4": f"{B_FRAMES} -movflags faststart",  # its index stands first
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
    "windows.avi": "-c:v wmv2 -q:v 4 -g 24",
    "flash.flv": "-c:v flv -q:v 4 -g 24",
    "theora.ogv": "-c:v libtheora -q:v 9 -g 24",
    "mjpeg.avi": "-c:v mjpeg -q:v 4",
    "raw.h264": B_FRAMES,
    "latin.mkv": f"{B_FRAMES} -metadata title=Caf?",
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
# {file: what is done to its bytes}
CHANGED = {
    # A title in Latin-1, which is no UTF-8.
    "latin.mkv": lambda data: data.replace(b"Caf?", b"Caf\xe9"),
    # Without its index every frame counts as a key frame, and its length was never written.
    "windows.avi": lambda data: data[: data.rfind(b"idx1")],
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
        for name, change in CHANGED.items():
            path = folder / name
            path.write_bytes(change(path.read_bytes()))
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


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_is_even_in_time(folder, suffix):
    """60 frames in 2.5 s, then one a second: 14.5 s in all."""
    path = folder / f"slow.{suffix}"
    late = "setpts='if(lt(N,60),N/(24*TB),(60/24+(N-60))/TB)'"
    ffmpeg("-i", folder / "plain.mp4", "-vf", late, "-fps_mode", "vfr", "-c:v", "libx264", path)
    truth = [n / 24 if n < 60 else 2.5 + n - 60 for n in range(FRAMES)]
    for fps, count in ((None, 8), (0.5, 16)):
        found = sample_video(str(path), count, fps=fps)
        assert [read_number(frame) for frame in found.frames] == found.indices
        np.testing.assert_allclose(found.times, [truth[i] for i in found.indices], atol=1.1e-3)
        wanted = np.linspace(0, 13.5, len(found.indices))
        assert len(wanted) == (8 if fps is None else 6)
        # The nearest frame is at most half a second away, or the next where that one is taken.
        assert np.abs(found.times - wanted).max() <= 0.5 + 2e-3


def remux(source, path, change):
    """Copy the packets of a video; change(number, packet) may move them."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size:
                packet.stream = stream
                change(number, packet)
                new.mux(packet)


@pytest.mark.parametrize("name", ["tie.webm", "tie.mkv"])
def test_two_frames_of_one_time_leave_the_other_times_as_they_are(tmp_path, name):
    codec = "-c:v libvpx-vp9 -cpu-used 8 -lag-in-frames 0" if "webm" in name else H264
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()
    ffmpeg(*source, "-pix_fmt", "yuv420p", *codec.split(), tmp_path / f"c{name}", data=RAW)

    def tie(number, packet):
        if number == 40:
            packet.pts = packet.dts = round(39 / FPS * 1000)

    remux(tmp_path / f"c{name}", tmp_path / name, tie)
    found = sample_video(str(tmp_path / name), 100)
    assert [read_number(frame) for frame in found.frames] == list(range(FRAMES))
    truth = np.arange(FRAMES) / FPS
    truth[40] = truth[39]
    np.testing.assert_allclose(found.times, truth, atol=1.1e-3)
    assert (np.diff(found.times) > 0).all()


def test_avi_with_b_frames_and_frames_left_out(folder, tmp_path):
    """36 frames in 1.5 s, then four a second: 10.25 s; AVI has decoding times alone."""
    late = "setpts='if(lt(N,36),N/(24*TB),(36/24+(N-36)/4)/TB)'"
    words = f"-vf {late} -fps_mode vfr -enc_time_base 1/24 -c:v libx264 -preset veryfast -bf 2"
    ffmpeg("-i", folder / "plain.mp4", *words.split(), tmp_path / "late.mp4")
    ffmpeg("-i", tmp_path / "late.mp4", "-c", "copy", tmp_path / "late.avi")
    found = sample_video(str(tmp_path / "late.avi"), 100)
    assert [read_number(frame) for frame in found.frames] == list(range(FRAMES))
    truth = [n / 24 if n < 36 else 1.5 + (n - 36) / 4 for n in range(FRAMES)]
    # A frame's decoding time is that of a frame or two later.
    np.testing.assert_allclose(found.times, truth, atol=0.55)


def test_what_ffmpeg_writes_into_a_pipe(folder, tmp_path):
    path = tmp_path / "pipe.avi"
    words = "-c:v mpeg4 -q:v 4 -g 24 -f avi pipe:1".split()
    path.write_bytes(ffmpeg("-i", folder / "plain.mp4", *words).stdout)
    found = sample_video(str(path), 100)
    assert [read_number(frame) for frame in found.frames] == list(range(FRAMES))


@pytest.mark.parametrize("suffix", ["avi", "mov"])
def test_frames_of_motion_jpeg_may_carry_exif(tmp_path, suffix):
    """As cameras write them: the turn that a frame's EXIF asks for is FFmpeg's, too."""
    turned = Image.Exif()
    turned[0x0112] = 6
    with av.open(str(tmp_path / f"camera.{suffix}"), "w") as container:
        stream = container.add_stream("mjpeg", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(5):
            buffer = io.BytesIO()
            Image.fromarray(draw(number)).save(buffer, "JPEG", quality=95, exif=turned)
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base = Fraction(1, FPS)
            container.mux(packet)
    path = tmp_path / f"camera.{suffix}"
    found = sample_video(str(path), 5)
    pixels = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    shown = np.frombuffer(pixels, np.uint8).reshape(found.frames.shape)
    np.testing.assert_allclose(found.frames, shown, atol=3)


@pytest.mark.parametrize("name", ["photo.tga", "photo.pcx", "photo.ico", "notes.nfo", "two.mpo"])
def test_pictures_and_texts_are_no_videos(tmp_path, name):
    path = tmp_path / name
    picture = Image.fromarray(draw(5)).crop((0, 0, 64, 64))
    if name == "notes.nfo":
        path.write_text("A film about a cat.\n" * 50)
    elif name == "two.mpo":
        picture.save(path, save_all=True, append_images=[picture])
    else:
        picture.save(path)
    with pytest.raises(MediaError, match="where a video was promised"):
        sample_video(str(path), 8)


@pytest.mark.parametrize("name", ["cut.gif", "cut.mpo", "cut.webp", "cut.png"])
def test_an_animation_that_is_cut_anywhere_is_refused_or_shorter(tmp_path, name):
    """What Pillow raises there depends on the place."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)) for _ in range(3)]
    path = tmp_path / name
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    whole = path.read_bytes()
    refused = 0
    for size in range(1, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:size])
        try:
            assert len(sample_video(str(path), 8).frames) <= 3
        except MediaError:
            refused += 1
        try:
            load_image(str(path))
        except MediaError:
            refused += 1
    assert refused > 50


def test_a_picture_with_a_wrong_entry_beside_its_turn_is_refused(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02"
    exif += b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # orientation 6
    exif += b"\x01\x28\0\x02\0\0\0\x02x\0\0\0"  # the unit of resolution as a text
    exif += bytes(4)
    path = tmp_path / "a.jpg"
    Image.fromarray(draw(5)).save(path, exif=exif)
    with pytest.raises(MediaError, match="a.jpg: not a readable image"):
        load_image(str(path))


def test_a_png_may_show_another_picture_where_it_cannot_be_played(tmp_path):
    colours = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    path = tmp_path / "default.png"
    more = {"append_images": colours[1:], "duration": [500, 700]}
    colours[0].save(path, save_all=True, default_image=True, **more)
    words = "-fps_mode passthrough -f rawvideo -pix_fmt rgb24 -"
    pixels = ffmpeg("-f", "apng", "-i", path, *words.split()).stdout
    shown = np.frombuffer(pixels, np.uint8).reshape(-1, 8, 8, 3)
    found = sample_video(str(path), 8)
    assert (found.frames == shown).all()
    np.testing.assert_allclose(found.times, [0, 0.5])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("turn", ["rotation 90", "rotation 180", "rotation 270", "hflip", "vflip"])
def test_turned_and_mirrored_as_ffmpeg_shows_it(folder, suffix, turn):
    path = folder / f"turned.{suffix}"
    option, *angle = turn.split()
    words = [f"-display_{option}", *angle, "-i", folder / "plain.mp4", "-c", "copy", path]
    ffmpeg(*words)
    frame = sample_video(str(path), 3).frames[1]
    pixels = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    shown = np.frombuffer(pixels, np.uint8).reshape(FRAMES, *frame.shape)[36]
    # FFmpeg writes no vertical mirroring into Matroska.
    assert (frame == shown).all() or turn == "vflip" and suffix == "mkv"


def test_transparency_is_white(folder):
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()
    clear = "-vf format=rgba,colorchannelmixer=aa=0 -c:v qtrle -pix_fmt argb".split()
    ffmpeg(*source, *clear, folder / "clear.mov", data=RAW)
    assert (sample_video(str(folder / "clear.mov"), 3).frames == 255).all()
    red = Image.new("RGBA", (40, 20))
    # A frame of WebP without half-transparent pixels is cut to what is opaque.
    red.paste((0, 255, 0, 90), (38, 0, 40, 20))
    red.paste((255, 0, 0, 255), (0, 0, 20, 20))
    for name in ("red.gif", "red.webp", "red.png"):
        blue = Image.new("RGBA", (40, 20))
        blue.paste((0, 0, 255, 255), (20, 0, 40, 20))
        options = {"save_all": True, "append_images": [blue, red], "duration": [50, 70, 90]}
        if name == "red.gif":
            options["disposal"] = 2  # clear the page before the next frame
        red.save(folder / name, lossless=True, **options)
        found = sample_video(str(folder / name), 8)
        np.testing.assert_allclose(found.times, [0, 0.05, 0.12])
        assert found.frames[:, 10, [10, 30]].tolist() == [
            [[255, 0, 0], [255] * 3],
            [[255] * 3, [0, 0, 255]],
            [[255, 0, 0], [255] * 3],
        ]


@pytest.mark.parametrize(
    "name, damage, cause",
    [
        ("plain.mp4", "half", "not a readable video"),
        ("fragments.mp4", "text", "not a readable video"),
        ("b_frames.mp4", "hole", "damaged video"),
        ("b_frames.mkv", "half", "it ends at 0.* of 3.0 s"),
        ("vp9.webm", "half", "it ends at 1.* of 3.0 s"),
        ("b_frames.avi", "half", "not a readable video"),
        ("theora.ogv", "half", "not a readable video"),
        ("b_frames.ts", "hole", "a part of it is missing"),
        ("b_frames.ts", "twice", "a part of it is missing"),
        ("mpeg4.mp4", "hole", "damaged video"),
        ("picture.webp", "half", "not a readable video"),
    ],
)
def test_a_broken_file_is_refused_with_its_cause(folder, tmp_path, name, damage, cause):
    data = (folder / name).read_bytes()
    middle = len(data) // 2
    broken = {
        "half": data[:middle],
        "hole": data[:middle] + bytes(600) + data[middle + 600 :],
        "twice": 2 * data,
        "text": b"no video" * 100,
    }
    path = tmp_path / name
    path.write_bytes(broken[damage])
    with pytest.raises(MediaError, match=f"{name}: .*{cause}") as caught:
        sample_video(str(path), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    "b_frames.avi mpeg4.avi mjpeg.avi b_frames.flv flash.flv b_frames.mkv hevc.mkv vp8.webm "
    "windows.wmv first.mp4".split(),
)
def test_a_file_cut_short_is_refused(folder, tmp_path, name):
    """Cut in a packet, and between two, where no reader sees a torn one."""
    with av.open(str(folder / name)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = (folder / name).read_bytes()
    for place in (int(0.3 * len(data)), int(0.6 * len(data)), places[24], places[60]):
        (tmp_path / name).write_bytes(data[:place])
        with pytest.raises(MediaError, match=name):
            sample_video(str(tmp_path / name), 8)


@pytest.mark.parametrize("name", ["sound.flv", "sound.mkv", "sound.avi", "sound.wmv"])
def test_sound_may_outlast_the_video(folder, tmp_path, name):
    words = f"-f lavfi -i sine=duration=5 -i {folder / 'plain.mp4'} -c:a mp3 -c:v mpeg4"
    ffmpeg(*words.replace("mpeg4", "flv" if "flv" in name else "mpeg4").split(), tmp_path / name)
    assert len(sample_video(str(tmp_path / name), 100).indices) == FRAMES


def test_sound_with_a_cover_has_no_video(tmp_path):
    tone = "-f lavfi -i sine=duration=1 -f lavfi -i color=red:s=64x64:d=0.04 -c:v png -c:a aac"
    cover = "-map 0 -map 1 -disposition:v attached_pic"
    ffmpeg(*tone.split(), *cover.split(), tmp_path / "song.m4a")
    with pytest.raises(MediaError, match=r"song.m4a: not a readable video \(nothing in it"):
        sample_video(str(tmp_path / "song.m4a"), 4)


def test_a_span(folder):
    """The frames from 1 s to 2 s are 24 to 48, on the clock of the whole video."""
    for name in ("b_frames.mp4", "xvid.avi", "picture.gif"):
        found = sample_video(str(folder / name), 5, start=1.0, end=2.0)
        assert [read_number(frame) for frame in found.frames] == found.indices
        assert found.indices == [24, 30, 36, 42, 48]
        np.testing.assert_allclose(found.times, [1, 1.25, 1.5, 1.75, 2], atol=0.011)
    path = str(folder / "plain.mp4")
    assert sample_video(path, 8, start=1.01, end=1.03).indices == [24]  # 24 is seen until 1.04 s
    assert sample_video(path, 8, start=2.99).indices == [71]
    assert sample_video(path, 100, end=0.5).indices == list(range(13))
    for start, end in ((3.5, 4.0), (2.0, 1.0)):
        with pytest.raises(MediaError, match="plain.mp4: a span from"):
            sample_video(path, 8, start=start, end=end)


@pytest.mark.parametrize(
    "fps, least, expected", [(2, 4, 6), (1, 4, 4), (1, 1, 2), (9, 1, 16), (0.1, 1, 1)]
)
def test_frames_a_second_as_the_releases_count_them(folder, fps, least, expected):
    """3 s: an even number of frames, from `least` to 16."""
    found = sample_video(str(folder / "plain.mp4"), 16, fps=fps, min_frames=least)
    assert len(found.indices) == expected
    if fps == 9:
        # Odd bounds: no slot of one frame, not above the most, not below the least.
        path = str(folder / "plain.mp4")
        assert len(sample_video(path, 15, fps=9).indices) == 14
        assert len(sample_video(path, 16, fps=1, min_frames=5).indices) == 6
        assert len(sample_video(path, 1, fps=9).indices) == 1


@pytest.mark.parametrize("name", ["plain.mp4", "vp9.webm", "xvid.avi"])
def test_the_count_does_not_depend_on_how_a_container_rounds_times(folder, name):
    """3 s at 4/3 frames a second are 4, at 2 they are 6, at 4 they are 12."""
    for fps, expected in ((4 / 3, 4), (2, 6), (4, 12)):
        assert len(sample_video(str(folder / name), 16, fps=fps).indices) == expected


def test_a_folder_of_frames(tmp_path):
    for number in (0, 1, 2, 9, 10, 11):
        Image.fromarray(draw(number)).save(tmp_path / f"frame_{number}.png")
    for name in ("notes.txt", "._frame_1.png", ".hidden.png"):
        (tmp_path / name).write_text("no picture")
    found = sample_video(str(tmp_path), 4, fps=3)
    assert [read_number(frame) for frame in found.frames] == [0, 2, 9, 11]
    np.testing.assert_allclose(found.times, [0, 2 / 3, 1, 5 / 3])
    assert sample_video(str(tmp_path), 8).times.tolist() == [0, 1, 2, 3, 4, 5]
    Image.new("RGB", (20, 20)).save(tmp_path / "frame_10.png")
    with pytest.raises(MediaError, match="frame_10.png has another size than frame_0.png"):
        sample_video(str(tmp_path), 8)


def test_priors_training_and_evaluation_take_the_same_frames(folder, toy_processor):
    """Priors, the encoder of training and that of evaluation; with --fps and a span as well."""
    for name in ("b_frames.avi", "cut.mp4", "hevc.ts"):
        for settings in ({}, {"fps": 2.0, "min_frames": 4}):
            medium = Medium("video", str(folder / name), start=0.2, end=1.1)
            found = sample_video(medium.path, 6, start=0.2, end=1.1, **settings)
            cues = prior.read_cues(medium, prior.PriorSettings(frames=6, **settings))
            assert cues.frames == found.indices
            np.testing.assert_allclose(cues.times, found.times, atol=1e-6)
            flags = evaluate.EvaluateArguments("model", "data", frames=6, **settings)
            example = Example("0", "What?", [], "free-form", "x", [medium])
            for encoder in (
                Encoder(
                    toy_processor,
                    PromptFlags(min_pixels=3136, max_pixels=3136, frames=6, **settings),
                ),
                Encoder(toy_processor, flags),
            ):
                np.testing.assert_allclose(encoder.encode(example).times, found.times)


def test_decord_reads_a_plain_file_alike(folder):
    exact = sample_video(str(folder / "plain.mp4"), 8)
    other = sample_video(str(folder / "plain.mp4"), 8, decoder="decord")
    assert other.indices == exact.indices and (other.frames == exact.frames).all()
    np.testing.assert_allclose(other.times, exact.times, atol=1e-5)
