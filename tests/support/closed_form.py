"""How many cells a plan by strides has, in closed form: derived apart from the code that builds plans."""

from __future__ import annotations

from crop.geometry.strides import check_strides


def _blocks(low: int, high: int, stride: int) -> int:
    """Blocks of ``stride`` tokens that [low, high) touches."""
    return -(-high // stride) - low // stride


def _enclosed(inner: tuple[int, int], outer: tuple[int, int], stride: int) -> int:
    """Blocks of ``outer`` (cut to it) that lie wholly in ``inner``, a part of ``outer``."""
    first = outer[0] // stride if inner[0] == outer[0] else -(-inner[0] // stride)
    last = -(-outer[1] // stride) if inner[1] == outer[1] else inner[1] // stride
    return max(0, last - first)


def count_cells(
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    ring: int,
    strides: tuple[int, int, int],
) -> int:
    """Number of cells of one token grid with one rectangular region, in closed form.

    ``blocks(box, inside) + blocks(ringbox, context) - enclosed(box in ringbox, context) +
    blocks(grid, outside) - enclosed(ringbox in grid, outside)``, each the product over both axes.

    Args:
        height, width: the token grid.
        box: (x0, y0, x1, y1) tokens, half open, clipped to the grid; may be empty.
        ring: Chebyshev dilation of the box by this many tokens, clipped to the grid.
        strides: (inside, context, outside).
    Returns:
        ``plan.num_out`` of the plan for these levels and strides.
    Raises:
        ValueError: negative size or ring, strides not ascending in 1..16.
    Source: own choice; derived for cells cut at the level borders.
    """
    check_strides("count_cells", strides)
    if min(height, width, ring) < 0:
        raise ValueError(f"count_cells: height, width and ring must be >= 0, got {height}, {width}, {ring}")
    inside, context, outside = strides
    sizes = (width, height)
    grid = [(0, size) for size in sizes]
    core = [(max(0, box[axis]), min(sizes[axis], box[axis + 2])) for axis in (0, 1)]
    if any(low >= high for low, high in core):
        return _blocks(*grid[0], outside) * _blocks(*grid[1], outside)
    halo = [(max(0, low - ring), min(size, high + ring)) for (low, high), size in zip(core, sizes, strict=True)]

    def product(function, *axes) -> int:
        return function(*axes[0]) * function(*axes[1])

    total = product(_blocks, *((low, high, inside) for low, high in core))
    for outer, inner, stride in ((halo, core, context), (grid, halo, outside)):
        total += product(_blocks, *((low, high, stride) for low, high in outer))
        total -= product(_enclosed, *((a, b, stride) for a, b in zip(inner, outer, strict=True)))
    return total
