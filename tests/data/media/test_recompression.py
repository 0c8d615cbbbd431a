"""Standard codecs as they are compared with: sizes, order of frames, and what they leave behind."""

import os
from functools import partial

import numpy as np
import pytest

from benchmarks.rate import error
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED


@pytest.mark.parametrize("codec", media.COMPARED_CODECS)
def test_a_codec_gives_the_clip_back_in_fewer_bytes_the_coarser_it_is(codec):
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", side=64)
    clip = media.center_crop(frames[::8], height=64, width=64)
    recompress = partial(media.recompress, clip, fps=24.0, codec=codec)
    fine, coarse = recompress(crf=1), recompress(crf=media.COMPARED_CODECS[codec])
    assert coarse.stream_bytes < fine.stream_bytes / 5
    assert error(fine.frames, clip) < 1e-3 < error(coarse.frames, clip)
    # Frames come back in the order in which they went in.
    errors = [[np.abs(a - b.astype(int)).mean() for b in clip] for a in fine.frames]
    assert np.argmin(errors, axis=1).tolist() == list(range(12))


def test_what_codecs_cannot_take_is_refused():
    clip = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(media.UsageError, match="even sizes"):
        media.recompress(clip[:, 1:], fps=24.0, codec="libx264", crf=30)
    for codec, crf in (("libx264", 52), ("libx265", 30)):
        with pytest.raises(media.UsageError, match=f"{codec}.* with crf {crf}"):
            media.recompress(clip, fps=24.0, codec=codec, crf=crf)


@pytest.mark.skipif(
    not hasattr(os, "sched_getscheduler"), reason="this system has no such policies"
)
@pytest.mark.parametrize("codec", media.COMPARED_CODECS)
def test_no_codec_changes_the_priority_of_the_program(codec):
    """SVT-AV1 would, if root runs it: see recompression.py."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    media.recompress(np.zeros((2, 64, 64, 3), np.uint8), fps=24.0, codec=codec, crf=50)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
