"""From result files to what a person reads: tables, figures and one self-contained HTML page.

Every number here comes from a result of :mod:`kdjax.results`; nothing is typed by hand.

* :func:`finding`: what was found, in one sentence.
* :func:`markdown_table`: arms by metrics, for a README.
* :func:`fill_tables`: every marked table of a document, written anew.
* :func:`panels`, :func:`svg`, :func:`save_figure`: every seed as a dot, training curves, ratios to peers.
* :func:`load`, :func:`page`: result files into one page, readable on a phone, light and dark, without a network.
"""

from kdjax.report.documents import fill_tables as fill_tables
from kdjax.report.figures import Panel as Panel
from kdjax.report.figures import curve_panel as curve_panel
from kdjax.report.figures import dot_panel as dot_panel
from kdjax.report.figures import panels as panels
from kdjax.report.figures import ratio_panel as ratio_panel
from kdjax.report.figures import save_figure as save_figure
from kdjax.report.figures import svg as svg
from kdjax.report.pages import page as page
from kdjax.report.reading import load as load
from kdjax.report.tables import markdown_table as markdown_table
from kdjax.report.words import METRICS as METRICS
from kdjax.report.words import Metric as Metric
from kdjax.report.words import comparison_sentence as comparison_sentence
from kdjax.report.words import finding as finding
from kdjax.report.words import metric_of as metric_of
