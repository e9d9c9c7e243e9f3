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
from kdjax.report.drawing import Folded as Folded
from kdjax.report.drawing import Panel as Panel
from kdjax.report.drawing import svg as svg
from kdjax.report.figures import panels as panels
from kdjax.report.figures import save_figure as save_figure
from kdjax.report.networks import compression_panel as compression_panel
from kdjax.report.networks import confusion_panel as confusion_panel
from kdjax.report.networks import density_panel as density_panel
from kdjax.report.networks import overlay_panel as overlay_panel
from kdjax.report.networks import reliability_panel as reliability_panel
from kdjax.report.networks import robustness_panel as robustness_panel
from kdjax.report.networks import surface_panel as surface_panel
from kdjax.report.pages import page as page
from kdjax.report.reading import load as load
from kdjax.report.runs import curve_panel as curve_panel
from kdjax.report.runs import dot_panel as dot_panel
from kdjax.report.runs import ratio_panel as ratio_panel
from kdjax.report.runs import swept_panel as swept_panel
from kdjax.report.runs import trial_panel as trial_panel
from kdjax.report.tables import markdown_flatness as markdown_flatness
from kdjax.report.tables import markdown_table as markdown_table
from kdjax.report.words import METRICS as METRICS
from kdjax.report.words import Metric as Metric
from kdjax.report.words import comparison_sentence as comparison_sentence
from kdjax.report.words import finding as finding
from kdjax.report.words import metric_of as metric_of
