"""The plot of results/frontier.csv: what the attack sees against what the model still learns."""

import itertools
import pathlib
from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from attacks.scoring.statistics import mean_interval

_COLORS = {
  ('isotropic', 'ratio'): '#c44e52',
  ('diagonal', 'ratio'): '#dd8452',
  ('correlated', 'ratio'): '#4c72b0',
  ('isotropic', 'image_ratio'): '#8c564b',
  ('diagonal', 'image_ratio'): '#bcbd22',
  ('correlated', 'scale'): '#55a868',
  ('correlated', 'images'): '#8172b3',
  ('decoy', 'scale'): '#17becf',
}
# Of what is no noise of a shape.
_BASELINE_MARKERS = 'sD^vPX'
# Of the models that tell what noise costs.
_NORM = 'batch'
_LINEAR_F1 = 0.02
_TICKS = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1)
_LINES = {'frozen': '-', 'fresh': '--'}


def write(path: pathlib.Path, rows: Sequence[dict]) -> None:
  """Draws the change of region PSNR over that of F1, a panel a data set, a line a shape of noise.

  Both are against the undefended run of the same seed: means over seeds with 95 % intervals (t).
  Noise is drawn for models with BatchNorm, baselines for all models. The strength is written
  beside each point. Most points lie close to no change of F1, so that its axis is linear there and
  logarithmic beyond. What was never attacked has no point.
  """
  datasets = sorted({row['dataset'] for row in rows})
  figure = matplotlib.figure.Figure(figsize=(5.2 * len(datasets), 5.6), layout='constrained')
  axes = figure.subplots(1, len(datasets), squeeze=False)
  shapes = {shape for shape, _ in _COLORS} | {'none'}
  others = dict.fromkeys(
    (row['shape'], row['strength'], row['norm']) for row in rows if row['shape'] not in shapes
  )
  for axis, dataset in zip(axes[0], datasets, strict=True):
    own = [row for row in rows if row['dataset'] == dataset]
    heights = [*_lines(axis, own), *_baselines(axis, own, list(others))]
    _frame(axis, min([0.0, *heights]))
    axis.set_title(dataset)
  axes[0][0].set_ylabel('change of region PSNR (dB): lower protects more')
  # A panel may lack a line that another has.
  handles = {}
  for axis in axes[0]:
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(handles.values(), handles, fontsize=8, loc='outside lower center', ncols=5)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def _lines(axis, rows) -> list[float]:
  """Of noise, a line a shape over its strengths; returns how high its points are."""
  axis.plot(0, 0, 'k*', markersize=11, label='no defence')
  heights: list[float] = []
  for (shape, kind), color in _COLORS.items():
    for freshness, line in _LINES.items():
      wanted = (shape, freshness, _NORM)
      own = [row for row in rows if (row['shape'], row['freshness'], row['norm']) == wanted]
      strengths = {row['strength'] for row in own if row['region_psnr']}
      strengths = sorted((s for s in strengths if split_strength(s)[0] == kind), key=split_strength)
      if not strengths:
        continue
      points = [_point([row for row in own if row['strength'] == s]) for s in strengths]
      x, y, y_error, x_error = (np.array(column) for column in zip(*points, strict=True))
      # Intervals over few seeds are wide: pale, so that the points can be seen.
      axis.errorbar(x, y, y_error, x_error, linestyle='none', ecolor=color, alpha=0.3, elinewidth=1)
      axis.plot(
        x,
        y,
        linestyle=line,
        color=color,
        marker='o',
        markersize=4,
        linewidth=1,
        label=f'{shape} ({kind}), {freshness}',
      )
      heights += list(y)
      for strength, at_x, at_y in zip(strengths, x, y, strict=True):
        _, value = split_strength(strength)
        text = ', '.join([f'{value:g}', *strength.replace(':', ' ').split('+')[1:]])
        axis.annotate(text, (at_x, at_y), fontsize=6, xytext=(3, 3), textcoords='offset points')
  return heights


def _baselines(axis, rows, baselines) -> list[float]:
  """A point each; returns how high they are."""
  heights = []
  for key, marker in zip(baselines, itertools.cycle(_BASELINE_MARKERS)):
    own = [row for row in rows if (row['shape'], row['strength'], row['norm']) == key]
    if any(row['region_psnr'] for row in own):
      x, y, y_error, x_error = _point(own)
      axis.errorbar(x, y, y_error, x_error, ecolor='grey', alpha=0.3, elinewidth=1)
      name, strength, norm = key
      label = f'{name} {strength.replace(":", " ").replace("+", ", ")}'
      if norm != _NORM:
        label += f', {norm} norm'
      axis.plot(x, y, linestyle='none', color='#555555', marker=marker, markersize=6, label=label)
      heights.append(y)
  return heights


def _frame(axis, lowest: float) -> None:
  axis.set_xscale('symlog', linthresh=_LINEAR_F1)
  axis.set_xticks(_TICKS, [f'{tick:g}' for tick in _TICKS], fontsize=7)
  axis.set_xlim(-0.9, 0.2)
  axis.set_ylim(lowest - 3, 3)
  axis.set_xlabel('change of test F1')
  axis.grid(alpha=0.3)


def split_strength(text: str) -> tuple[str, float]:
  """Kind and value of '0.3', a ratio, or of 'scale:0.1'; raises `ValueError` without a number.

  What follows a plus sign, as in 'scale:3+floor:0.999', is left out.
  """
  kind, _, value = text.partition('+')[0].rpartition(':')
  return kind or 'ratio', float(value)


def _point(rows) -> tuple[float, float, float, float]:
  """Mean changes and the half widths of their intervals: (F1, region PSNR, y error, x error)."""
  x, y = (
    mean_interval(
      [float(row[name]) - float(row[f'{name}_undefended']) for row in rows if row[name]]
    )
    for name in ('f1', 'region_psnr')
  )
  widths = (0.0 if own.high is None else own.high - own.mean for own in (y, x))
  return x.mean, y.mean, *widths
