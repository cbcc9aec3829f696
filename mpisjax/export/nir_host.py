"""Layers of a network with everything folded in, and the head, which the host of a NIR graph computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpisjax.export import polyphase
from mpisjax.export.polyphase import Folded
from mpisjax.nn.mpis import MPIS

LayerCall = Callable[..., Any]  # `call(net, x)` applies one layer of the bound network


def fold_layer(
    net: MPIS, variables: dict[str, Any], call: LayerCall, kernel: int, stride: int, channels: int
) -> Folded:
    """A convolution of the network as it computes in evaluation.

    Args:
        net: The network.
        variables: `{"params": ..., "batch_stats": ...}`.
        call: `call(net, x)` applies the layer.
        kernel: The side of its kernel.
        stride: Its stride.
        channels: Of its input.
    """
    side = 4 * kernel  # large enough for a pixel that meets the whole kernel
    return polyphase.fold(
        lambda x: net.apply(variables, x, method=call), kernel, stride, channels, (side, side)
    )


def head_weights(net: MPIS, variables: dict[str, Any]) -> dict[str, Any]:
    """The weights of the head by layer: convolutions and mix of the fused head, and the classifier."""
    found: dict[str, Any] = {}
    width = net.layers[-1]
    if net.head == "fused":
        for i in range(net.num_streams - 1):
            for hop in range(net.num_streams - 1 - i):

                def call(module: Any, x: Any, i: int = i, hop: int = hop) -> Any:
                    return module.head_down[i][hop](x, False)

                layer = fold_layer(net, variables, call, net.kernel_size, 2, width)
                found[f"stream{i + 1}_conv{hop + 1}"] = layer._asdict()
        found["mix"] = fold_layer(net, variables, lambda m, x: m.mix(x, False), 1, 1, width)._asdict()
    dense = variables["params"]["classifier"]
    found["classifier"] = {name: np.asarray(dense[name]) for name in ("kernel", "bias")}
    return found
