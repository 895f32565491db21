"""Any medium's frames, exactly: by their number in the order in which they are shown.

video = open_video("a.mp4")                  # a video, an animated picture, a folder of pictures
indices = video.pick(16)                     # evenly spread in time
for frame in video.read(indices):            # each (H, W, 3) uint8 RGB, as a viewer shows it
    ...
video.times[indices]                         # seconds since the first frame shown
"""

import os
import re
import struct
from contextlib import contextmanager
from functools import partial

import av
import cv2
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps

from common.data import DataError, MediaError, first_words

# The exception says what is wrong with a video; FFmpeg's own messages would break the progress bar.
av.logging.set_level(None)

# Containers with a presentation time for every frame. Others order frames by decoding times.
TIMED_CONTAINERS = re.compile(r"\b(mov|matroska|mpegts|flv)\b")

# Files that FFmpeg reads as a video, too: single pictures, and text that it draws.
NO_VIDEO = re.compile(r"_pipe\b|\b(image2|ico|tty)\b")

# Codecs of which a packet is one frame shown; VP8 has packets of hidden frames, for one.
PACKET_IS_FRAME = """h264 hevc vp9 libdav1d av1 mpeg4 mpeg1video mpeg2video mjpeg prores wmv1 wmv2
    flv h263 msmpeg4v2 msmpeg4v3""".split()

# Decoders that begin at any frame, be it no key frame, and show what they do not know as grey.
CARELESS = "mpeg4 wmv1 wmv2 flv h263 msmpeg4v2 msmpeg4v3".split()

# Of a folder.
PICTURES = tuple(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())

TOLERANCE = 1e-3  # seconds: containers round times to milliseconds

TIE = 1e-5  # seconds between frames to which a file gives the same time


class Video:
    """Frames of a medium and their times.

    Args:
        path: for messages.
        times: (N,) seconds of all frames in the order in which they are shown.
        frames: function of ascending indices that yields those frames, (H, W, 3) uint8 RGB.
        by_index: pick frames evenly by number, whatever their times, as the releases do.
    Raises:
        MediaError: no frames, or times that are not finite and strictly increasing.
    """

    def __init__(self, path, times, frames, by_index=False):
        times = np.asarray(times, np.float64)
        if len(times) == 0:
            raise MediaError(f"{path}: the video has no frames")
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise MediaError(f"{path}: damaged video (the times of its frames do not increase)")
        self.path = path
        self.times = times - times[0]
        self.frames = frames
        self.by_index = by_index

    def __len__(self):
        return len(self.times)

    def pick(self, count, fps=None, start=None, end=None, least=1):
        """Indices of frames that are spread evenly in time.

        Args:
            count: number of frames; all where there are fewer.
            fps: frames a second instead, an even number of them where it is above 1 (a temporal
                slot takes two), at least `least` and at most `count`, both rounded to even ones.
            start, end: seconds; frames outside are not picked. None: the video's.
        Returns:
            list of ascending ints.
        Raises:
            MediaError: the video ends before `start`, or `end` is before it.
        """
        step = self.times[-1] / max(1, len(self) - 1)  # mean seconds between frames
        start = start or 0.0
        end = np.inf if end is None else end
        if not -TOLERANCE <= start <= min(end, self.times[-1] + max(step, TOLERANCE)):
            raise MediaError(
                f"{self.path}: a span from {start} to {end} s, the video has {self.times[-1]:.1f} s"
            )
        last = np.searchsorted(self.times, end + TOLERANCE, "right") - 1
        # Between two frames the earlier is seen.
        first = min(np.searchsorted(self.times, start - TOLERANCE), last)
        clock = self.times[first : last + 1]  # (n,)
        total = len(clock)
        if fps is not None:
            seconds = (clock[-1] - clock[0]) * total / max(1, total - 1)
            # Both ends may be rounded down to a millisecond; a frame must not go for that.
            wanted = int((seconds + 2 * TOLERANCE) * fps)
            wanted = max(1, wanted - wanted % 2, least + least % 2 * (least > 1))
            count = min(wanted, max(1, count - count % 2))
        count = min(count, total)
        # At a constant rate, times rounded or a frame or two left out at a cut, by number.
        steady = np.linspace(clock[0], clock[-1], total)
        if self.by_index or np.abs(clock - steady).max() <= 2 * step:
            clock = np.arange(total)
        places = np.interp(np.linspace(clock[0], clock[-1], count), clock, np.arange(total))
        places = places.round(6).round().astype(int)  # halves to even, as the releases round them
        # Each frame once: where the rate is low, the next free one.
        order = np.arange(count)
        places = np.maximum.accumulate(places - order) + order
        places = np.minimum(places, total - count + order)
        return (first + places).tolist()

    def read(self, indices):
        """Yield the frames of ascending indices, one in memory at a time.

        Raises:
            MediaError: an index outside the video, or a damaged video.
        """
        # A prior of a longer file that was replaced since asks for such frames.
        if min(indices) < 0 or max(indices) >= len(self):
            raise MediaError(
                f"{self.path}: frames {min(indices)} to {max(indices)} asked for, "
                f"the video has 0 to {len(self) - 1}"
            )
        yield from self.frames(indices)


