"""One clip, coded block after block, each at a length that somebody chooses (paper, section 3.4).

Dimension key: C candidates, L tokens a block, D patch values, Z latent dims.

What is kept of a block was decoded by the very program that `ClipDecoder` runs on the stored codes,
one candidate at a time, so what is reported is what is decoded, to the last bit. Errors of several
candidates at once come from programs of other shapes and may differ in the last digits: good
enough to choose by, and the choice is measured again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.models.elastictok.model import ElasticTok
from elastictok_jax.tokenizer.cache import Cache, CodecHalf
from elastictok_jax.tokenizer.distortion import Distortion, decoded_mse

Array = jax.Array
CANDIDATES = 16  # most lengths of a block that one call measures


@dataclasses.dataclass(frozen=True)
class CompiledCodec:
    """What all clips of one model share: weights and compiled programs.

    `to_video` makes frames uint8 [F, H, W, 3] of the patches of a block, uint8 [L, D].
    """

    model: ElasticTok
    params: Any
    tokens_per_block: int
    encode: CodecHalf
    decode: CodecHalf
    to_video: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(
        cls,
        model: ElasticTok,
        params,
        *,
        tokens_per_block: int,
        to_video: Callable[[np.ndarray], np.ndarray],
    ) -> "CompiledCodec":
        encode = CodecHalf(model, "encode", tokens_per_block=tokens_per_block)
        decode = CodecHalf(model, "decode", tokens_per_block=tokens_per_block)
        return cls(model, params, tokens_per_block, encode, decode, to_video)


@dataclasses.dataclass(frozen=True)
class CodedBlock:
    """A block as it was kept.

    Attributes:
      codes: int32 [n] (FSQ) or float32 [n, Z] (VAE).
      error: what was chosen by; mse: on the [-1, 1] scale after clipping. Of the decoded pixels.
      met: whether `error` meets the target; true where there was none.
      evaluations: lengths measured, each a pass of encoder and decoder; encoder_passes: where the
        encoder does not know the length, one serves them all.
    """

    codes: np.ndarray
    error: float
    mse: float
    met: bool
    evaluations: int
    encoder_passes: int


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The block at one length, with all that is needed to keep it."""

    length: int
    codes: Array
    encoder_present: Any
    decoder_present: Any
    error: float
    mse: float


