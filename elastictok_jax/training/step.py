"""The jitted training and evaluation steps.

Dimension key: B batch, S tokens, D values a patch, N blocks, L tokens a block, F frames,
G runs of blocks that LPIPS looks at one frame of.
All randomness is a function of (config.seed, step, global row or block index).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from elastictok_jax import masking
from elastictok_jax.config import block_tokens
from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.bottlenecks import FSQ, codebook_counts
from elastictok_jax.layers.patching import to_float, unpatchify
from elastictok_jax.losses.reconstruction import kl_sum, squared_error_sum
from elastictok_jax.models.elastictok.model import build_model
from elastictok_jax.parallel.sharding import replicated
from elastictok_jax.perceptual.lpips import lpips
from elastictok_jax.training.host_consensus import with_votes
from elastictok_jax.training.optimizer import make_optimizer, make_schedule
from elastictok_jax.training.state import TrainState

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


def sequence_layout(batch: Batch, *, tokens_per_block: int) -> SequenceLayout:
    """Places of a batch's tokens: positions run through the sequence."""
    tokens = batch["segment_ids"].shape[1]
    return SequenceLayout(
        positions_S=jnp.arange(tokens, dtype=jnp.int32),
        segments_BS=batch["segment_ids"],
        tokens_per_block=tokens_per_block,
    )


def step_keys(config: ml_collections.ConfigDict, step: Array | int) -> Array:
    """The keys [3] of a step: for keep lengths, for noise, for the frames that LPIPS looks at."""
    return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 3)


def keep_lengths(
    mask_key: Array, rows_B: Array, *, blocks: int, config: ml_collections.ConfigDict
) -> Array:
    """int32 [B, N]: tokens that each of the `blocks` blocks of rows of the global batch keeps."""
    return masking.draw_lengths(
        mask_key,
        rows_B[:, None] * blocks + jnp.arange(blocks),
        max_tokens=block_tokens(config),
        **config.masking.to_dict(),
    )


