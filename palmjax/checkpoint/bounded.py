"""An Orbax handler that copies a state to the host a few arrays at a time, each written before the next is copied.

Its copies are made in the background from arrays that must not change meanwhile, so a save has to be waited for. Orbax
0.12.8 decides by a callback which arrays it copies so; its bound alone changes nothing. The callback's types are not
public: they are imported from where its own documentation does.
"""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.serialization import types


class _Later(types.DefaultSerializationStatusCallback):
    """Every array is copied in the background, within the bound."""

    def key_priority(self, _: Any) -> types.TransferPriority:
        return types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def arrays(host_bytes: int) -> ocp.PyTreeCheckpointHandler:
    """For trees of jax.Arrays; writes the same files as Orbax's usual handler, uncompressed.

    host_bytes: of this process's parts of whole arrays that are copied at once; at least one array is.
    """
    each = ocp.type_handlers.ArrayHandler(array_metadata_store=array_metadata_store.Store(), callback=_Later())
    base = ocp.BasePyTreeCheckpointHandler(
        use_compression=False,
        save_device_host_concurrent_bytes=host_bytes,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, each)),
    )
    return ocp.PyTreeCheckpointHandler(handler_impl=base)