class BlockEncoder:
    """The newest block of a clip: can be measured at any length, and is then kept at one.

    Attributes:
      evaluations, encoder_passes: so far, as in `CodedBlock`.
      share_inside: how much of it is clip, and not padding.
    """

    def __init__(self, coder: "ClipEncoder", patches_LD: np.ndarray, inside_LD: np.ndarray) -> None:
        self._coder, self._programs = coder, coder.programs
        self._patches, self._inside = jnp.asarray(patches_LD), jnp.asarray(inside_LD)
        self.share_inside = float(inside_LD.mean())
        self.tokens_per_block = coder.programs.tokens_per_block
        self.evaluations = self.encoder_passes = 0
        self._encoded: tuple[Array, Any] | None = None  # of an encoder that knows no length
        self._kept: _Trial | None = None

    def encoding(self) -> np.ndarray:
        """Latents float32 [L, Z] of the block with all tokens kept."""
        codes, _ = self._encode(np.asarray([self.tokens_per_block], np.int32))
        return np.asarray(self._programs.model.bottleneck.dequantize(codes))[0]

    def video(self) -> np.ndarray:
        """Its frames, uint8 [F, H, W, 3]."""
        return self._programs.to_video(np.asarray(self._patches))

    @property
    def previous(self) -> tuple[int, float] | None:
        """Length and error of the block before, as it was kept; None for the first."""
        return self._coder.kept

    def errors(self, lengths: Sequence[int]) -> list[float]:
        """Error at each of `lengths`, CANDIDATES of them at a time."""
        if len(lengths) == 1:
            return [self.measure(lengths[0]).error]
        errors: list[float] = []
        for start in range(0, len(lengths), CANDIDATES):
            some = list(lengths[start : start + CANDIDATES])
            size = 1 << (len(some) - 1).bit_length()  # few sizes, so few programs
            lengths_C = np.asarray(some + some[-1:] * (size - len(some)), np.int32)
            codes, _ = self._encode(lengths_C)
            pixels, _ = self._decode(codes, lengths_C)
            error = self._coder.distortion(pixels, self._patches, self._inside)
            self.evaluations += len(some)
            errors += np.asarray(error, np.float64)[: len(some)].tolist()
        return errors

    def measure(self, length: int, *, target: float = np.inf) -> _Trial:
        """Error at one length as `ClipDecoder` would have it.

        Of several so measured, the shortest that meets `target` need not be computed again to be
        kept; if none does, the last.
        """
        lengths_C = np.asarray([length], np.int32)
        codes, encoder_present = self._encode(lengths_C)
        pixels, decoder_present = self._decode(codes, lengths_C)
        mse = decoded_mse(pixels, self._patches, self._inside)
        error = mse
        if self._coder.distortion is not decoded_mse:
            error = self._coder.distortion(pixels, self._patches, self._inside)
        self.evaluations += 1
        trial = _Trial(
            length, codes[0], encoder_present, decoder_present, float(error[0]), float(mse[0])
        )
        kept = self._kept
        if kept is None or kept.error > target or (trial.error <= target and length < kept.length):
            self._kept = trial
        return trial

    def keep(self, length: int, *, target: float = np.inf) -> CodedBlock:
        """Settles on a length: the blocks that follow see this one so."""
        if self._kept is None or self._kept.length != length:
            self._kept = None
            self.measure(length)
        trial = self._kept
        assert trial is not None
        self._coder.kept = (length, trial.error)
        self._coder.encoder_cache.keep(trial.encoder_present)
        self._coder.decoder_cache.keep(trial.decoder_present)
        return CodedBlock(
            codes=np.array(trial.codes[:length]),  # a view would keep the device's buffer
            error=trial.error,
            mse=trial.mse,
            met=trial.error <= target,
            evaluations=self.evaluations,
            encoder_passes=self.encoder_passes,
        )

    def _encode(self, lengths_C: np.ndarray) -> tuple[Array, Any]:
        """Codes [C, L] or [C, L, Z], and the keys and values of a single candidate."""
        programs, coder = self._programs, self._coder
        if programs.model.conditioned:
            self.encoder_passes += len(lengths_C)
            return programs.encode(programs.params, coder.encoder_cache, self._patches, lengths_C)
        if self._encoded is None:
            self.encoder_passes += 1
            whole = np.asarray([self.tokens_per_block], np.int32)
            self._encoded = programs.encode(
                programs.params, coder.encoder_cache, self._patches, whole
            )
        codes, present = self._encoded
        return jnp.broadcast_to(codes, (len(lengths_C), *codes.shape[1:])), present

    def _decode(self, codes: Array, lengths_C: np.ndarray) -> tuple[Array, Any]:
        programs = self._programs
        return programs.decode(programs.params, self._coder.decoder_cache, codes, lengths_C)


class ClipEncoder:
    """A clip being encoded."""

    def __init__(
        self, programs: CompiledCodec, *, window_blocks: int, distortion: Distortion | None = None
    ) -> None:
        sizes = dict(window_blocks=window_blocks, tokens_per_block=programs.tokens_per_block)
        self.programs, self.distortion = programs, distortion or decoded_mse
        self.encoder_cache, self.decoder_cache = Cache(**sizes), Cache(**sizes)
        self.kept: tuple[int, float] | None = None  # length and error of the newest block

    def block(self, patches_LD: np.ndarray, inside_LD: np.ndarray) -> BlockEncoder:
        """The next block; `keep` it before the one after it is asked for."""
        return BlockEncoder(self, patches_LD, inside_LD)


class ClipDecoder:
    """A clip being decoded."""

    def __init__(self, programs: CompiledCodec, *, window_blocks: int) -> None:
        self._programs = programs
        self.cache = Cache(window_blocks=window_blocks, tokens_per_block=programs.tokens_per_block)

    def block(self, codes: np.ndarray) -> np.ndarray:
        """Patches uint8 [L, D] of the next block, whose first tokens are `codes`, [n] or [n, Z]."""
        rest = [(0, self._programs.tokens_per_block - len(codes))] + [(0, 0)] * (codes.ndim - 1)
        whole = jnp.asarray(np.pad(codes, rest))[None]
        lengths_C = np.asarray([len(codes)], np.int32)
        programs = self._programs
        pixels, present = programs.decode(programs.params, self.cache, whole, lengths_C)
        self.cache.keep(present)
        return np.array(pixels[0])  # a view would keep the device's buffer