def open_video(path, decoder="pyav", fps=None):
    """Open a video file, an animated GIF, WebP or PNG, or a folder of pictures.

    Args:
        decoder: "pyav", or "decord" for the frames of a file that the releases see.
        fps: a folder's frames a second, None: 1.
    Returns:
        Video.
    Raises:
        MediaError: it is missing, empty or not a readable video.
    """
    if os.path.isdir(path):
        return open_folder(path, fps)
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: empty file")
    # FFmpeg would read any picture as a video of one frame.
    if cv2.haveImageReader(path):
        return open_animation(path)
    return open_decord(path) if decoder == "decord" else open_pyav(path)


def open_medium(medium, settings):
    """Open a Medium and choose its frames.

    Args:
        settings: has decoder, frames, fps and min_frames, as prior.PriorSettings does.
    Returns:
        Video, list of indices.
    Raises:
        MediaError: what open_video and Video.pick raise.
    """
    video = open_video(medium.path, settings.decoder, medium.fps)
    chosen = video.pick(
        settings.frames, settings.fps, medium.start, medium.end, settings.min_frames
    )
    return video, chosen


# ------------------------------------------------------------------------ files by FFmpeg

# Titles and tags come in any encoding.
open_file = partial(av.open, metadata_errors="ignore")


def video_stream(container, strict=False):
    """The video of a container, not the picture of its cover; decoded by one thread.

    Args:
        strict: raise at every error that the decoder would otherwise hide, a lost frame too.
    """
    stream = container.streams.best("video")
    cover = stream and stream.disposition & Disposition.attached_pic
    if stream is None or cover or stream.codec_context is None:
        raise MediaError(f"{container.name}: not a readable video (nothing in it can be decoded)")
    if NO_VIDEO.search(container.format.name):
        raise MediaError(f"{container.name}: a picture or a text where a video was promised")
    if strict:
        stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_count = 1
    return stream


def packets(container, stream):
    """Packets of a stream from its first key frame on, which alone can be decoded, and None."""
    begun = False
    for packet in container.demux(stream):
        begun = begun or packet.is_keyframe
        if begun and packet.size:
            yield packet
    yield None  # makes the decoder give out its last frames


def open_pyav(path):
    """Index a video file by the times of its packets where each is a frame, else by decoding it."""
    found = []
    end = 0.0
    try:
        with open_file(path) as container:
            stream = video_stream(container)
            for packet in filter(None, packets(container, stream)):
                if packet.is_corrupt:
                    raise MediaError(f"{path}: not a readable video (a part of it is missing)")
                found.append((packet.pts, packet.is_keyframe, packet.is_discard))
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
            codec = stream.codec_context
            timed = TIMED_CONTAINERS.search(container.format.name) or not codec.has_b_frames
            timed = timed and codec.name in PACKET_IS_FRAME
            base = float(stream.time_base)
            promised = promised_seconds(container, stream)
            own = stream.duration is not None
        if not found:
            raise MediaError(f"{path}: not a readable video (it has no frames)")
        # FFmpeg takes the place where a file is cut for its end. The last frame may say no
        # duration, and sound may outlast the video where the length is that of both.
        points, keys, discarded = map(np.array, zip(*found, strict=True))
        longest = np.diff(sorted(filter(None, points))).max(initial=0)
        least = 0.95 * promised - 2 * longest * base
        if end * base < least and (own or last_second(path) < least):
            raise MediaError(
                f"{path}: damaged video (it ends at {end * base:.1f} of {promised:.1f} s)"
            )
        timed = timed and None not in points and is_ordered(points, keys, discarded)
        if timed:
            shown = np.sort(points[~discarded])
            times = shown * base
            starts = np.flatnonzero(keys)
            # A file without an index calls every frame a key frame.
            if keys.all() and codec.name in CARELESS:
                starts = starts[:1]
        else:
            times = decoded_times(path)
            shown = np.arange(len(times))
            points = starts = shown[:1]
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not a readable video ({first_words(error)})") from error
    return Video(path, times, partial(read_file, path, timed, points, starts, shown))


