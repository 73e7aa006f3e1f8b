"""The page that shows defences side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from attacks.audit.comparison import label_of
from attacks.audit.summary import STRONGEST
from attacks.report import findings, pictures
from attacks.report.page import environment


def render(
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str,
  reference: str | None,
  budgets: str,
  command: str,
) -> str:
  """The page as one self-contained HTML text.

  Args:
    rows: Of `comparison.compare`.
    title: Of the page.
    reference: As `compare` was told.
    budgets: A sentence on the budgets of the audits.
    command: That made the page.
  """
  shown = [row for row in rows if row['attack'] == STRONGEST]
  tables: dict[str, list[Mapping[str, Any]]] = {}
  for row in shown:
    tables.setdefault(row['dataset'], []).append(row)
  return (
    environment()
    .get_template('comparison.html.j2')
    .render(
      tables=tables,
      title=title,
      reference=reference,
      budgets=budgets,
      command=command,
      plot=_plot(tables),
      verdict_words=findings.VERDICT_WORDS,
    )
  )


def _plot(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str] | None:
  """Of all rows that have both changes."""
  groups = {
    dataset: [point for row in rows if (point := _point(row))] for dataset, rows in tables.items()
  }
  groups = {dataset: points for dataset, points in groups.items() if points}
  if not groups:
    return None
  labels = 'change of F1', 'change of region PSNR (dB): lower protects more'
  return pictures.light_and_dark(pictures.scatter_uri, groups, *labels)


def _point(row: Mapping[str, Any]) -> pictures.Point | None:
  if '' in (row['region_psnr_change'], row['f1'], row['f1_undefended']):
    return None
  change = row['region_psnr_change']
  low = change if row['change_ci95_low'] == '' else row['change_ci95_low']
  high = change if row['change_ci95_high'] == '' else row['change_ci95_high']
  label = label_of(row['defense'], row['strength'])
  return pictures.Point(label, row['f1'] - row['f1_undefended'], change, low, high)
