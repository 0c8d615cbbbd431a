"""Codes one clip block by block, each at a length that a policy chooses (paper, section 3.4).

Dimension key: C candidates, L tokens a block, Z values of a token, F frames a block, R side.

The chosen candidate of a block is decoded by the same compiled program that `ClipDecoder` runs on
the stored codes, so the reported error is that of the decoded frames, to the last bit. Errors of
several candidates at once come from programs of other shapes and may differ in the last digits;
they are good enough to choose by, and the choice is measured again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.models.base import Codec
from elastictok_jax.tokenizer.distortion import Distortion, decoded_mse

Array = jax.Array
CANDIDATES = 16  # most lengths of a block that one call measures


@dataclasses.dataclass(frozen=True)
class CompiledCodec:
    """A codec with its weights, whose programs are compiled once for all clips.

    Attributes:
      key: random key of decoders that sample, a function of the model's fingerprint.
    """

    codec: Codec
    params: Any
    key: Array

    def encode(self, inputs: Array, lengths_C: np.ndarray, past: Any) -> tuple[Array, Any]:
        """Returns codes [C, L, ...] of a block and, of one candidate, `Codec.extend`'s input."""
        return self.codec.encode(self.params, inputs, self._keep(lengths_C), past)

    def decode(
        self, codes: Array, lengths_C: np.ndarray, past: Any, *, block: int
    ) -> tuple[Array, Any]:
        """Returns frames uint8 [C, F, R, R, 3] of the codes of a clip's `block`, counted from 0."""
        key = jax.random.fold_in(self.key, block)
        return self.codec.decode(self.params, codes, self._keep(lengths_C), past, key)

    def _keep(self, lengths_C: np.ndarray) -> np.ndarray:
        return np.arange(self.codec.geometry.tokens) < lengths_C[:, None]


@dataclasses.dataclass(frozen=True)
class CodedBlock:
    """A block at its final length.

    Attributes:
      codes: int32 [n] (FSQ) or float32 [n, Z] (VAE).
      error: of the decoded pixels, in the metric that the policy uses.
      mse: of the decoded pixels, on the [-1, 1] scale after clipping.
      met: whether `error` meets the target; true without a target.
      evaluations: lengths measured, each by one pass of the decoder.
      encoder_passes: as many, or 1 if the encoder does not depend on the length.
    """

    codes: np.ndarray
    error: float
    mse: float
    met: bool
    evaluations: int
    encoder_passes: int


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A block at one length, with all that `keep` needs."""

    length: int
    codes: Array
    encoder_present: Any
    decoder_present: Any
    error: float
    mse: float


class BlockEncoder:
    """The newest block of a clip, which can be measured at any length and is then kept at one.

    Attributes:
      frames: uint8 [F, R, R, 3].
      evaluations, encoder_passes: so far, as in `CodedBlock`.
      fraction_inside: fraction of its pixels that are not padding.
    """

    def __init__(self, clip: "ClipEncoder", frames: np.ndarray, inside: np.ndarray) -> None:
        self._clip, self._compiled, codec = clip, clip.compiled, clip.compiled.codec
        self.frames = frames
        self._inputs = jnp.asarray(codec.pack(frames))
        self._original, self._inside = jnp.asarray(frames), jnp.asarray(inside)
        self.fraction_inside = float(inside.mean())
        self.tokens_per_block = codec.geometry.tokens
        self.evaluations = self.encoder_passes = 0
        # The result of an encoder that does not depend on the length.
        self._encoded: tuple[Array, Any] | None = None
        self._kept: _Trial | None = None

    def encoding(self) -> np.ndarray:
        """Returns the values float32 [L, Z] of the block's codes with all tokens kept."""
        codes, _ = self._encode(np.asarray([self.tokens_per_block], np.int32))
        return np.asarray(self._compiled.codec.code.values(codes))[0]

    @property
    def previous(self) -> tuple[int, float] | None:
        """Length and error of the previous block; None for the first."""
        return self._clip.kept

    def errors(self, lengths: Sequence[int]) -> list[float]:
        """Returns the error at each of `lengths`, measured CANDIDATES of them at a time."""
        if len(lengths) == 1:
            return [self.measure(lengths[0]).error]
        errors: list[float] = []
        for start in range(0, len(lengths), CANDIDATES):
            some = list(lengths[start : start + CANDIDATES])
            size = 1 << (len(some) - 1).bit_length()  # few sizes, so few programs to compile
            lengths_C = np.asarray(some + some[-1:] * (size - len(some)), np.int32)
            codes, _ = self._encode(lengths_C)
            decoded, _ = self._decode(codes, lengths_C)
            error = self._clip.distortion(decoded, self._original, self._inside)
            self.evaluations += len(some)
            errors += np.asarray(error, np.float64)[: len(some)].tolist()
        return errors

    def measure(self, length: int, *, target: float = np.inf) -> _Trial:
        """Returns the block at one length, with the error of what `ClipDecoder` returns.

        The shortest one measured here that meets `target`, else the last, is cached for `keep`.
        """
        lengths_C = np.asarray([length], np.int32)
        codes, encoder_present = self._encode(lengths_C)
        decoded, decoder_present = self._decode(codes, lengths_C)
        mse = decoded_mse(decoded, self._original, self._inside)
        error = mse
        if self._clip.distortion is not decoded_mse:
            error = self._clip.distortion(decoded, self._original, self._inside)
        self.evaluations += 1
        trial = _Trial(
            length, codes[0], encoder_present, decoder_present, float(error[0]), float(mse[0])
        )
        kept = self._kept
        if kept is None or kept.error > target or (trial.error <= target and length < kept.length):
            self._kept = trial
        return trial

    def keep(self, length: int, *, target: float = np.inf) -> CodedBlock:
        """Fixes the length of the block, which determines what later blocks see of it."""
        if self._kept is None or self._kept.length != length:
            self._kept = None
            self.measure(length)
        trial = self._kept
        assert trial is not None
        self._clip.keep(trial.encoder_present, trial.decoder_present)
        self._clip.kept = (length, trial.error)
        return CodedBlock(
            codes=np.array(trial.codes[:length]),  # a view would keep the device's buffer alive
            error=trial.error,
            mse=trial.mse,
            met=trial.error <= target,
            evaluations=self.evaluations,
            encoder_passes=self.encoder_passes,
        )

    def _encode(self, lengths_C: np.ndarray) -> tuple[Array, Any]:
        """Returns codes [C, L, ...], and the present of a single candidate."""
        compiled, (past, _) = self._compiled, self._clip.pasts
        if compiled.codec.knows_length:
            self.encoder_passes += len(lengths_C)
            return compiled.encode(self._inputs, lengths_C, past)
        if self._encoded is None:
            self.encoder_passes += 1
            full = np.asarray([self.tokens_per_block], np.int32)
            self._encoded = compiled.encode(self._inputs, full, past)
        codes, present = self._encoded
        return jnp.broadcast_to(codes, (len(lengths_C), *codes.shape[1:])), present

    def _decode(self, codes: Array, lengths_C: np.ndarray) -> tuple[Array, Any]:
        _, past = self._clip.pasts
        return self._compiled.decode(codes, lengths_C, past, block=self._clip.blocks)


