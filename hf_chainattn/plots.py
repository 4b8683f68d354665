"""Pictures of where outputs came from. They need matplotlib: ``pip install "hf-chain-highway-certify[plots]"``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# more names than this cannot be read beside one another
_MOST_NAMES = 40
_COLORS, _BAR, _REST = "Blues", "#1f6feb", "#b8c1cc"


def plot_mixing(matrix: Tensor, *, tokens: Sequence[str] | None = None, axes: "Axes | None" = None) -> "Axes":
    """Return a picture of a mixing matrix: a row for every output, a column for every value it may be made of.

    An attention matrix can be drawn in the same way, for comparison. The shade follows the square root of the weight,
    so that small weights stay visible beside a token that collects most of them. Nothing is shown on the screen by
    this function; ``axes.figure.savefig("mixing.png")`` writes it.

    Args:
        matrix: ``[T, T]``, of one sequence and head, as ``mixing_matrix(...)[0, 0]``.
        tokens: ``T`` names for rows and columns; written out up to 40 of them. ``None``: numbers.
        axes: Where to draw. ``None``: a new figure of matplotlib's pyplot.

    Returns:
        The axes that were drawn on.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> from hf_chainattn.analysis import mixing_matrix
        >>> query, key = torch.randn(2, 1, 1, 4, 8).unbind(0)
        >>> axes = plot_mixing(mixing_matrix(query, key, gamma=0.9)[0, 0], tokens=["a", "is", "b", "?"])
        >>> axes.get_xlabel()
        'value read from'
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must have the shape [T, T], one sequence and one head, got {list(matrix.shape)}.")
    count = matrix.shape[0]
    _check_names(tokens, count)
    axes = _new_axes(count, count) if axes is None else axes
    _draw_weights(axes, matrix)
    _name_ticks(axes, "x", count, tokens, turned=True)
    _name_ticks(axes, "y", count, tokens)
    axes.set(xlabel="value read from", ylabel="output of")
    return axes


def plot_hops(distribution: Tensor, *, tokens: Sequence[str] | None = None, axes: "Axes | None" = None) -> "Axes":
    """Return a picture of how many moves the walk made: bars for one output, a table of shades for several.

    The last column is the rest to 1: walks with more moves, and with ``diagonal="removed"`` what that convention
    drops. Shades follow the square root, as in ``plot_mixing``. Nothing is shown on the screen by this function.

    Args:
        distribution: ``[K + 1]`` or ``[T, K + 1]``, as ``hop_distribution(...)[0, 0]``, or a mean of several.
        tokens: ``T`` names for the rows; written out up to 40 of them. ``None``: numbers. Not used for one output.
        axes: Where to draw. ``None``: a new figure of matplotlib's pyplot.

    Returns:
        The axes that were drawn on.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> from hf_chainattn.analysis import hop_distribution
        >>> query, key = torch.randn(2, 1, 1, 4, 8).unbind(0)
        >>> axes = plot_hops(hop_distribution(query, key, gamma=0.9, max_moves=3)[0, 0].mean(0))
        >>> axes.get_xlabel()
        'moves between tokens'
    """
    if distribution.ndim not in (1, 2) or distribution.shape[-1] == 0:
        raise ValueError(f"distribution must have the shape [K + 1] or [T, K + 1], got {list(distribution.shape)}.")
    moves = distribution.shape[-1]
    rest = (1 - distribution.sum(-1, keepdim=True)).clamp(min=0.0)
    shares = torch.cat([distribution, rest], -1)
    names = [*map(str, range(moves)), "rest"]
    if distribution.ndim == 1:
        axes = _new_axes(5, max(moves + 1, 8)) if axes is None else axes
        axes.bar(range(moves + 1), _array(shares), color=[_BAR] * moves + [_REST], width=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(ylabel="share of the output", ylim=(0, None), xlim=(-0.6, moves + 0.6))
    else:
        count = distribution.shape[0]
        _check_names(tokens, count)
        axes = _new_axes(count, moves + 1) if axes is None else axes
        _draw_weights(axes, shares, label="share of the output", square=False)
        _name_ticks(axes, "y", count, tokens)
        axes.axvline(moves - 0.5, color="#5b6675", linewidth=1)
        axes.set(ylabel="output of")
    _name_ticks(axes, "x", moves + 1, names)
    axes.set_xlabel("moves between tokens")
    return axes


def _pyplot() -> Any:  # noqa: ANN401  a module of an optional dependency
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib, which is not installed: pip install "hf-chain-highway-certify[plots]".'
        ) from error
    return pyplot


def _new_axes(rows: int, columns: int) -> "Axes":
    """Return empty axes with room for so many rows and columns."""
    width, height = (min(max(0.3 * count, 2.4), 8.0) for count in (columns, rows))
    # beside the cells: names, labels and the scale of colors
    _, axes = _pyplot().subplots(figsize=(width + 2.0, height + 1.0), layout="constrained")
    return axes


def _check_names(tokens: Sequence[str] | None, count: int) -> None:
    if tokens is not None and len(tokens) != count:
        raise ValueError(f"tokens must hold a name for each of the {count} rows, got {len(tokens)}.")


def _array(tensor: Tensor) -> Any:  # noqa: ANN401  the array type of an optional dependency
    # NumPy has no bfloat16
    return tensor.detach().float().cpu().numpy()


def _draw_weights(axes: "Axes", weights: Tensor, *, label: str = "weight", square: bool = True) -> None:
    """Draw ``[rows, columns]`` as shades of the square root, from 0 to the largest, with a scale beside them."""
    from matplotlib.colors import PowerNorm

    largest = float(weights.max()) if weights.numel() else 0.0
    image = axes.imshow(
        _array(weights),
        cmap=_COLORS,
        # on a linear scale a matrix with one large column would show nothing else
        norm=PowerNorm(0.5, vmin=0.0, vmax=largest or 1.0),
        aspect="equal" if square else "auto",
        interpolation="none",
    )
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.9)


def _name_ticks(axes: "Axes", which: str, count: int, names: Sequence[str] | None, *, turned: bool = False) -> None:
    """Write the names along an axis, or numbers where there are none or too many."""
    axis = getattr(axes, f"{which}axis")
    if names is None or count > _MOST_NAMES:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        return
    # a token may be a line break, or hold a dollar sign, which must not begin a formula
    written = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in names]
    turned = turned and count > 4 and max(map(len, written)) > 2
    axis.set_ticks(range(count), labels=written, parse_math=False, fontsize=9, rotation=90 if turned else 0)
    axis.set_tick_params(length=0)
