"""Load-balanced ring attention over a mesh axis that shards the sequence.

Dimension key: B batch, S tokens of a shard, C tokens of half a shard, H heads, K head width. A
leading 2 stands for the two half shards that a device works on.

The method is ring attention (Liu et al., arXiv 2310.01889): keys and values travel around the ring,
and outputs over parts of the keys are merged by log-sum-exp. With a causal mask the first devices
of a plain ring would idle, so the 2n half shards are dealt in a zigzag: device d works on half d
("low") and half 2n - 1 - d ("high"). While it holds the keys of device s,
  - its high queries see all of the low keys; and
  - its low queries see all of the low keys if s < d, its high queries all of the high if s > d.
Every device thus computes two fully visible products of halves per step, and three at the step of
its own keys: 2n + 1 of the 4n products of the full square. Only if a block spans several halves do
queries see later halves, at most `ring_reach` halves ahead, which is static. Half the heads go in
each direction, so that links are used both ways at once.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp

from elastictok_jax.layers.attention.kernel import FILLING, HIDDEN_SCORE, Array, Kernel, Visibility
from elastictok_jax.layers.attention.tile import merge_softmax, pad_to_multiple

LOW, HIGH = 0, 1


@dataclasses.dataclass(frozen=True)
class RingKernel:
    """`kernel` on the shards of a sequence along `axis`; to be called in a shard_map.

    The `visibility` of its methods has the ids of a shard and tokens_per_block: the sequence
    starts at a block boundary, and shards may end anywhere.

    Attributes:
      shards: size of the mesh axis.
    """

    kernel: Kernel
    axis: str
    shards: int

    def forward(self, query_BHSK, key_BHSK, value_BHSK, visibility):
        """As `Kernel.forward`."""
        zigzag = Zigzag(self, query_BHSK.shape, visibility.tokens_per_block)
        query, key, value, ids = zigzag.deal(
            query_BHSK, key_BHSK, value_BHSK, visibility.query_ids_BS
        )

        def add(home, sums, guests, keys, product):
            (query, ids), (out, lse), (key, value, key_ids) = home, sums, keys
            part = self.kernel.forward(
                product.queries_of(query),
                product.keys_of(key),
                product.keys_of(value),
                product.visibility(ids, key_ids),
            )
            for half, part_out, part_lse in product.query_parts(*part):
                merged = merge_softmax(_half(out, half), _half(lse, half), part_out, part_lse)
                out, lse = _with_half(out, half, merged[0]), _with_half(lse, half, merged[1])
            return (out, lse), guests

        out = jnp.zeros(query.shape, jnp.float32)
        lse = jnp.full(query.shape[:-1], HIDDEN_SCORE, jnp.float32)
        sums, _ = zigzag.go_round(add, (query, ids), (out, lse), (), (key, value, ids))
        return zigzag.gather(*sums)

    def backward(
        self, query_BHSK, key_BHSK, value_BHSK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`; the gradients of keys and values travel with them."""
        zigzag = Zigzag(self, query_BHSK.shape, visibility.tokens_per_block)
        query, key, value, ids, out, lse, grad = zigzag.deal(
            *(query_BHSK, key_BHSK, value_BHSK, visibility.query_ids_BS),
            *(out_BHSK, lse_BHS, grad_BHSK),
        )

        def add(home, sums, guests, keys, product):
            (query, ids, out, lse, grad), (key, value, key_ids) = home, keys
            part = self.kernel.backward(
                product.queries_of(query),
                product.keys_of(key),
                product.keys_of(value),
                product.visibility(ids, key_ids),
                out_BHSK=product.queries_of(out),
                lse_BHS=product.queries_of(lse),
                grad_BHSK=product.queries_of(grad),
            )
            for half, *more in product.query_parts(part[0]):
                sums = _with_sums(sums, half, more)
            for half, *more in product.key_parts(*part[1:]):
                guests = _with_sums(guests, half, more)
            return sums, guests

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
        home = (query, ids, out, lse, grad)
        sums, guests = zigzag.go_round(add, home, zeros[:1], zeros[1:], (key, value, ids))
        return zigzag.gather(*sums, *guests)


@dataclasses.dataclass(frozen=True)
class HalfProduct:
    """Halves of queries paired with equally many halves of keys, computed as one batch.

    Attributes:
      queries, keys: the halves, LOW or HIGH, each an int or a traced int32.
      visibility: function of (ids of queries [2, B, C], ids of keys [2, B, C]).
      needed: traced bool, whether anything is visible on this device; None if always.
    """

    queries: tuple
    keys: tuple
    visibility: Callable[[Array, Array], Visibility]
    needed: Array | None = None

    def queries_of(self, x: Array) -> Array:
        """Concatenates its halves of queries from [2, B, ...] to [halves x B, ...]."""
        return _halves(x, self.queries)

    def keys_of(self, x: Array) -> Array:
        """Concatenates its halves of keys from [2, B, ...] to [halves x B, ...]."""
        return _halves(x, self.keys)

    def query_parts(self, *results: Array) -> Iterable[tuple]:
        """Returns (half, its part of each result) for every half of queries."""
        return zip(self.queries, *(jnp.split(x, len(self.queries)) for x in results), strict=True)

    def key_parts(self, *results: Array) -> Iterable[tuple]:
        """Returns (half, its part of each result) for every half of keys."""
        return zip(self.keys, *(jnp.split(x, len(self.keys)) for x in results), strict=True)


