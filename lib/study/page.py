"""The study's report: the analysis notebook executed on its folder, and the same as one HTML page."""

from pathlib import Path

import nbformat

from lib.files import PROJECT_ROOT, UserError, shorten_path
from lib.report.load import load
from lib.study.execution import execute

ANALYSIS_NOTEBOOK = PROJECT_ROOT / "notebooks/analysis.ipynb"
# Pages stand alone (no script or font from elsewhere) and are as wide as a text should be.
PAGE_STYLE = """<style>
body { max-width: 860px; margin: 0 auto !important }
.jp-RenderedMarkdown table { font-size: 12.5px }
.jp-RenderedMarkdown table td { white-space: nowrap }
</style>"""


def make_report(folder: Path) -> Path:
    """Execute the analysis to report.ipynb and report.html in `folder`; the page's path."""
    load(folder)  # a folder that can't be reported on is refused here, in a sentence
    notebook, page = folder / "report.ipynb", folder / "report.html"
    reason = execute(ANALYSIS_NOTEBOOK, notebook, {"runs_dir": shorten_path(folder)}, folder)
    if reason:
        raise UserError(f"the report could not be made: {reason} (see {shorten_path(folder)}/report.failed.ipynb)")
    to_html(nbformat.read(notebook, as_version=4), page, "Supervised fine-tuning on MATH: report")
    return page


def to_html(notebook: nbformat.NotebookNode, output: Path, title: str) -> None:
    """A notebook's texts and outputs as one HTML file that needs nothing else; its code stays in the notebook."""
    from nbconvert import HTMLExporter

    hidden = {"exclude_input": True, "exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(**hidden, embed_images=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    temporary = output.with_name(f".{output.name}.partial")
    temporary.write_text(page.replace("</head>", f"{PAGE_STYLE}\n</head>", 1), encoding="utf-8")
    temporary.replace(output)
