"""From result files to what a person reads: tables, figures and one self-contained HTML page.

Every number here comes from a result of :mod:`kdjax.results`; nothing is typed by hand.

* :func:`finding`: what was found, in one sentence.
* :func:`markdown_table`, :func:`markdown_flatness`: arms by metrics, and by measures of flatness, for a README.
* :func:`fill_tables`: every marked table of a document, written anew.
* :func:`panels`, :func:`svg`, :func:`save_figure`: every seed as a dot, curves, sweeps and searches, ratios to peers,
  robustness, calibration, confusion, compression, curvature, loss surfaces,
  attributions; each where the result holds its field.
* :func:`load`, :func:`page`: result files into one page, readable on a phone, light and dark, without a network.
"""

from kdjax.report.documents import fill_tables as fill_tables
from kdjax.report.figures import panels as panels
from kdjax.report.figures import save_figure as save_figure
from kdjax.report.load import load as load
from kdjax.report.network_figures import compression_panel as compression_panel
from kdjax.report.network_figures import confusion_panel as confusion_panel
from kdjax.report.network_figures import density_panel as density_panel
from kdjax.report.network_figures import overlay_panel as overlay_panel
from kdjax.report.network_figures import reliability_panel as reliability_panel
from kdjax.report.network_figures import robustness_panel as robustness_panel
from kdjax.report.network_figures import surface_panel as surface_panel
from kdjax.report.pages import page as page
from kdjax.report.run_figures import curve_panel as curve_panel
from kdjax.report.run_figures import dot_panel as dot_panel
from kdjax.report.run_figures import ratio_panel as ratio_panel
from kdjax.report.run_figures import swept_panel as swept_panel
from kdjax.report.run_figures import trial_panel as trial_panel
from kdjax.report.style import Folded as Folded
from kdjax.report.style import Panel as Panel
from kdjax.report.style import svg as svg
from kdjax.report.tables import markdown_flatness as markdown_flatness
from kdjax.report.tables import markdown_table as markdown_table
from kdjax.report.text import METRICS as METRICS
from kdjax.report.text import Metric as Metric
from kdjax.report.text import comparison_sentence as comparison_sentence
from kdjax.report.text import finding as finding
from kdjax.report.text import metric_of as metric_of
