"""A picture of the two streams, drawn from the network itself.

python -m tools.streams            # writes docs/streams.svg

Which population feeds which is found by trying: a source is set to NaN, and the currents that become NAN depend on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mpisjax
from configs import fashion_mnist
from mpisjax.nn import MPIS

PICTURE = Path(__file__).parents[1] / "docs" / "streams.svg"
WIDTH, HEIGHT, ROW, COLUMN, LEFT = 136, 60, 124, 184, 192
STYLE = (
    "text{font:16px sans-serif;text-anchor:middle;fill:#1d2733}.small{font-size:14px;fill:#55606e}"
    "rect{fill:#e8eefb;stroke:#3f51b5;stroke-width:1.4}.plain rect{fill:#f3f3f3;stroke:#8a8f98}"
    "path{fill:none;stroke:#55606e;stroke-width:1.6}.back{stroke:#d2691e;stroke-dasharray:5 3}.fuse{stroke:#2e8b57}"
    "#tip path{fill:#55606e;stroke:none}.label{font-size:14px}"
)


def fashion_network() -> tuple[MPIS, tuple[int, int, int]]:
    """The paper's Fashion-MNIST network, and the shape of an image."""
    model = fashion_mnist.get_config().model
    net = MPIS(
        num_classes=10,
        stem=model.stem,
        layers=model.layers,
        num_streams=model.num_streams,
        fusion_layer=model.fusion_layer,
    )
    return net, (28, 28, 1)


def connections(net: MPIS, shape: tuple[int, ...]) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """The shape of every population's current, and every pair (source, population that it reaches directly).

    A source is a population, "input" or, for the rates that are fed back, a stream's name.
    """
    images = jnp.zeros((1, *shape))
    rates = net.initial_rates(images)
    variables = mpisjax.nn.init_variables(net, jax.random.key(0), images, mpisjax.IF())

    def currents(bad: str) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}

        def fire(name: str, current: jax.Array, neuron: Any = None) -> jax.Array:
            found[name] = current
            return jnp.full_like(current, jnp.nan if name == bad else 0)

        x = net.apply(variables, images + (jnp.nan if bad == "input" else 0), False, method="encode")
        fed = {name: jnp.full_like(r, jnp.nan if name == bad else 0) for name, r in rates.items()}
        net.apply(variables, fed, x, fire, False, method="transition")
        return found

    with mpisjax.cpu.disabled():
        shapes = {name: c.shape[1:] for name, c in currents("").items()}
        sources = ["input", *rates, *shapes]
        reached = {(s, n) for s in sources for n, c in currents(s).items() if bool(jnp.isnan(c).any())}
    return shapes, reached


def picture() -> str:
    """The picture, an SVG."""
    net, shape = fashion_network()
    shapes, reached = connections(net, shape)
    depth, streams = len(net.layers), net.num_streams
    middle = 44 + (streams - 1) * ROW / 2
    place = {
        f"stream{i + 1}/layer{k + 1}": (LEFT + k * COLUMN, 44 + i * ROW) for i in range(streams) for k in range(depth)
    }
    place |= {"input": (14, 44.0), "classes": (LEFT + depth * COLUMN, middle)}
    boxes, arrows = [], []

    def box(name: str, lines: list[str], plain: bool = False) -> None:
        x, y = place[name]
        texts = "".join(
            f'<text x="{x + WIDTH / 2:g}" y="{y + 26 + 20 * n:g}"'
            f"{' class=' + chr(34) + 'small' + chr(34) if n else ''}>{line}</text>"
            for n, line in enumerate(lines)
        )
        rect = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        boxes.append(f"<g{' class=' + chr(34) + 'plain' + chr(34) if plain else ''}>{rect}{texts}</g>")

    def arrow(a: str, b: str, kind: str = "") -> None:
        (x1, y1), (x2, y2) = place[a], place[b]
        if kind == "back":  # from a stream's last layer over its top to its first
            up = y1 - 26
            line = f"M{x1 + WIDTH / 2:g} {y1:g} V{up + 8:g} Q{x1 + WIDTH / 2:g} {up:g} {x1 + WIDTH / 2 - 8:g} {up:g} "
            line += f"H{x2 + WIDTH / 2 + 8:g} Q{x2 + WIDTH / 2:g} {up:g} {x2 + WIDTH / 2:g} {up + 8:g} V{y2 - 3:g}"
        else:
            line = f"M{x1 + WIDTH:g} {y1 + HEIGHT / 2:g} L{x2 - 3:g} {y2 + HEIGHT / 2:g}"
        arrows.append(f'<path class="{kind}" d="{line}" marker-end="url(#tip)"><title>{a} to {b}</title></path>')

    box("input", ["image", f"{shape[0]} x {shape[1]}, stem {net.stem[-1]}"], plain=True)
    for name, (height, width, channels) in shapes.items():
        box(
            name,
            [
                name.replace("/", ", ").replace("stream", "stream ").replace("layer", "layer "),
                f"{channels} x {height} x {width}",
            ],
        )
    box("classes", [f"{net.num_classes} classes", "rates, classified"], plain=True)
    for source, target in sorted(reached):
        if source.startswith("stream") and "/" not in source:
            arrow(f"{source}/layer{depth}", target, "back")
        else:
            crossing = "/" in source and source.partition("/")[0] != target.partition("/")[0]
            arrow(source, target, "fuse" if crossing else "")
    for i in range(streams) if net.head == "fused" else [streams - 1]:
        arrow(f"stream{i + 1}/layer{depth}", "classes")
    width, height = LEFT + depth * COLUMN + WIDTH + 14, 44 + (streams - 1) * ROW + HEIGHT + 34
    key = height - 10
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img">',
            "<title>Two streams of spiking layers: the image enters the first, they are fused, and each feeds "
            "back</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            *arrows,
            *boxes,
            f'<path class="back" d="M{LEFT} {key} h34"/>'
            f'<text class="label" x="{LEFT + 104}" y="{key + 4}">feedback, next step</text>',
            f'<path class="fuse" d="M{LEFT + 216} {key} h34"/>'
            f'<text class="label" x="{LEFT + 276}" y="{key + 4}">fusion</text>',
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