def promised_seconds(container, stream):
    """Length of a file in its header, of the containers that have it there; else 0."""
    name = container.format.name
    if "avi" in name:
        # FFmpeg writes 2^30 where it cannot come back to write the number.
        return float(stream.frames % (1 << 30) / (stream.average_rate or 1))
    # After its edit list.
    if "mov" in name:
        return float((stream.duration or 0) * stream.time_base)
    # FFmpeg passes the length of a Windows Media file on where the file has the promised size.
    if "asf" in name and stream.duration is None:
        raise MediaError(f"{container.name}: damaged video (cut short, or recorded without an end)")
    if "matroska" in name or "flv" in name:
        return (container.duration or 0) / av.time_base
    return 0.0


def last_second(path):
    """Seconds at which a file's last packet begins, whatever it is of."""
    with open_file(path) as container:
        times = [packet.pts * packet.time_base for packet in container.demux() if packet.pts]
    return float(max(times, default=0))


def is_ordered(points, keys, discarded):
    """Whether the times of packets say which frames there are, and where to begin for each."""
    # Pictures that lead the first key frame depend on what was cut off.
    whole = discarded[0] or points[0] <= points[~discarded].min()
    return whole and len(set(points)) == len(points) and (np.diff(points[keys]) > 0).all()


def decoded_times(path):
    """Seconds of all frames, found by decoding them: (N,)."""
    presented = []
    decoded = []
    with open_file(path) as container:
        stream = video_stream(container, strict=True)
        for packet in packets(container, stream):
            for frame in stream.decode(packet):
                presented.append(frame.pts)
                decoded.append(frame.dts)
        rate = float(stream.guessed_rate or 1)
        base = float(stream.time_base)
    order = np.arange(len(presented))
    # AVI stores no times of presentation for B frames, only those of decoding.
    for points in (presented, decoded):
        times = np.array(points, float) * base  # None is NaN
        # The last frames come out of the decoder without one.
        known = int(np.isfinite(times).sum())
        times[known:] = times[:known].max(initial=0) + (order[known:] - known + 1) / rate
        # Equal times are of frames that follow one another at once.
        if (np.diff(times) >= 0).all():
            return np.maximum.accumulate(times - TIE * order) + TIE * order
    return order / rate


def read_file(path, timed, points, starts, shown, indices):
    """Yield frames, each decoded from the key frame before it, or all counted from the first on.

    Args:
        timed: whether `points` and `shown` are times in units of the stream, not numbers of frames.
        points: (P,) of the packets in their order.
        starts: numbers of the packets at which decoding can begin.
        shown: (N,) of the frames.
    """
    wanted = shown[indices]
    size = None
    done = 0
    cause = ""
    # Some key frames only begin to refresh the picture; then everything before is decoded as well.
    for begin in (starts, starts[:1]):
        # What a cut hides may lead the first start.
        places = np.searchsorted(points[begin], wanted[done:], "right") - 1
        places = begin[places.clip(0)].tolist()  # packet to begin with, for each frame
        try:
            for frame in decode(path, timed, places, wanted[done:]):
                # A video whose frames change their size has that of the first.
                size = size or (frame.width, frame.height)
                yield to_rgb(frame, *size)
                done += 1
        except av.FFmpegError as error:
            cause = f": {first_words(error)}"
        if done == len(wanted):
            return
    raise MediaError(f"{path}: damaged video (frame {indices[done]} cannot be decoded{cause})")


def decode(path, timed, places, wanted):
    """Yield the frames of read_file up to one that cannot be decoded, and nothing needless."""
    done = 0
    count = 0
    with open_file(path) as container:
        stream = video_stream(container, strict=not timed)
        for number, packet in enumerate(packets(container, stream)):
            if number < places[done]:
                continue
            # What the decoder still holds is from before, and not wanted.
            if number == places[done]:
                stream.codec_context.flush_buffers()
            for frame in stream.decode(packet):
                name = frame.pts if timed else count
                count += 1
                if name == wanted[done] and not frame.is_corrupt:
                    yield frame
                    done += 1
                    if done == len(wanted):
                        return


def to_rgb(frame, width, height):
    """av.VideoFrame -> (H, W, 3) uint8, turned and mirrored as the file asks, alpha on white."""
    clear = any(component.is_alpha for component in frame.format.components)
    mode = "rgba" if clear else "rgb24"
    # One thread, as the decoder's.
    pixels = frame.to_ndarray(format=mode, width=width, height=height, threads=1)
    if clear:
        pixels = on_white(Image.fromarray(pixels))
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV does not know every kind of what may be beside it; turns it has apart, not mirrors.
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    if matrix is None:
        return pixels
    # A point (x, y) goes to (ax + cy, bx + dy): the nearest turn by right angles, and mirroring.
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# ------------------------------------------------------------------------ files by decord


