"""Pictures of the page, as data URIs and SVG paths: nothing that it must load from elsewhere."""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure, ticker
from PIL import Image
from skimage import measure

from attacks.report.reading import Training

# Error maps: a perceptually even colour map, over the same range on every map of every report.
ERROR_COLORMAP = 'magma'
ERROR_RANGE = 0.5
_CURVE_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
_MARKERS = 'osD^v'


class Point(NamedTuple):
  """A point of a plot: where it is, the interval of `y`, and what it is called."""

  label: str
  x: float
  y: float
  low: float
  high: float


def image_uri(image: np.ndarray) -> str:
  """PNG data URI of an image [H, W, C] in [0, 1], one pixel to one pixel."""
  pixels = np.clip(np.rint(np.asarray(image, np.float64) * 255), 0, 255).astype(np.uint8)
  return _png_uri(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def error_uri(reconstruction: np.ndarray, truth: np.ndarray) -> str:
  """PNG data URI of the absolute error, averaged over channels; colours end at `ERROR_RANGE`."""
  error = np.abs(np.asarray(reconstruction, np.float64) - truth).mean(axis=-1)
  return _png_uri(_colors(error / ERROR_RANGE))


def error_scale_uri() -> str:
  """PNG data URI of the error maps' colour bar, from 0 at the left to `ERROR_RANGE`."""
  return _png_uri(_colors(np.linspace(0, 1, 256)[None].repeat(8, axis=0)))


def region_path(region: np.ndarray) -> str:
  """SVG path, in pixels of the image, round the part of `region` [H, W, 1] above one half.

  Empty where the region is empty or the whole image: there is no outline to draw.
  """
  inside = np.asarray(region[..., 0], np.float64)
  if inside.min() > 0.5 or inside.max() <= 0.5:
    return ''
  # A margin of zeros closes contours that reach the border of the image.
  contours = measure.find_contours(np.pad(inside, 1), 0.5)
  height, width = inside.shape
  parts = []
  for contour in contours:
    # Contours run through pixel centres; the margin shifted them by one pixel.
    ys = np.clip(contour[:, 0] - 0.5, 0, height)
    xs = np.clip(contour[:, 1] - 0.5, 0, width)
    parts.append('M' + 'L'.join(f'{x:.2f} {y:.2f}' for x, y in zip(xs, ys, strict=True)) + 'Z')
  return ''.join(parts)


def light_and_dark(draw: Callable[..., str | None], *arguments: Any) -> dict[str, str | None]:
  """What `draw` makes of the arguments for a light and for a dark page."""
  return {name: draw(*arguments, dark=name == 'dark') for name in ('light', 'dark')}


def curve_groups(training: Training) -> list[tuple[str, dict[str, list[float | None]]]]:
  """Losses, and scores between 0 and 1, apart; at most six curves each, in file order."""
  losses, shares = {}, {}
  for name, values in training.curves.items():
    known = [value for value in values if value is not None]
    if 'loss' in name.lower():
      losses[name] = values
    elif min(known) >= 0 and max(known) <= 1:
      shares[name] = values
  groups = [('loss', losses), ('score, 0 to 1', shares)]
  limit = len(_CURVE_COLORS)
  return [(title, dict(list(curves.items())[:limit])) for title, curves in groups if curves]


def training_uri(training: Training, dark: bool) -> str | None:
  """PNG data URI of the training curves; None where metrics.csv has neither losses nor scores."""
  groups = curve_groups(training)
  if not groups:
    return None
  ink, grid = _inks(dark)
  plot = figure.Figure(figsize=(4.6 * len(groups), 3.0), dpi=160, layout='constrained')
  for axes, (title, curves) in zip(
    np.atleast_1d(plot.subplots(1, len(groups))), groups, strict=True
  ):
    for color, (name, values) in zip(_CURVE_COLORS, curves.items(), strict=False):
      points = [
        point for point in zip(training.rounds, values, strict=True) if point[1] is not None
      ]
      axes.plot(*zip(*points, strict=True), color=color, label=name, linewidth=1.8, marker='.')
    axes.set_facecolor('none')
    axes.set_xlabel('round', color=ink)
    axes.set_title(title, color=ink, fontsize=10, loc='left')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(color=grid, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=ink, fontsize=9)
  return _figure_uri(plot)


def strip_uri(groups: Mapping[str, Sequence[float | None]], label: str, dark: bool) -> str:
  """PNG data URI of a row of dots for each group, one dot a value, with the mean as a bar.

  Args:
    groups: From a row's name to its values; None is left out.
    label: Of the axis.
    dark: For a dark page.
  """
  ink, grid = _inks(dark)
  plot = figure.Figure(figsize=(7.5, 0.55 * len(groups) + 0.8), dpi=160, layout='constrained')
  axes = plot.subplots()
  for row, (color, values) in enumerate(zip(_CURVE_COLORS, groups.values(), strict=False)):
    known = np.array([value for value in values if value is not None])
    # Evenly spread, so that equal values stay apart.
    height = row + 0.5 * ((np.arange(len(known)) * 0.618) % 1 - 0.5)
    axes.plot(known, height, '.', color=color, alpha=0.75, markersize=7)
    if len(known):
      axes.plot([known.mean()] * 2, [row - 0.38, row + 0.38], color=ink, linewidth=2)
  axes.set_facecolor('none')
  axes.set_yticks(range(len(groups)), list(groups))
  axes.set_ylim(len(groups) - 0.5, -0.5)
  axes.set_xlabel(label, color=ink)
  axes.tick_params(colors=ink, labelsize=9, length=0)
  axes.grid(color=grid, linewidth=0.8, axis='x')
  axes.spines[:].set_visible(False)
  return _figure_uri(plot)


def scatter_uri(
  groups: Mapping[str, Sequence[Point]], x_label: str, y_label: str, dark: bool
) -> str:
  """PNG data URI of points with the intervals of their heights, a panel for each group.

  A label looks the same in all panels, and is told once below them.

  Args:
    groups: From a panel's title to its points.
    x_label: Of the axis from left to right.
    y_label: Of the other.
    dark: For a dark page.
  """
  ink, grid = _inks(dark)
  labels = dict.fromkeys(point.label for points in groups.values() for point in points)
  styles = dict(zip(labels, itertools.cycle(itertools.product(_MARKERS, _CURVE_COLORS))))
  width = max(6.4, 4.6 * len(groups))
  # In the legend's font a letter takes about 0.075 inches.
  columns = min(len(labels), max(1, int(width / (0.6 + 0.075 * max(map(len, labels))))))
  height = 3.8 + 0.2 * -(-len(labels) // columns)
  plot = figure.Figure(figsize=(width, height), dpi=160, layout='constrained')
  panels = np.atleast_1d(plot.subplots(1, len(groups)))
  shown = {}
  for axes, (title, points) in zip(panels, groups.items(), strict=True):
    for point in points:
      marker, color = styles[point.label]
      axes.plot([point.x] * 2, [point.low, point.high], color=color, linewidth=1.2)
      (shown[point.label],) = axes.plot(
        point.x, point.y, marker, color=color, markersize=6, label=point.label
      )
    axes.set_facecolor('none')
    axes.set_title(title, color=ink, fontsize=10, loc='left')
    axes.set_xlabel(x_label, color=ink)
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(color=grid, linewidth=0.8)
    axes.margins(0.1)
    axes.spines[:].set_visible(False)
  panels[0].set_ylabel(y_label, color=ink)
  plot.legend(
    handles=[shown[label] for label in labels],
    loc='outside lower center',
    ncols=columns,
    frameon=False,
    labelcolor=ink,
    fontsize=9,
  )
  return _figure_uri(plot)


def _inks(dark: bool) -> tuple[str, str]:
  """Colours of text and of grid lines."""
  return ('#d6dae0', '#3a414b') if dark else ('#2b323b', '#dfe3e8')


def _figure_uri(plot: figure.Figure) -> str:
  buffer = io.BytesIO()
  plot.savefig(buffer, format='png', transparent=True, metadata={'Software': None})
  return _uri(buffer.getvalue())


def _colors(values: np.ndarray) -> np.ndarray:
  return matplotlib.colormaps[ERROR_COLORMAP](np.clip(values, 0, 1), bytes=True)[..., :3]


def _png_uri(pixels: np.ndarray) -> str:
  buffer = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format='PNG', optimize=True)
  return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode('ascii')
