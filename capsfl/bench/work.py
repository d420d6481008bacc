"""Arithmetic and memory traffic of the operators, counted from their shapes.

Both are counts of the algorithm, not of a compiler's output: every multiplication and addition is one
operation, an exponential or a division too, and traffic is what must cross main memory when everything that
belongs together is fused. ``s`` is bytes per number, T iterations, V the number of votes (numbers, not
vectors), L the number of logits.

Stored votes, of which every use is one pass over them:

    forward     V + (T - 1)(4 V + 4 L) operations     2 T V + 4 (T - 1) L numbers moved
    backward    V + (T - 1)(8 V + 4 L)                (6 T - 3) V + 4 (T - 1) L

Forward, they are written once, then summed once per iteration and compared with the outputs once per
iteration but the last. Backward, each of these 2 T - 1 uses updates the votes' gradient (2 T - 1 writes and
2 T - 2 reads), the 2 T - 2 uses of a coupling read the votes again, and the two products that follow read the
gradient once each. The products that form the votes and their gradients come on top.
"""

from typing import NamedTuple


class Work(NamedTuple):
    """Arithmetic operations, and bytes that cross main memory."""

    flops: int
    bytes: int

    def plus(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def route_stored_votes(votes: int, logits: int, num_iters: int, itemsize: int, *, backward: bool) -> Work:
    """The routing of stored votes alone, forward or backward; see the module for the counts."""
    again = num_iters - 1
    if backward:
        flops = votes + again * (8 * votes + 4 * logits)
        moved = (6 * num_iters - 3) * votes + 4 * again * logits
    else:
        flops = votes + again * (4 * votes + 4 * logits)
        moved = 2 * num_iters * votes + 4 * again * logits
    return Work(flops, itemsize * moved)


def route_fully_connected(
    batch: int,
    inputs: int,
    depth: int,
    capsules: int,
    dim: int,
    num_iters: int,
    itemsize: int,
    *,
    stored: bool,
    gradient: bool,
) -> Work:
    """Fully connected capsules, inputs (B, N, D) and weights (N, M, K, D), forward or with its gradient.

    With G = 2 B N M K D, the operations of one product, and X = B N D + N M K D numbers of inputs and weights:

        stored forward      G and the routing; X and the routing
        stored backward     2 G and the routing; 2 X and the routing
        streamed forward    G + (T - 1)(2 G + 3 B N M D + 4 L); T X
        streamed backward   2 G + (T - 1)(5 G + 10 B N M D + 8 L); T X + (2 T - 1) X

    A streamed iteration projects (Wᵀ V) and sums (W (c u)), both products; its backward pass repeats the
    projection and has four more. Every pass reads inputs and weights, and backward updates their gradients.
    """
    votes, logits = batch * inputs * capsules * dim, batch * inputs * capsules
    product = 2 * votes * depth
    ends = batch * inputs * depth + inputs * capsules * dim * depth
    result = batch * capsules * dim
    again = num_iters - 1
    scaled = logits * depth
    if stored:
        forward = Work(product, itemsize * (ends + result)).plus(
            route_stored_votes(votes, logits, num_iters, itemsize, backward=False)
        )
        backward = Work(2 * product, itemsize * (2 * ends + result)).plus(
            route_stored_votes(votes, logits, num_iters, itemsize, backward=True)
        )
    else:
        forward = Work(
            product + again * (2 * product + 3 * scaled + 4 * logits), itemsize * (num_iters * ends + result)
        )
        backward = Work(
            2 * product + again * (5 * product + 10 * scaled + 8 * logits),
            itemsize * ((3 * num_iters - 1) * ends + result),
        )
    return forward.plus(backward) if gradient else forward


def route_convolutional(
    positions: int,
    pixels: int,
    types: int,
    depth: int,
    taps: float,
    capsules: int,
    dim: int,
    num_iters: int,
    itemsize: int,
    *,
    kernel: int,
    stored: bool,
    gradient: bool,
) -> Work:
    """Convolutional capsules over one image, forward or with the gradient.

    With G = 2 V taps A operations of the convolution and R those of the routing (as for stored votes):

        forward             G + R
        stored backward     2 G + R'
        streamed backward   3 G + R + R', for the votes are formed again

    Stored votes move as the module says. Streamed ones stay in the caches: the layer reads its inputs and
    kernel and writes its outputs; backward it reads inputs, kernel and the outputs' gradient and writes two
    gradients. Rows that neighbouring strips share are not counted twice.

    Args:
        positions: Of the output image.
        pixels: Of the input image.
        types: I, input types; 1 where the votes are never formed (M = 1 or T = 1).
        depth: A, dimension of the inputs.
        taps: Of the kernel, that reach one output on average.
        capsules: M, output types.
        dim: K, dimension of the outputs.
        num_iters: T.
        itemsize: Bytes per number.
        kernel: Numbers in the kernel.
        stored: Whether votes are kept in memory.
        gradient: Whether the gradient is computed too.
    """
    logits = positions * types * capsules
    votes = logits * dim
    product = round(2 * votes * taps * depth)
    ends = pixels * types * depth + kernel
    result = positions * capsules * dim
    routed = route_stored_votes(votes, logits, num_iters, itemsize, backward=False)
    returned = route_stored_votes(votes, logits, num_iters, itemsize, backward=True)
    if stored:
        forward = Work(product, itemsize * (ends + result)).plus(routed)
        backward = Work(2 * product, itemsize * (2 * ends + result)).plus(returned)
    else:
        forward = Work(product + routed.flops, itemsize * (ends + result))
        backward = Work(3 * product + routed.flops + returned.flops, itemsize * (2 * ends + result))
    return forward.plus(backward) if gradient else forward


def route_em_votes(votes: int, logits: int, num_iters: int, itemsize: int, *, stored: bool, backward: bool) -> Work:
    """EM routing of given votes, forward or backward.

    An M step takes 6 V operations (mean and variance), an E step 4 V + 4 L; backward each takes twice that.
    Stored votes are one pass for the mean, one for the variance and one for the E step: U = 3 T - 1 passes.
    Streamed, each iteration is one pass, and the backward pass repeats the E steps.

        stored forward      U V numbers moved
        stored backward     U V + (2 U - 1) V
        streamed forward    T V
        streamed backward   T V + (2 T - 1) V
    """
    expect = (num_iters - 1) * (4 * votes + 4 * logits)
    flops = num_iters * 6 * votes + expect
    uses = 3 * num_iters - 1 if stored else num_iters
    if not backward:
        return Work(flops, itemsize * uses * votes)
    return Work(2 * flops + (0 if stored else expect), itemsize * (3 * uses - 1) * votes)


def route_em_capsules(
    batch: int,
    inputs: int,
    outputs: int,
    rows: int,
    inner: int,
    columns: int,
    num_iters: int,
    itemsize: int,
    *,
    stored: bool,
    gradient: bool,
) -> Work:
    """EM routing of matrix capsules, poses (B, I, P, Q) and weights (I, J, Q, R), forward or with its gradient.

    With G = 2 B I J P Q R operations to form the votes, X numbers of poses, activations and weights, and the
    routing as in `route_em_votes`:

        stored forward      G and the routing; X + V and the routing
        stored backward     2 G and the routing; 2 X + 2 V and the routing
        streamed forward    T G and the routing's operations; T X
        streamed backward   3 T G and the routing's operations; (3 T - 1) X
    """
    logits = batch * inputs * outputs
    votes = logits * rows * columns
    product = 2 * votes * inner
    ends = batch * inputs * (rows * inner + 1) + inputs * outputs * inner * columns
    routed = route_em_votes(votes, logits, num_iters, itemsize, stored=stored, backward=False)
    returned = route_em_votes(votes, logits, num_iters, itemsize, stored=stored, backward=True)
    if stored:
        forward = Work(product, itemsize * (ends + votes)).plus(routed)
        backward = Work(2 * product, itemsize * 2 * (ends + votes)).plus(returned)
    else:
        forward = Work(num_iters * product + routed.flops, itemsize * num_iters * ends)
        backward = Work(3 * num_iters * product + returned.flops, itemsize * (3 * num_iters - 1) * ends)
    return forward.plus(backward) if gradient else forward