class ClipEncoder:
    """Encodes a clip block by block.

    Attributes:
      pasts: KV caches of earlier blocks, of the encoder and of the decoder.
      blocks: number of blocks so far.
      kept: length and error of the newest block.
    """

    def __init__(
        self, compiled: CompiledCodec, *, window_blocks: int, distortion: Distortion | None = None
    ) -> None:
        self.compiled, self.distortion = compiled, distortion or decoded_mse
        self.pasts = compiled.codec.start(window=window_blocks)
        self.blocks = 0
        self.kept: tuple[int, float] | None = None

    def block(self, frames: np.ndarray, inside: np.ndarray) -> BlockEncoder:
        """Returns the next block; `keep` it before asking for the one after it.

        Args:
          frames: uint8 [F, R, R, 3].
          inside: bool of that shape, false for padding.
        """
        return BlockEncoder(self, frames, inside)

    def keep(self, encoder_present: Any, decoder_present: Any) -> None:
        """Adds the newest block to the KV caches."""
        encoder_past, decoder_past = self.pasts
        extend = self.compiled.codec.extend
        self.pasts = extend(encoder_past, encoder_present), extend(decoder_past, decoder_present)
        self.blocks += 1


class ClipDecoder:
    """Decodes a clip block by block.

    Attributes:
      pasts: KV caches of earlier blocks.
    """

    def __init__(self, compiled: CompiledCodec, *, window_blocks: int) -> None:
        self._compiled = compiled
        _, self.pasts = compiled.codec.start(window=window_blocks)
        self._blocks = 0

    def block(self, codes: np.ndarray) -> np.ndarray:
        """Returns frames uint8 [F, R, R, 3] of the next block, whose first tokens are `codes`."""
        codec = self._compiled.codec
        rest = [(0, codec.geometry.tokens - len(codes))] + [(0, 0)] * (codes.ndim - 1)
        padded = jnp.asarray(np.pad(codes, rest))[None]
        lengths_C = np.asarray([len(codes)], np.int32)
        frames, present = self._compiled.decode(padded, lengths_C, self.pasts, block=self._blocks)
        self.pasts = codec.extend(self.pasts, present)
        self._blocks += 1
        return np.array(frames[0])  # a view would keep the device's buffer alive
