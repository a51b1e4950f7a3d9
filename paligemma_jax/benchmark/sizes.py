"""What is measured on which kind of machine."""

import dataclasses

from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    EncodeImages,
    FirstToken,
    LongAnswer,
    MixedLengths,
)
from paligemma_jax.benchmark.entry import Entry
from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.timing import Effort

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
INTEGERS = (Precision.INT8, Precision.INT4)

_TRIAL = Effort(2, 2, 0)
_TINY = Entry(
    "tiny",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (F32,),
    each=(Decode(1, 32, _TRIAL), EncodeImages(1, _TRIAL), FirstToken(1, _TRIAL)),
    ours_once=(LongAnswer(4, 16, _TRIAL), MixedLengths(), DecodeMemory()),
    repeats=1,
    small=True,
)
_CPU = Entry(
    "mid",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (F32, BF16),
    quantized=(Precision.INT8,),
    each=(Decode(1, 32, Effort(3, 3)), FirstToken(1), EncodeImages(1, Effort(seconds=2))),
    once=(
        FirstToken(8, Effort(1, 1, 0)),
        Decode(8, 32, Effort(2, 2)),
        EncodeImages(8, Effort(2, 2)),
    ),
    ours_once=(LongAnswer(), MixedLengths(), DecodeMemory(32)),
)

# On GPUs compiling takes longest, so there are few shapes, and memory is that of the same programs.
# What matters most comes first: the time may be up before the end. Shares are about the seconds
# that an entry should take.
_MEMORY = DecodeMemory(64)
_FIRST_3B = Entry(
    "paligemma-3b-pt-224",
    (Kind.OURS, Kind.HUGGING_FACE),
    (BF16,),
    each=(Decode(1), FirstToken(1), EncodeImages(1)),
    ours_once=(_MEMORY,),
    repeats=1,
    starts=0,
    share=100,
)
_MORE_3B = dataclasses.replace(
    _FIRST_3B,
    each=(Decode(8), FirstToken(8), EncodeImages(8)),
    ours_once=(Decode(64), EncodeImages(32), LongAnswer(), MixedLengths()),
    starts=1,
    compared=False,
)
_FIRST_3B_OF_2 = dataclasses.replace(_FIRST_3B, model="paligemma2-3b-pt-224")
_OURS = Entry(
    "paligemma2-10b-pt-224",
    (Kind.OURS,),
    (BF16,),
    each=(Decode(1), FirstToken(1), Decode(8), FirstToken(8)),
    ours_once=(_MEMORY, Decode(64)),
    written=False,
    repeats=1,
    starts=0,
    share=60,
)
_OF_INTEGERS = dataclasses.replace(
    _OURS,
    model="paligemma-3b-pt-224",
    dtypes=(),
    quantized=INTEGERS,
    each=(Decode(1), Decode(8)),
    ours_once=(),
)
_LARGER = dataclasses.replace(
    _OURS, each=(FirstToken(1), FirstToken(8), Decode(1)), ours_once=(), share=40
)
_GPU = [
    _FIRST_3B,
    _FIRST_3B_OF_2,
    _OURS,
    dataclasses.replace(_OURS, model="paligemma2-28b-pt-224", share=90),
    dataclasses.replace(
        _FIRST_3B,
        kinds=(Kind.HUGGING_FACE_COMPILED,),
        each=(Decode(1), FirstToken(1)),
        ours_once=(),
        compared=False,
    ),
    dataclasses.replace(_LARGER, model="paligemma-3b-pt-448"),
    dataclasses.replace(_LARGER, model="paligemma-3b-pt-896"),
    _OF_INTEGERS,
    dataclasses.replace(_OF_INTEGERS, model="paligemma2-28b-pt-224", each=(Decode(1),)),
    _MORE_3B,
    dataclasses.replace(
        _MORE_3B, model="paligemma2-3b-pt-224", ours_once=(Decode(64), EncodeImages(32)), starts=0
    ),
]

SIZES: dict[str, list[Entry]] = {"tiny": [_TINY], "cpu": [_CPU], "gpu": _GPU}