def open_decord(path):
    """Open a video file with decord, which docs/priors.md says what it gets wrong."""
    # Imported for those who ask for it alone: it has no wheels for some machines.
    try:
        import decord
    except ImportError as error:
        raise DataError("--decoder decord: pip install decord") from error
    decord.logging.set_level(decord.logging.QUIET)
    # What decord raises depends on the kind of damage.
    faults = (decord.DECORDError, RuntimeError, MemoryError)

    def frames(indices):
        try:
            yield from (reader.get_batch([index]).asnumpy()[0] for index in indices)
        except faults as error:
            raise MediaError(f"{path}: damaged video ({first_words(error)})") from error

    try:
        reader = decord.VideoReader(path, num_threads=1)
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # start of (start, end)
    except faults as error:
        raise MediaError(f"{path}: not a readable video ({first_words(error)})") from error
    return Video(path, times, frames, by_index=True)


# ------------------------------------------------------------------------ pictures

# What Pillow raises depends on the kind of damage.
PILLOW_ERRORS = (
    Image.DecompressionBombError,
    IndexError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


def on_white(image):
    """A Pillow image with transparency -> (H, W, 3) uint8 of what is seen on a white page."""
    page = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(page, image.convert("RGBA")).convert("RGB"))


def as_shown(image):
    """A Pillow image as a viewer shows it: turned upright, on white, 8 bits -> (H, W, 3) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        return on_white(image)
    # Numbers of more than 8 bits (modes F, I, I;16 and its kin), which Pillow would cut off at 255.
    if image.mode[0] in "FI":
        grey = np.nan_to_num(np.asarray(image).astype(np.float64))
        # Floats are from 0 to 1, integers from 0 to 65535; what goes beyond is white at its most.
        usual = 1.0 if image.mode == "F" else 65535.0
        grey = (grey * 255 / max(usual, grey.max())).clip(0, 255).round().astype(np.uint8)
        return np.dstack([grey] * 3)
    return np.asarray(image.convert("RGB"))


@contextmanager
def open_image(path, kind):
    """Pillow's image of a file; MediaError if it, or a frame read inside, is no readable `kind`."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            yield image
    except PILLOW_ERRORS as error:
        raise MediaError(f"{path}: not a readable {kind} ({error})") from error


def load_image(path):
    """Read a picture as one frame: uint8 array (1, H, W, 3), RGB, as a viewer shows it."""
    with open_image(path, "image") as image:
        return as_shown(image)[None]


def open_animation(path):
    """Open an animated picture; each frame lasts as long as it says."""
    durations = []
    with open_image(path, "video") as image:
        # The picture for viewers that cannot play it may be none of the frames of a PNG.
        first = int(image.info.get("default_image", False))
        count = getattr(image, "n_frames", 1)
        # Further pictures of a photo are previews, or what the other eye sees.
        if image.format == "MPO":
            count = 1
        for index in range(first, count):
            image.seek(index)
            image.load()  # some formats know the duration of a frame once it is decoded
            duration = image.info.get("duration", 0)  # ms
            # As browsers do with a frame that says no time, or one too short to be seen.
            durations.append(duration if duration > 10 else 100)
    if len(durations) == 1:
        raise MediaError(f"{path}: an image where a video was promised")

    def frames(indices):
        with open_image(path, "video") as image:
            for index in indices:
                image.seek(first + index)
                yield as_shown(image)

    return Video(path, np.cumsum([0, *durations[:-1]]) / 1000, frames)


def open_folder(path, fps):
    """Open a folder of pictures, the frames of a video in the natural order of their names."""
    names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES)]
    # Hidden files are none, as macOS's "._a.png" beside "a.png".
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise MediaError(f"{path}: a folder without pictures")
    names.sort()
    # frame_2 stands before frame_10.
    names.sort(
        key=lambda name: [
            int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)
        ]
    )

    def frames(indices):
        size = None
        for index in indices:
            [frame] = load_image(os.path.join(path, names[index]))
            size = size or frame.shape
            if frame.shape != size:
                first = names[indices[0]]
                raise MediaError(f"{path}: {names[index]} has another size than {first}")
            yield frame

    return Video(path, np.arange(len(names)) / (fps or 1.0), frames)
