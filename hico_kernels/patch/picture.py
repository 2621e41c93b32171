"""A report as a picture: tokens in every layer, as SVG, for light and dark pages."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 280, 56, 64, 40
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .gone { fill: #0001; stroke: #8888 }
.visual { fill: #3b82c4 } .text { fill: #e0893a } .axis { stroke: #888 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .gone { fill: #fff1 } }
</style>"""


def draw(
    rows: Sequence[int],
    visual: Sequence[int],
    length: int,
    title: str,
    milliseconds: Mapping[str, float],
) -> str:
    """rows and visual tokens of each layer, of `length` in the prompt, and what took how long, as
    the text of an SVG.
    """
    high, wide = HEIGHT - TOP - BOTTOM, (WIDTH - LEFT - 16) / len(rows)
    base = HEIGHT - BOTTOM

    def bar(kind: str, layer: int, bottom: float, tokens: int) -> str:
        tall = high * tokens / max(length, 1)
        x, y = LEFT + layer * wide + 0.1 * wide, base - bottom - tall
        size = f'width="{0.8 * wide:.1f}" height="{tall:.1f}"'
        return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>'

    bars = []
    for layer, (every, seen) in enumerate(zip(rows, visual, strict=True)):
        text = every - seen
        bars.append(bar("gone", layer, 0, length))
        bars.append(bar("text", layer, 0, text))
        bars.append(bar("visual", layer, high * text / max(length, 1), seen))
        if layer % max(1, len(rows) // 14) == 0:
            x = LEFT + (layer + 0.5) * wide
            bars.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{layer}</text>')
    times = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in milliseconds.items())
    key = "".join(
        f'<rect class="{kind}" x="{x}" y="{HEIGHT - 14}" width="10" height="10"/>'
        f'<text x="{x + 15}" y="{HEIGHT - 5}">{name}</text>'
        for kind, x, name in (
            ("visual", LEFT, "visual tokens"),
            ("text", LEFT + 130, "text"),
            ("gone", LEFT + 200, "left out, by layer"),
        )
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{STYLE}'
        f'<text x="{LEFT}" y="22">{escape(title)}</text>'
        f'<text class="times" x="{LEFT}" y="42">{escape(times)}</text>'
        f'<text x="{LEFT - 8}" y="{TOP + 5}" text-anchor="end">{length:,}</text>'
        f'<text x="{LEFT - 8}" y="{base}" text-anchor="end">0</text>'
        f'{"".join(bars)}<path class="axis" d="M{LEFT} {base}H{WIDTH - 16}"/>{key}</svg>\n'
    )
