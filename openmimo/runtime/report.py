"""Reports as one HTML file: headings, paragraphs, tables and embedded matplotlib figures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmimo.core.files import write_text_atomic

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: 6px; }
figcaption { font-size: .9rem; opacity: .8; }
.sounds { display: flex; flex-wrap: wrap; gap: 0 1.5rem; } audio { height: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; border-bottom: 1px solid #8884; }
td { font-variant-numeric: tabular-nums; } th { text-align: left; }
pre { background: #8881; padding: .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #fc08; color: inherit; }
"""


class Report:
    """Collects parts in order and writes them as a self-contained page."""

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Add a section heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add preformatted text, such as commands or generated samples."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def continuation(self, prompt: str, text: str) -> None:
        """Add a prompt with the text that a model generated after it, which is marked."""
        self._parts.append(f"<pre>{html.escape(prompt)}<mark>{html.escape(text)}</mark></pre>")

    def table(self, header: list[str], rows: list[list[Any]]) -> None:
        """Add a table. Floats are shown with four significant digits."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in row) + "</tr>" for row in rows
        )
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def figure(self, figure: Any, caption: str) -> None:
        """Embed a matplotlib figure as PNG and close it. The caption is also its alternative text."""
        from matplotlib import pyplot

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        data, text = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def sounds(self, clips: Sequence[tuple[str, bytes]]) -> None:
        """Embed players of mp3 files, each with a caption."""
        players = "".join(
            f"<figure><audio controls preload=none src='data:audio/mpeg;base64,{base64.b64encode(data).decode()}'>"
            f"</audio><figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, data in clips
        )
        self._parts.append(f'<div class="sounds">{players}</div>')

    def write(self, path: Path) -> Path:
        """Write the page and return its path."""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>{''.join(self._parts)}</body></html>"
        )
        write_text_atomic(path, page)
        return path


def new_figure(*, width: float = 7.5, height: float = 3.6, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """Create a matplotlib figure and its axes (an array for several of them), rendered without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    for axis in axes.flat if rows * columns > 1 else [axes]:
        axis.grid(alpha=0.3)
    return figure, axes


def step_axis(axis: Any, label: str) -> None:
    """Set up a horizontal axis of steps: ticks at whole numbers."""
    axis.set_xlabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)


def length_axis(axis: Any, label: str, lengths: Sequence[int]) -> None:
    """Set up a horizontal logarithmic axis with a tick at each of these lengths, as a number."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel(label)


def _shown(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
