"""Tokens of one clip.

Dimension key: N blocks, n tokens kept in a block, Z latent dims.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import entropy, etok
from elastictok_jax.tokenizer.block_codes import BlockCodes, block_lengths

# What pieces of one clip have in common.
SHARED = ("fingerprint", "height", "width", "fps", "bits_per_token", "window_blocks", "levels")


@dataclasses.dataclass(frozen=True, eq=False)  # arrays are not compared as a whole
class Tokens:
    """A clip as a variable number of tokens.

    Blocks run over time first, then over tiles (top to bottom, left to right) where the frame is
    larger than the model's resolution.

    Attributes:
      codes: N arrays, int32 [n] (FSQ) or float32 [n, Z] (VAE).
      mse: float32 [N], achieved, on the [-1, 1] pixel scale after clipping.
      met: bool [N], whether the target was reached; true where none was given.
      frames, height, width: size of the clip that was encoded.
      fps: frames a second, 0 for an image.
      bits_per_token: nominal size of a token.
      fingerprint: which model made them.
      window_blocks: how many blocks saw each other, the newest one included.
      levels: of the FSQ that made the codes; empty for a VAE.
    """

    codes: Sequence[np.ndarray]
    mse: np.ndarray
    met: np.ndarray
    frames: int
    height: int
    width: int
    fps: float
    bits_per_token: float
    fingerprint: str
    window_blocks: int
    levels: tuple[int, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N], tokens kept in each block."""
        return block_lengths(self.codes)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def bits(self) -> float:
        """Nominal bits, without entropy coding."""
        return self.num_tokens * self.bits_per_token

    def entropy_coded_bits(self) -> int:
        """Bits of the codes alone in the entropy-coded form, without lengths and text.

        Raises:
          UsageError: if `levels` is empty, or the extra [compress] is not installed.
        """
        return 32 * len(entropy.encode_codes(self.codes, levels=self.levels))

    def save(self, path: str | Path, *, coding: str = "plain") -> None:
        """Writes an .etok file whole or not at all.

        Args:
          path: where to.
          coding: "plain", or "entropy": arithmetic-coded (FSQ only), smaller and as exact.

        Raises:
          UsageError: if it cannot be written, the tokens do not fit together or are more than the
            limits of `etok`, or have no such form.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        etok.write_fields(path, fields, coding=coding)

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Reads an .etok file of either coding.

        Raises:
          UsageError: if the file is missing, damaged, changed, of another format, or beyond the
            limits of `etok`.
        """
        return cls(**etok.read_fields(path))

    @classmethod
    def join(cls, pieces: Sequence["Tokens"]) -> "Tokens":
        """One clip of pieces that follow each other in time.

        All but the last must end where a block ends: else its frames are fewer than its blocks
        hold, and what comes after would lie at the wrong place. Tokens do not know how many a block
        holds, so pieces that all end too early alike are taken for whole ones.

        Raises:
          UsageError: if there are none, they differ in model, size or frame rate, or a piece
            before the last has fewer frames to its blocks than another.
        """
        if not pieces:
            raise UsageError("there are no pieces to join: give at least one")
        first, last = pieces[0], pieces[-1]
        for number, piece in enumerate(pieces):
            require_alike(piece, first, number=number)
            whole = piece.frames * len(first.codes) == first.frames * len(piece.codes)
            longer = piece.frames * len(first.codes) > first.frames * len(piece.codes)
            if longer or not (whole or piece is last):
                raise UsageError(
                    f"piece {number} has {piece.frames} frames in {len(piece.codes)} blocks, the "
                    f"first {first.frames} in {len(first.codes)}: cut the clip where blocks end"
                )
        return dataclasses.replace(
            first,
            codes=BlockCodes(
                np.concatenate([BlockCodes.of(piece.codes).flat for piece in pieces]),
                np.concatenate([piece.lengths for piece in pieces]),
            ),
            mse=np.concatenate([piece.mse for piece in pieces]),
            met=np.concatenate([piece.met for piece in pieces]),
            frames=sum(piece.frames for piece in pieces),
        )


def require_alike(piece: Tokens, first: Tokens, *, number: int) -> None:
    """Raises UsageError if two pieces cannot be of one clip; `number` is the later one's."""
    for name in SHARED:
        ours, theirs = getattr(first, name), getattr(piece, name)
        if ours != theirs:
            raise UsageError(
                f"piece {number} has {name} {theirs}, the first {ours}: "
                "give pieces of one clip and one model"
            )
