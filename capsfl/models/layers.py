"""The layers both networks are made of: plain convolution and primary, dense and convolutional capsules."""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from capsfl_kernels import conv_capsules, dynamic_routing, em_capsules, self_attention_routing, squash
from flax import nnx
from jax import Array
from jax.core import Tracer

from capsfl.models.convolution import convolve

# Numbers drawn at once. XLA compiles a draw anew for each shape, half a second apiece; one shape serves all.
_BLOCK = 1 << 14

# Standard deviation of a normal cut off at two standard deviations.
_TRUNCATED_DEVIATION = 0.87962566103423978

# The digit layer's weights start at this deviation in the code that accompanies Sabour et al. 2017.
_DENSE_DEVIATION = 0.1

# Convolutional matrix capsules start at this deviation in the code that accompanies Hinton et al. 2018.
_MATRIX_DEVIATION = 0.3

# The capsule bias of LaLonde & Bagci 2018; it keeps an empty image away from the zero vector.
_CAPSULE_BIAS = 0.1


def he_normal(key: Array, shape: tuple[int, ...], *, block: int = _BLOCK) -> Array:
    """Draw weights `(..., fan_out)` of variance 2 / fan_in (He et al. 2015, equation 10).

    From a normal cut off at two standard deviations, as Keras and so the SegCaps code draw it. `block` numbers are
    drawn at once; another size gives other numbers.
    """
    size = prod(shape)
    draws = [_truncated_normal(jax.random.fold_in(key, number), block) for number in range(-(-size // block))]
    scale = (2 / prod(shape[:-1])) ** 0.5 / _TRUNCATED_DEVIATION
    if isinstance(key, Tracer):
        return scale * jnp.concatenate(draws)[:size].reshape(shape)
    # Put together by NumPy, where JAX would compile three operations for each shape of a network.
    return jnp.asarray(scale * np.concatenate([np.asarray(draw) for draw in draws])[:size].reshape(shape))


@partial(jax.jit, static_argnums=1)
def _truncated_normal(key: Array, block: int) -> Array:
    return jax.random.truncated_normal(key, -2, 2, (block,))


def capsule_lengths(capsules: Array) -> Array:
    """Return the Euclidean length of each capsule `(..., dim)` as `(...)`, in [0, 1] after a squash.

    The gradient at the zero vector is zero, where that of a plain norm is undefined.
    """
    squares = jnp.sum(jnp.square(capsules), axis=-1)
    positive = squares > 0
    lengths = jnp.sqrt(jnp.where(positive, squares, 1))
    # Rounding may push the length of a saturated capsule above one.
    return jnp.minimum(jnp.where(positive, lengths, 0), 1)


class Conv(nnx.Module):
    """A plain convolution of `(batch, height, width, in_channels)` with a bias that starts at zero.

    He-normal weights (He et al. 2015).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        strides: int = 1,
        padding: str = "SAME",
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(he_normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.strides = strides
        self.padding = padding

    def __call__(self, images: Array) -> Array:
        """Return `(batch, height', width', out_channels)`."""
        outputs = convolve(images, self.kernel[...], strides=self.strides, padding=self.padding)
        return outputs + self.bias[...].reshape(1, 1, 1, -1)


class PrimaryCapsules(nnx.Module):
    """A valid convolution whose channels are read as squashed capsules (Sabour et al. 2017, section 4)."""

    def __init__(
        self,
        in_channels: int,
        out_capsules: int,
        out_dim: int,
        kernel_size: int,
        *,
        strides: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv(in_channels, out_capsules * out_dim, kernel_size, strides=strides, padding="VALID", rngs=rngs)
        self.out_dim = out_dim

    def __call__(self, images: Array) -> Array:
        """Map `(batch, height, width, channels)` to `(batch, height' * width' * out_capsules, out_dim)`."""
        outputs = self.conv(images)
        return squash(outputs.reshape(outputs.shape[0], -1, self.out_dim))


class DenseCapsules(nnx.Module):
    """Every input capsule votes for every output capsule (DigitCaps; Sabour et al. 2017, equations 2, 3)."""

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        num_iters: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_capsules, out_capsules, out_dim, in_dim)
        self.weights = nnx.Param(_DENSE_DEVIATION * jax.random.normal(rngs.params(), shape))
        self.num_iters = num_iters

    def __call__(self, capsules: Array) -> Array:
        """Route `(batch, in_capsules, in_dim)` to `(batch, out_capsules, out_dim)`."""
        return dynamic_routing(capsules, self.weights[...], num_iters=self.num_iters)


class SelfAttentionCapsules(nnx.Module):
    """Every input capsule votes for every output capsule, routed once (Mazzia et al. 2021).

    Starts as in the authors' code: he-normal weights with the fan-in of all input capsules times all outputs,
    a log prior of zero.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        drawn = he_normal(rngs.params(), (out_capsules, in_capsules, in_dim, out_dim))
        self.weights = nnx.Param(drawn.transpose(1, 0, 3, 2))
        self.bias = nnx.Param(jnp.zeros((in_capsules, out_capsules), jnp.float32))

    def __call__(self, capsules: Array) -> Array:
        """Route `(batch, in_capsules, in_dim)` to `(batch, out_capsules, out_dim)`."""
        return self_attention_routing(capsules, self.weights[...], self.bias[...])


class EMCapsules(nnx.Module):
    """Every matrix capsule votes for every output capsule, routed by EM (Hinton, Sabour & Frosst 2018).

    Poses are matrices `(rows, inner)` and votes their products with `(inner, columns)`; 4 x 4 in the paper.
    The weights start normal, as those of the convolutional capsules in the authors' code, both costs at zero.
    """

    def __init__(
        self,
        in_capsules: int,
        out_capsules: int,
        *,
        inner: int = 4,
        columns: int = 4,
        num_iters: int = 3,
        final_lambda: float = 0.01,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_capsules, out_capsules, inner, columns)
        self.weights = nnx.Param(_MATRIX_DEVIATION * jax.random.normal(rngs.params(), shape))
        self.activation_benefit = nnx.Param(jnp.zeros(out_capsules, jnp.float32))
        self.description_cost = nnx.Param(jnp.zeros(out_capsules, jnp.float32))
        self.num_iters = num_iters
        self.final_lambda = final_lambda

    def __call__(self, poses: Array, activations: Array) -> tuple[Array, Array]:
        """Route poses and activations.

        Args:
            poses: `(batch, in_capsules, rows, inner)`.
            activations: `(batch, in_capsules)` in [0, 1].

        Returns:
            Poses `(batch, out_capsules, rows, columns)` and activations `(batch, out_capsules)` in [0, 1].
        """
        return em_capsules(
            poses,
            activations,
            self.weights[...],
            self.activation_benefit[...],
            self.description_cost[...],
            num_iters=self.num_iters,
            final_lambda=self.final_lambda,
        )


class ConvCapsules(nnx.Module):
    """Convolutional capsules, one kernel shared by all input types, routed at each position.

    LaLonde & Bagci 2018, section 2.1; `transpose=True` is their deconvolutional capsule, which multiplies
    height and width by `strides`. `implementation` is that of `capsfl_kernels.conv_capsules`.
    """

    def __init__(
        self,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        kernel_size: int,
        *,
        strides: int = 1,
        transpose: bool = False,
        num_iters: int = 3,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        # The fan-in is that of the flat kernel (k, k, in_dim, out_capsules * out_dim).
        flat = he_normal(rngs.params(), (kernel_size, kernel_size, in_dim, out_capsules * out_dim))
        self.kernel = nnx.Param(flat.reshape(kernel_size, kernel_size, in_dim, out_capsules, out_dim))
        # Without a dtype the bias is weakly typed until its first update, which then compiles a step anew.
        self.bias = nnx.Param(jnp.full((out_capsules, out_dim), _CAPSULE_BIAS, jnp.float32))
        self.strides = strides
        self.transpose = transpose
        self.num_iters = num_iters
        self.implementation = implementation

    @property
    def capsules(self) -> int:
        """Types of the output."""
        return len(self.bias)

    def first_length(self, in_capsules: int) -> float:
        """Return the root mean square length, before its squash, that he-normal votes give an output capsule.

        Of `in_capsules` types whose vectors have unit mean square length and directions that do not agree, equally
        coupled; the bias is left out. A window of stride `s` that is transposed meets one in `s * s` of its weights.
        """
        window, _, in_dim, capsules, dim = self.kernel.shape
        met = (window / self.strides) ** 2 if self.transpose else window**2
        variance = 2 / (window**2 * in_dim)
        return (in_capsules * dim * met * variance) ** 0.5 / capsules

    def __call__(self, capsules: Array | tuple[Array, ...]) -> Array:
        """Map `(batch, in, height, width, in_dim)` capsules to `(batch, out, height', width', out_dim)`.

        Several arrays count as one joined on axis 1: a skip connection that is never stored a second time.
        """
        return conv_capsules(
            capsules,
            self.kernel[...],
            self.bias[...],
            strides=self.strides,
            transpose=self.transpose,
            num_iters=self.num_iters,
            implementation=self.implementation,
        )
