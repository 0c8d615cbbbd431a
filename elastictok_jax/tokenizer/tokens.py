"""Tokens of one clip, and the .etok file that holds them.

Dimension key: N blocks, n tokens kept in a block, Z latent dims.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from elastictok_jax.errors import UsageError

FORMAT = "etok-1"
TEXT_FIELDS = {"frames": int, "height": int, "width": int, "fps": float, "bits_per_token": float}
TEXT_FIELDS["window_blocks"] = int


@dataclasses.dataclass(frozen=True)
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
    """

    codes: list[np.ndarray]
    mse: np.ndarray
    met: np.ndarray
    frames: int
    height: int
    width: int
    fps: float
    bits_per_token: float
    fingerprint: str
    window_blocks: int = 1

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N], tokens kept in each block."""
        return np.asarray([len(code) for code in self.codes], np.int32)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def bits(self) -> float:
        """Nominal bits, without entropy coding."""
        return self.num_tokens * self.bits_per_token

    def save(self, path: str | Path) -> None:
        """Writes an .etok file whole or not at all.

        Raises:
          UsageError: if it cannot be written.
        """
        codes = np.concatenate(self.codes)
        if np.issubdtype(codes.dtype, np.integer):
            codes = codes.astype(np.min_scalar_type(int(codes.max(initial=0))))
        arrays = {"codes": codes, "lengths": self.lengths, "mse": self.mse, "met": self.met}
        text = {name: json.dumps(getattr(self, name)) for name in TEXT_FIELDS}
        text |= {"format": FORMAT, "fingerprint": self.fingerprint}
        temporary = Path(f"{path}.tmp")
        try:
            temporary.write_bytes(save(arrays, metadata=text))
            os.replace(temporary, path)
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error}): choose another place") from None

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Reads an .etok file.

        Raises:
          UsageError: if the file is missing, damaged, or of another format.
        """
        if not Path(path).is_file():
            raise UsageError(f"{path} does not exist: give an .etok file")
        try:
            with safe_open(str(path), framework="numpy") as file:
                text = file.metadata() or {}
                if text.get("format") != FORMAT:
                    raise UsageError(
                        f"{path} has format {text.get('format')!r}, not {FORMAT!r}: "
                        "encode it again with this version"
                    )
                arrays = {
                    name: file.get_tensor(name) for name in ("codes", "lengths", "mse", "met")
                }
            fields = {name: kind(json.loads(text[name])) for name, kind in TEXT_FIELDS.items()}
            codes, lengths = arrays["codes"], arrays["lengths"].astype(np.int64)
            if np.issubdtype(codes.dtype, np.integer):
                codes = codes.astype(np.int32)
            shapes = [arrays[name].shape for name in ("lengths", "mse", "met")]
            if len(set(shapes)) != 1 or len(shapes[0]) != 1 or (lengths < 0).any():
                raise ValueError(f"lengths, mse and met have shapes {shapes}")
            if lengths.sum() != len(codes):
                raise ValueError(f"{len(codes)} codes for lengths that add up to {lengths.sum()}")
            return cls(
                codes=np.split(codes, np.cumsum(lengths)[:-1]),
                mse=arrays["mse"].astype(np.float32),
                met=arrays["met"].astype(bool),
                fingerprint=text["fingerprint"],
                **fields,
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} is damaged ({error}): encode it again") from None