def row_keys(key: Array, rows_B: Array) -> Array:
    """One key a row of the global batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def random_frames(
    key: Array, rows_B: Array, videos_BSD: tuple[Array, ...], segment_ids_BS: Array, *, config
) -> tuple[tuple[Array, ...], Array]:
    """Draws one frame of each run of `loss.lpips_every_blocks` blocks of a row.

    A run's frame is a random one of a random valid block, drawn by global block index. A row's last
    run is shorter if the number does not divide `data.sequence_blocks`.

    Returns:
      The drawn frames [B, G, H, W, 3] of each of `videos`, and float32 [B, G]: how many valid
      blocks each stands for, 0 for a run of padding. The weighted sum over runs of any function of
      frames has the expectation of its sum over valid blocks of its mean over their frames.
    """
    per_block, frames = block_tokens(config), config.video.frames_per_block
    side = config.video.resolution
    valid_BN = segment_ids_BS[:, ::per_block] != 0
    rows, blocks = valid_BN.shape
    run = min(config.loss.lpips_every_blocks, blocks)
    short = -blocks % run  # blocks that the last run lacks

    def draw(index: Array) -> tuple[Array, Array]:
        block_key, frame_key = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.uniform(block_key), jax.random.randint(frame_key, (), 0, frames)

    def in_runs(values_BN: Array, fill=0) -> Array:
        pad = [(0, 0), (0, short), *[(0, 0)] * (values_BN.ndim - 2)]
        padded = jnp.pad(values_BN, pad, constant_values=fill)
        return padded.reshape(rows, -1, run, *values_BN.shape[2:])

    def of_run(values_BN: Array, index_BG: Array) -> Array:
        """The value at `index` within each run."""
        if run == 1:
            return values_BN
        return jax.vmap(jax.vmap(lambda values, index: values[index]))(in_runs(values_BN), index_BG)

    score_BN, frame_BN = jax.vmap(jax.vmap(draw))(rows_B[:, None] * blocks + jnp.arange(blocks))
    block_BG = jnp.argmax(in_runs(score_BN + valid_BN, fill=-1), axis=2)
    frame_BG = of_run(frame_BN, block_BG)

    def take(video_BSD: Array) -> Array:
        blocks_BNLD = video_BSD.reshape(rows, blocks, per_block, -1)
        clip_BGFHWC = unpatchify(
            of_run(blocks_BNLD, block_BG),
            patch=tuple(config.model.patch),
            frames_per_block=frames,
            height=side,
            width=side,
        )
        return jax.vmap(jax.vmap(lambda clip, index: clip[index]))(clip_BGFHWC, frame_BG)

    weight_BG = jnp.sum(in_runs(valid_BN), axis=2).astype(jnp.float32)
    return tuple(take(video) for video in videos_BSD), weight_BG


def make_loss(config: ml_collections.ConfigDict) -> Callable[..., tuple[Array, Metrics]]:
    """loss(params, batch, rows_B, *, keys, totals, lpips_params) -> (loss, metrics).

    `keys` are `step_keys`. `totals` counts the valid tokens and blocks of the complete batch:
    terms are shares of it, so that the sum over microbatches is exactly the loss of the batch
    (paper, section 3.3).
    """
    model, per_block = build_model(config), block_tokens(config)
    weights = config.loss

    def loss(params, batch: Batch, rows_B: Array, *, keys: Array, totals: Metrics, lpips_params):
        mask_key, noise_key, frame_key = keys
        segments_BS = batch["segment_ids"]
        blocks = segments_BS.shape[1] // per_block
        lengths_BN = keep_lengths(mask_key, rows_B, blocks=blocks, config=config)
        keep_BS = masking.keep_mask(lengths_BN, tokens_per_block=per_block)
        valid_BS = segments_BS != 0
        target_BSD = to_float(batch["patches"])
        output: Any = model.apply(
            {"params": params},
            target_BSD,
            keep_BS,
            sequence_layout(batch, tokens_per_block=per_block),
            row_keys(noise_key, rows_B),
        )
        error = squared_error_sum(output.reconstruction, target_BSD, valid_BS)
        metrics = {"mse": error / totals["tokens"]}
        total = metrics["mse"]
        if weights.lpips_weight:
            frames, weight_BG = random_frames(
                frame_key,
                rows_B,
                (output.reconstruction, target_BSD),
                segments_BS,
                config=config,
            )
            images = [frame.reshape(-1, *frame.shape[2:]) for frame in frames]
            distance_BG = lpips(lpips_params, *images, net=weights.lpips_net)
            distance_BG = distance_BG.reshape(weight_BG.shape)
            distance = jnp.sum(jnp.where(weight_BG > 0, weight_BG * distance_BG, 0.0))
            metrics["lpips"] = distance / totals["blocks"]
            total += weights.lpips_weight * metrics["lpips"]
        if output.kl_BS is not None:
            metrics["kl"] = kl_sum(output.kl_BS, keep_BS & valid_BS) / totals["blocks"]
            total += weights.kl_weight * metrics["kl"]
        metrics["kept_fraction"] = jnp.sum(keep_BS & valid_BS) / totals["tokens"]
        return total, {"loss": total, **metrics}

    return loss


def make_train_step(
    config: ml_collections.ConfigDict,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """train_step(state, batch, lpips_params) -> (state, metrics); pure, to be jitted and donated.

    The batch is cut into `optimizer.accumulate_steps` microbatches whose gradients add up to that
    of the batch; one optimizer update and one EMA update follow.
    """
    loss, per_block = make_loss(config), block_tokens(config)
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    pieces, decay = config.optimizer.accumulate_steps, config.optimizer.ema_decay

    def train_step(state: TrainState, batch: Batch, lpips_params):
        keys = step_keys(config, state.step)
        valid_BS = batch["segment_ids"] != 0
        totals = {
            "tokens": jnp.maximum(jnp.sum(valid_BS), 1).astype(jnp.float32),
            "blocks": jnp.maximum(jnp.sum(valid_BS[:, ::per_block]), 1).astype(jnp.float32),
        }
        grad = jax.grad(loss, has_aux=True)

        def gradients(piece: tuple[Batch, Array]):
            shared = dict(keys=keys, totals=totals, lpips_params=lpips_params)
            return grad(state.params, *piece, **shared)

        # Row r goes to microbatch r % pieces, so that rows stay on the devices that hold them.
        rows_B = jnp.arange(valid_BS.shape[0], dtype=jnp.int32)
        if pieces == 1:
            grads, metrics = gradients((batch, rows_B))
        else:
            cut = jax.tree.map(
                lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), (batch, rows_B)
            )
            shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], cut))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(
                lambda sums, piece: (jax.tree.map(jnp.add, sums, gradients(piece)), None),
                zeros,
                cut,
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            # A short memory at first, so that the average forgets the initial weights.
            rate = 1.0 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            ema_params = jax.tree.map(
                lambda average, value: average + rate * (value - average), ema_params, params
            )
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "padding_fraction": 1.0 - jnp.mean(valid_BS),
        }
        state = TrainState(
            step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
        )
        return state, metrics

    return train_step


def jit_train_step(config: ml_collections.ConfigDict, abstract: TrainState):
    """The step as it is run and as it is compiled for a pod that is not there: with the votes of
    processes, the state donated and laid out as `abstract_state` has it, metrics whole everywhere.
    Call or lower it inside `in_mesh`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    metrics = replicated(shardings.step.mesh)
    step = with_votes(make_train_step(config))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))


