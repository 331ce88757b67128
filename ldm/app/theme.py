"""How the page looks: gradio's plain theme with the system's fonts, and the layout of pictures."""

from typing import Any

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
.vv-said:not(:has(p)) { display: none; }
.vv-drop button { padding: 0.4rem !important; }
.vv-drop .wrap { line-height: 1.3; font-size: 0.9rem; padding: 0; min-height: 0; }
.vv-drop .icon-wrap { width: 22px; margin-bottom: 0; }
.vv-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.2rem 1rem; }
.vv-head h1 { font-size: 1.25rem; font-weight: 600; margin: 0; }
.vv-head p, .vv-note, .vv-row h3 span, .vv-bar { color: var(--body-text-color-subdued); }
.vv-head p, .vv-note, .vv-error { margin: 0.2rem 0; }
.vv-error { color: var(--body-text-color); border-left: 3px solid #d33; padding: 0.3rem 0.7rem; }
.vv-row { margin: 0 0 1.1rem; }
.vv-row h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.4rem; }
.vv-row h3 span { font-weight: 400; margin-left: 0.7rem; }
.vv-row > div { display: grid; gap: 0.7rem; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.vv-row.vv-four > div { grid-template-columns: repeat(4, 1fr); }
.vv-row.vv-strip > div { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 0.5rem; }
@media (max-width: 900px) { .vv-row.vv-four > div { grid-template-columns: repeat(2, 1fr); } }
.vv-cell { margin: 0; min-width: 0; }
.vv-cell img { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; background: #8883; }
.vv-small img { image-rendering: pixelated; }
.vv-cell figcaption { font-size: 0.8rem; line-height: 1.35; margin-top: 0.25rem; overflow-wrap: anywhere; }
.vv-cell figcaption b { font-weight: 500; display: block; }
.vv-cell figcaption span { color: var(--body-text-color-subdued); }
.vv-bar { display: flex; align-items: center; gap: 0.8rem; margin: 0.2rem 0 0.9rem; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
.vv-bar > div { flex: 1; height: 0.4rem; border-radius: 0.2rem; background: #8883; overflow: hidden; }
.vv-bar i { display: block; height: 100%; background: var(--color-accent); }
footer { display: none !important; }
"""


def theme() -> Any:
    """The theme; no font comes from elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.gray,
        radius_size=gr.themes.sizes.radius_sm,
        font=FONTS,
        font_mono=MONO,
    )
