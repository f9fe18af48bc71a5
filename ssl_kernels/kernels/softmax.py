r"""The softmax contrastive losses on tiles: what the two visits to them compute, and what they share.

For panels x [m, D] and y [n, D], scale t and

    raw_ij = x_i . y_j            fp32 accumulator of the matrix product
    z_ij   = t raw_ij

a first visit to the tiles (softmax_stats.py) merges into running statistics of each row, and of each column, over the
pairs that are kept

    maximum of raw, sum of exp(t (raw - maximum)), sum of raw over positives, number of positives
    and for label smoothing: sum of raw, number of pairs

A second visit (softmax_grad.py), with maxima mr_i and mc_j, weights a_i and b_j over the sums, and p, q, u, v that the
loss chooses, writes

    G_ij = a_i exp(t (raw_ij - mr_i)) + b_j exp(t (raw_ij - mc_j)) - [ij positive] (p_i + q_j) - (u_i + v_j)

and zero for pairs that are left out. Whatever else multiplies the gradient multiplies the fp32 products made of G.

One exponential per element and visit, though rows and columns have different maxima. Everything is in base 2, with
log2(e) folded into t. Masks are made in the tile, from positions and ids. Diagonals and ragged edges are dealt with
where they are, behind branches that are uniform over the program; with ids every pair is compared, in 64 bits.

Both visits read (1 / block_m + 1 / block_n) D elements per similarity, shared in L2 by the grouped order of the
programs. Their instructions are counted in code that was compiled for sm_90 and followed, not timed: a tile of
256 x 128 in bf16, D = 768, that meets neither an edge nor a diagonal, 2 D FLOP per element on the tensor cores
(tests/triton_kernels/ keeps the figures).
"""

from __future__ import annotations

from dataclasses import replace

from ssl_kernels.kernels.configs import HAS_OLD_TRITON, Config, narrowed


def config_for(config: Config, family: str, has_ids: bool, smoothed: bool, with_grad: bool = False) -> Config:
    """The configuration where registers are scarce: with the masks of ids, but on AMD, whose wider wavefronts have some
    to spare; with the vectors of label smoothing, where tiles fill them; and on sm_100, where a thread has a row of the
    product, and with it a number of every vector of columns."""
    if HAS_OLD_TRITON:
        if has_ids and family == "sm_100":  # other tiles make the compiler fail
            return replace(config, block_m=64, block_n=64, num_warps=8, halves=True, blocks=1)
        if has_ids:
            return replace(narrowed(config, 32 if config.num_warps == 8 else 16), halves=config.halves)
        if family == "sm_100" and (config.block_d, config.num_warps) == (16, 8):  # products in fp32, in registers
            return replace(config, block_d=32)
        smoothed |= with_grad
    if family == "sm_100" and config.num_warps == 4 and config.block_n == 64:
        return replace(config, num_warps=8, blocks=1)
    if has_ids and family != "gfx9":
        return narrowed(config, 32 if config.halves or config.num_warps == 8 else 16)
    if smoothed and config.descriptors:
        return replace(narrowed(config, 64 if family == "sm_90" else 32), halves=True)
    return config