def make_eval_step(
    config: ml_collections.ConfigDict,
) -> Callable[[Any, Batch, Array], tuple[Metrics, Array]]:
    """eval_step(params, batch, fraction) -> (metrics, reconstruction float [B, S, D] in [-1, 1]).

    Every block keeps round(fraction * L) tokens. Sums are over valid tokens of the batch:
    "error" (clipped to [-1, 1] first, as the tokenizer reports it) and "tokens"; for FSQ also
    "codebook_counts" of the kept tokens. "block_error" [B, N] is the MSE of each block, nan where
    it is padding.
    """
    model, per_block = build_model(config), block_tokens(config)

    def eval_step(params, batch: Batch, fraction: Array):
        segments_BS = batch["segment_ids"]
        valid_BS = segments_BS != 0
        lengths = jnp.maximum(1, jnp.round(fraction * per_block)).astype(jnp.int32)
        blocks = segments_BS.shape[1] // per_block
        lengths_BN = jnp.full((segments_BS.shape[0], blocks), lengths)
        keep_BS = masking.keep_mask(lengths_BN, tokens_per_block=per_block)
        target_BSD = to_float(batch["patches"])
        places = sequence_layout(batch, tokens_per_block=per_block)
        output: Any = model.apply({"params": params}, target_BSD, keep_BS, places)
        reconstruction_BSD = jnp.clip(output.reconstruction, -1.0, 1.0)
        error_BS = jnp.mean((reconstruction_BSD - target_BSD) ** 2, axis=-1)
        error_BNL = error_BS.reshape(*lengths_BN.shape, per_block)
        valid_BN = valid_BS[:, ::per_block]
        metrics = {
            "error": squared_error_sum(reconstruction_BSD, target_BSD, valid_BS),
            "tokens": jnp.sum(valid_BS).astype(jnp.float32),
            "block_error": jnp.where(valid_BN, jnp.mean(error_BNL, axis=-1), jnp.nan),
        }
        if isinstance(model.bottleneck, FSQ):
            metrics["codebook_counts"] = codebook_counts(
                output.codes, keep_BS & valid_BS, codebook_size=model.bottleneck.codebook_size
            )
        return metrics, reconstruction_BSD

    return eval_step