class Zigzag:
    """The zigzag layout of half shards on this device, and its computation and communication."""

    def __init__(self, ring: RingKernel, shape_BHSK: tuple[int, ...], tokens_per_block: int):
        _, heads, tokens, _ = shape_BHSK
        self.axis, self.shards = ring.axis, ring.shards
        self.ways = (1, -1) if heads % 2 == 0 and self.shards > 2 else (1,)
        self.tokens, self.half_tokens = tokens, -(-tokens // 2)
        self.tokens_per_block = tokens_per_block
        self.reach = ring_reach(tokens, shards=ring.shards, tokens_per_block=tokens_per_block)
        self.device = jax.lax.axis_index(ring.axis)

    def deal(self, *shards: Array) -> tuple[Array, ...]:
        """Exchanges contiguous shards for this device's low and high half, stacked."""

        def one(x: Array) -> Array:
            axis = min(2, x.ndim - 1)
            x = pad_to_multiple(x, axis=axis, multiple=2, value=FILLING if x.ndim == 2 else 0)
            even, odd = (
                jax.lax.ppermute(half, self.axis, self._places(parity))
                for parity, half in enumerate(jnp.split(x, 2, axis))
            )
            return jnp.stack(self._swapped_on_odd(even, odd))

        return tuple(one(x) for x in shards)

    def gather(self, *halves: Array) -> tuple[Array, ...]:
        """Inverts `deal`."""

        def one(x: Array) -> Array:
            back = [
                jax.lax.ppermute(half, self.axis, [pair[::-1] for pair in self._places(parity)])
                for parity, half in enumerate(self._swapped_on_odd(x[LOW], x[HIGH]))
            ]
            axis = min(2, x.ndim - 2)
            return jax.lax.slice_in_dim(jnp.concatenate(back, axis), 0, self.tokens, axis=axis)

        return tuple(one(x) for x in halves)

    def _places(self, parity: int) -> list[tuple[int, int]]:
        """Returns pairs (device that holds half 2 device + parity, device that works on it)."""
        halves = range(parity, 2 * self.shards, 2)
        return [(half // 2, min(half, 2 * self.shards - 1 - half)) for half in halves]

    def _swapped_on_odd(self, first: Array, second: Array) -> tuple[Array, Array]:
        """Swaps the two on odd devices: a device's low half is even iff its index is even."""
        odd = self.device % 2 == 1
        return jnp.where(odd, second, first), jnp.where(odd, first, second)

    def go_round(self, add: Callable, home, sums, guests, keys):
        """Folds `sums, guests = add(home, sums, guests, keys, product)` over visible products.

        All are tuples of arrays. `keys` travel around the ring; `guests` accompany the keys that
        they belong to and return home. `add` is called separately for the heads of each direction.

        Returns:
          (sums, guests) of all heads.
        """
        home, sums, guests, keys = map(self._by_way, (home, sums, guests, keys))

        def pass_on(trees: list) -> list:
            return [
                jax.lax.ppermute(
                    tree, self.axis, [(d, (d + way) % self.shards) for d in range(self.shards)]
                )
                for way, tree in zip(self.ways, trees, strict=True)
            ]

        def work(home, sums, guests, keys, products: Iterable[HalfProduct]):
            for product in products:

                def run(sums, guests, product=product):
                    return add(home, sums, guests, keys, product)

                if product.needed is None:
                    sums, guests = run(sums, guests)
                else:
                    sums, guests = jax.lax.cond(
                        product.needed, run, lambda *same: same, sums, guests
                    )
            return sums, guests

        def work_all(sums, guests, keys, products: list[Iterable[HalfProduct]]):
            done = map(work, home, sums, guests, keys, products)
            return tuple(map(list, zip(*done, strict=True)))

        def step(carry, turn, near: bool, last: bool):
            keys, sums, guests = carry
            # Communication is issued first, so that it overlaps with the computation.
            next_keys, guests = keys if last else pass_on(keys), pass_on(guests)
            sources = [(self.device - way * turn) % self.shards for way in self.ways]
            products = [self.products(source, near) for source in sources]
            return (next_keys, *work_all(sums, guests, keys, products)), None

        next_keys = pass_on(keys) if self.shards > 1 else keys
        own = [self.own_products() for _ in self.ways]
        carry = (next_keys, *work_all(sums, guests, keys, own))
        for (near, last), turns in self.turns():
            carry, _ = jax.lax.scan(partial(step, near=near, last=last), carry, jnp.array(turns))
        return self._all_heads(carry[1]), self._all_heads(pass_on(carry[2]))

    def _by_way(self, arrays: tuple[Array, ...]) -> list[tuple[Array, ...]]:
        """Returns, for each direction, its heads of [2, B, H, ...] and all ids [2, B, C]."""
        count = len(self.ways)
        parts = [jnp.split(x, count, 2) if x.ndim > 3 else [x] * count for x in arrays]
        return [tuple(part[way] for part in parts) for way in range(count)]

    def _all_heads(self, ways: list[tuple[Array, ...]]) -> tuple[Array, ...]:
        return tuple(jnp.concatenate(parts, 2) for parts in zip(*ways, strict=True))

    def turns(self) -> list[tuple[tuple[bool, bool], list[int]]]:
        """Groups turns 1, ..., n - 1 into runs of equal (any later halves visible, last)."""

        def kind(turn: int) -> tuple[bool, bool]:
            return min(turn, self.shards - turn) <= self.reach, turn == self.shards - 1

        return [(key, list(turns)) for key, turns in groupby(range(1, self.shards), kind)]

    def own_products(self) -> Iterable[HalfProduct]:
        """Yields the visible products with this device's own keys."""
        yield HalfProduct((LOW, HIGH), (LOW, HIGH), self._diagonal)
        yield HalfProduct((HIGH,), (LOW,), partial(self._equal_ids, (HIGH,), (LOW,)))
        if self.reach:
            yield self._later_half(LOW, HIGH, self.device)

    def products(self, source: Array, near: bool) -> Iterable[HalfProduct]:
        """Yields the visible products with keys of device `source`.

        If `near`, some later halves may be visible.
        """
        half = jnp.where(source < self.device, LOW, HIGH)
        queries, keys = (HIGH, half), (LOW, half)
        yield HalfProduct(queries, keys, partial(self._equal_ids, queries, keys))
        if near:
            yield self._later_half(1 - half, 1 - half, source)
            yield self._later_half(LOW, HIGH, source)

    def _later_half(self, query, key, source: Array) -> HalfProduct:
        """Returns the product of queries with keys of a later half that is in the same block."""
        query_half, key_half = self._index(query, self.device), self._index(key, source)

        def visibility(query_ids: Array, key_ids: Array) -> Visibility:
            return Visibility(
                self._ids_and_blocks(_half(query_ids, query), query_half),
                self._ids_and_blocks(_half(key_ids, key), key_half),
            )

        return HalfProduct((query,), (key,), visibility, key_half - query_half <= self.reach)

    def _equal_ids(self, queries, keys, query_ids: Array, key_ids: Array) -> Visibility:
        return Visibility(_halves(query_ids, queries), _halves(key_ids, keys))

    def _diagonal(self, query_ids: Array, key_ids: Array) -> Visibility:
        """Returns the visibility of both halves with themselves."""
        ids = query_ids.reshape(-1, self.half_tokens)
        length, equal_halves = self.tokens_per_block, 2 * self.half_tokens == self.tokens
        if equal_halves and length % self.half_tokens == 0:  # a half is within one block
            return Visibility(ids, ids)
        if equal_halves and self.half_tokens % length == 0:
            return Visibility(ids, ids, length)
        first = [self._start(self._index(half, self.device)) % length for half in (LOW, HIGH)]
        return Visibility(ids, ids, length, jnp.repeat(jnp.stack(first), query_ids.shape[1]))

    def _index(self, half, device: Array) -> Array:
        """Returns the index among the 2n halves of a device's low or high half."""
        return jnp.where(half == LOW, device, 2 * self.shards - 1 - device)

    def _start(self, half: Array) -> Array:
        """Returns the position in the sequence of the first token of one of the 2n halves."""
        return half // 2 * self.tokens + half % 2 * self.half_tokens

    def _ids_and_blocks(self, ids_BC: Array, half: Array) -> Array:
        """Returns ids that are equal iff clip and block are; padding stays distinct."""
        blocks = -(-self.tokens * self.shards // self.tokens_per_block)
        block_C = (self._start(half) + jnp.arange(self.half_tokens)) // self.tokens_per_block
        return ids_BC * (blocks + 1) + block_C


def ring_reach(tokens: int, *, shards: int, tokens_per_block: int) -> int:
    """Returns by how many halves a visible key can be later than its query.

    Args:
      tokens: tokens of a shard.
    """
    half_tokens = -(-tokens // 2)

    def half_of(token: int) -> int:
        return token // tokens * 2 + token % tokens // half_tokens

    far = 0
    for half in range(2 * shards):
        last = min(half // 2 * tokens + (half % 2 + 1) * half_tokens, (half // 2 + 1) * tokens) - 1
        block_end = min((last // tokens_per_block + 1) * tokens_per_block, shards * tokens) - 1
        far = max(far, half_of(block_end) - half)
    return far


def _halves(x: Array, halves: tuple) -> Array:
    return jnp.concatenate([_half(x, half) for half in halves])


def _half(x: Array, half) -> Array:
    return jax.lax.dynamic_index_in_dim(x, half, keepdims=False)


def _with_sums(totals: tuple[Array, ...], half, more) -> tuple[Array, ...]:
    return tuple(
        _with_half(total, half, _half(total, half) + x)
        for total, x in zip(totals, more, strict=True)
    )


def _with_half(x: Array, half, value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, half, 0)
