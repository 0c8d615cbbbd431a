"""The tokens of one clip.

Dimension key: N blocks, n tokens kept in a block, Z latent dims.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import entropy, etok
from elastictok_jax.tokenizer.block_codes import BlockCodes, block_code_lengths

# Fields that must agree between pieces of one clip.
SHARED = ("fingerprint", "height", "width", "fps", "bits_per_token", "window_blocks", "levels")


@dataclasses.dataclass(frozen=True, eq=False)  # == of arrays is elementwise
class Tokens:
    """A clip as a variable number of tokens.

    Blocks are ordered by time, then by tile (top to bottom, left to right) if the frame is larger
    than the model's resolution.

    Attributes:
      codes: N arrays, int32 [n] (FSQ) or float32 [n, Z] (VAE).
      mse: float32 [N], achieved, on the [-1, 1] pixel scale after clipping.
      met: bool [N], whether the target was reached; true if there was no target.
      frames, height, width: size of the encoded clip.
      fps: frames per second, 0 for an image.
      bits_per_token: nominal size of a token.
      fingerprint: of the model that encoded the clip.
      window_blocks: size of the context window in blocks, including the newest block.
      levels: FSQ levels of the codes; empty for a VAE.
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
        return block_code_lengths(self.codes)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def bits(self) -> float:
        """Nominal bits, without entropy coding."""
        return self.num_tokens * self.bits_per_token

    def entropy_coded_bits(self) -> int:
        """Returns the bits of the entropy-coded codes, excluding lengths and metadata.

        Raises:
          UsageError: if `levels` is empty, or the extra [compress] is not installed.
        """
        return 32 * len(entropy.entropy_encode(self.codes, levels=self.levels))

    def save(self, path: str | Path, *, coding: str = "plain") -> None:
        """Writes an .etok file atomically.

        Args:
          path: the file to write.
          coding: "plain", or "entropy": arithmetic-coded (FSQ only), smaller and still lossless.

        Raises:
          UsageError: if the file cannot be written, the tokens are inconsistent or exceed the
            limits of `etok`, or the coding does not apply to them.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        etok.write_etok_fields(path, fields, coding=coding)

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Reads an .etok file of either coding.

        Raises:
          UsageError: if the file is missing, damaged, modified, of another format, or exceeds the
            limits of `etok`.
        """
        return cls(**etok.read_etok_fields(path))

    @classmethod
    def join(cls, pieces: Sequence["Tokens"]) -> "Tokens":
        """Concatenates pieces that follow each other in time into one clip.

        Every piece but the last must end at a block boundary: otherwise it has fewer frames than
        its blocks hold, and the pieces after it would be shifted. Tokens do not record how many
        frames a block holds, so pieces that are all cut short alike go undetected.

        Raises:
          UsageError: if there are no pieces, they differ in model, size or frame rate, or a piece
            before the last has fewer frames per block than another.
        """
        if not pieces:
            raise UsageError("there are no pieces to join: give at least one")
        first, last = pieces[0], pieces[-1]
        for number, piece in enumerate(pieces):
            require_tokens_of_same_clip(piece, first, number=number)
            equal = piece.frames * len(first.codes) == first.frames * len(piece.codes)
            longer = piece.frames * len(first.codes) > first.frames * len(piece.codes)
            if longer or not (equal or piece is last):
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


def require_tokens_of_same_clip(piece: Tokens, first: Tokens, *, number: int) -> None:
    """Raises UsageError if two pieces cannot belong to one clip; `number` is that of `piece`."""
    for name in SHARED:
        ours, theirs = getattr(first, name), getattr(piece, name)
        if ours != theirs:
            raise UsageError(
                f"piece {number} has {name} {theirs}, the first {ours}: "
                "give pieces of one clip and one model"
            )
