"""ElasticTok in JAX: pretrain adaptive visual tokenizers, and use them."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ElasticTokenizer", "Tokens", "__version__"]

if TYPE_CHECKING:
    from elastictok_jax.tokenizer.api import ElasticTokenizer
    from elastictok_jax.tokenizer.tokens import Tokens


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import elastictok_jax` and --help stay fast.
    if name == "ElasticTokenizer":
        from elastictok_jax.tokenizer.api import ElasticTokenizer

        return ElasticTokenizer
    if name == "Tokens":
        from elastictok_jax.tokenizer.tokens import Tokens

        return Tokens
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
