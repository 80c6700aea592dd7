"""Halving: sums whose bits do not depend on the machine, the number of threads or the vector unit.

Adding the second half of a row onto the first, again and again, is elementwise addition only, which
IEEE rounds the same everywhere; a library's own sum is not.
"""

from torch import Tensor


def row_sums(rows: Tensor) -> Tensor:
    """The sum of each row of a (rows, width) tensor; reads it once and a bit, keeps it as it is."""
    width = rows.shape[1]
    if width == 1:
        return rows[:, 0].clone()
    while width > 1:
        half = width // 2
        odd = rows[:, width - 1 :] if width % 2 else None
        rows = rows[:, :half] + rows[:, half : 2 * half]
        if odd is not None:
            rows[:, :1] += odd
        width = half
    return rows[:, 0]
