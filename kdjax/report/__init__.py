"""Tables, figures and a self-contained HTML page, made from the result files of :mod:`kdjax.results`.

* :func:`finding`: the main finding in one sentence.
* :func:`markdown_table`: arms by metrics, for a terminal or a document.
* :func:`compare`, :func:`is_reference`: how two arms are tested, and which are not.
* :func:`fill_tables`, :func:`count_places`: a Markdown document with its marked tables and figures written anew.
* :func:`panels`, :func:`save_figure`: the figures of a result, and the main one as an image.
* :func:`page`: one HTML file of one result or several, readable on a phone, light or dark, without a network.
"""

from kdjax.report.comparisons import compare as compare
from kdjax.report.comparisons import is_reference as is_reference
from kdjax.report.documents import count_places as count_places
from kdjax.report.documents import fill_tables as fill_tables
from kdjax.report.figures import panels as panels
from kdjax.report.figures import save_figure as save_figure
from kdjax.report.pages import page as page
from kdjax.report.tables import markdown_flatness as markdown_flatness
from kdjax.report.tables import markdown_table as markdown_table
from kdjax.report.text import finding as finding
