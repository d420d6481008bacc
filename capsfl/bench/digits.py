"""Images of digits as capsule papers use them: shifted in training, on a larger canvas, seen through affine maps."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates

# affNIST (Tieleman 2013): small rotations, shears and scalings of digits on a canvas of 40 pixels.
CANVAS = 40
ROTATION_DEGREES = 20.0
SHEAR = 0.2
SCALE = 0.2


def shift(images: Array, *, key: Array, pixels: int) -> Array:
    """Moves every image by whole pixels, at most `pixels` along each axis, zeros coming in (Sabour et al. 2017).

    Args:
        images: `(batch, height, width, 1)`.
        key: used for nothing else.
        pixels: the largest move.
    """
    if pixels == 0:
        return images
    moves = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    around = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    return _cut(around, moves, images.shape[1:])


def place(images: Array, *, key: Array, canvas: int = CANVAS) -> Array:
    """Puts every image at a random place of a black canvas, wholly inside.

    Args:
        images: `(batch, height, width, 1)`.
        key: used for nothing else.
        canvas: its side in pixels.
    """
    around, moves = _around(images, key, canvas)
    return _cut(around, moves, (canvas, canvas, images.shape[-1]))


def place_distorted(images: Array, *, key: Array, distortion_key: Array, canvas: int = CANVAS) -> Array:
    """Distorts every image about its own middle and puts it on a black canvas, all its ink inside.

    The places are those of `place` under the same key, but where a distorted digit would reach over the rim: there it
    is moved inwards by as many pixels. (Distorting the placed image about the canvas's middle would cut digits near the
    rim, and a network would be asked about what is not there.)

    Args:
        images: `(batch, side, side, 1)`, black around the digit.
        key: of the places.
        distortion_key: of `distort`.
        canvas: its side in pixels.
    """
    around, moves = _around(images, key, canvas)
    around = distort(around, key=distortion_key)
    for axis in (0, 1):
        first, last = _extent(around, axis)
        moves = moves.at[:, axis].set(jnp.maximum(jnp.minimum(moves[:, axis], first), last + 1 - canvas))
    return _cut(around, moves, (canvas, canvas, images.shape[-1]))


def distort(images: Array, *, key: Array) -> Array:
    """Turns, shears and scales every image about its middle, bilinear, zeros coming in.

    Angles up to 20 degrees to either side, shears up to 0.2, scales of each axis from 0.8 to 1.2, all uniform.

    Args:
        images: `(batch, side, side, 1)`.
        key: used for nothing else.
    """
    draws = jax.random.uniform(key, (len(images), 4), minval=-1.0, maxval=1.0)

    def one(image: Array, draw: Array) -> Array:
        angle = jnp.deg2rad(ROTATION_DEGREES) * draw[0]
        turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        lean = jnp.array([[1.0, SHEAR * draw[1]], [0.0, 1.0]])
        stretch = jnp.diag(1 + SCALE * draw[2:])
        middle = (image.shape[0] - 1) / 2
        rows, columns = jnp.indices(image.shape[:2], jnp.float32) - middle
        back = jnp.linalg.inv(turn @ lean @ stretch)
        seen = jnp.einsum("ij,jhw->ihw", back, jnp.stack([rows, columns])) + middle
        return map_coordinates(image[..., 0], list(seen), order=1, mode="constant")[..., None]

    return jax.vmap(one)(images, draws)


def _around(images: Array, key: Array, canvas: int) -> tuple[Array, Array]:
    """Images amid as much black as there is room on a canvas, and where the canvas begins, `(batch, 2)`."""
    room = canvas - images.shape[1]
    moves = jax.random.randint(key, (len(images), 2), 0, room + 1)
    return jnp.pad(images, ((0, 0), (room, room), (room, room), (0, 0))), moves


def _extent(images: Array, axis: int) -> tuple[Array, Array]:
    """The first and the last row (axis 0) or column (axis 1) with ink, `(batch,)` each."""
    inked = jnp.any(images[..., 0] > 0, axis=2 - axis)
    return jnp.argmax(inked, axis=1), inked.shape[1] - 1 - jnp.argmax(inked[:, ::-1], axis=1)


def _cut(around: Array, moves: Array, shape: tuple[int, ...]) -> Array:
    """The window of `shape` that begins at each image's move."""
    return jax.vmap(lambda image, move: jax.lax.dynamic_slice(image, (move[0], move[1], 0), shape))(around, moves)
