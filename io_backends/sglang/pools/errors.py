"""Why a pool is not served, and rows that cannot be copied whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UnsupportedPoolError(ValueError):
    """A pool that cannot be described; the message says why, as a sentence for the operator."""


class ShortHostRowsError(UnsupportedPoolError):
    """Host rows do not hold what device rows do: whoever copies them, bytes are lost. No server may start."""


def check_rows(name: str, rows: Sequence[Any], host_bytes: int) -> int:
    """Bytes between the device rows of one component, which fit host rows of ``host_bytes`` exactly.

    Args:
        name: of the component, for messages.
        rows: device tensors, one a layer, rows along their first axis.
        host_bytes: of one row of one layer on the host.

    Raises:
        ShortHostRowsError: a device row is longer.
        UnsupportedPoolError: a device row is shorter or not in one piece, a layer has none, or the layers'
            strides differ.
    """
    if not all(tensor.shape[0] for tensor in rows):
        raise UnsupportedPoolError("a layer has no device rows")
    device_bytes = max(int(tensor[0].numel()) * tensor.element_size() for tensor in rows)
    if device_bytes > host_bytes:
        raise ShortHostRowsError(
            f"{name}: a host row has {host_bytes} bytes, and the device row that it is for {device_bytes}: "
            "what is loaded back would not be what was written"
        )
    strides: set[int] = {int(tensor.stride(0)) * tensor.element_size() for tensor in rows}
    if len(strides) != 1:
        raise UnsupportedPoolError(f"its device rows do not share one stride ({sorted(strides)} bytes)")
    for tensor in rows:
        # One row must lie in one piece: every axis after the first is packed.
        if not tensor[0].is_contiguous():
            raise UnsupportedPoolError(f"its device rows are not contiguous ({tuple(tensor.stride())})")
        if int(tensor[0].numel()) * tensor.element_size() != host_bytes:
            raise UnsupportedPoolError(
                f"a device row has {int(tensor[0].numel()) * tensor.element_size()} bytes, a host row "
                f"{host_bytes}"
            )
    return strides.pop()
