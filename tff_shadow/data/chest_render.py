"""A procedural frontal chest film: geometry and attenuation in, grey levels out.

Positions are in units in which the film spans [-1, 1] in x (to the viewer's right) and y (down).
All shapes have soft edges, so a film looks alike at every size.
"""

import dataclasses

import numpy as np
import scipy.ndimage

# Widest edge of anatomy, in film units: about half a pixel at 32 px.
_EDGE = 0.02


@dataclasses.dataclass(frozen=True)
class Film:
  """A rendered film.

  Attributes:
    image: float [H, W] in [0, 1], bright = dense.
    lesion: float64 [H, W] in [0, 1], the area of each pixel inside the lesion's outline, whether
      or not the lesion was drawn.
  """

  image: np.ndarray
  lesion: np.ndarray


def _step(x, edge=_EDGE):
  """Returns a soft step: 0 below, 1 above zero, float [H, W]."""
  return 0.5 + 0.5 * np.tanh(x / edge)


def _ridge(distance, width):
  return np.exp(-((distance / width) ** 2))


def _downsample(field, factor):
  height, width = field.shape
  return field.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))


def _texture(shape, sigma, rng):
  field = scipy.ndimage.gaussian_filter(
    rng.standard_normal(shape, np.float32), sigma, mode='reflect'
  )
  return field / (field.std() + 1e-12)


class _Anatomy:
  """One body: its random proportions, and its fields on a grid."""

  def __init__(self, size: int, rng: np.random.Generator):
    # Single precision: a film has 8 bits, and half the bytes are half the time.
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    angle = np.deg2rad(rng.normal(0, 2))
    scale_x, scale_y = rng.normal(1.0, 0.04, 2)
    shift_x, shift_y = rng.normal(0, 0.035, 2)
    x, y = x - shift_x, y - shift_y
    self.x = (x * np.cos(angle) + y * np.sin(angle)) / scale_x
    self.y = (y * np.cos(angle) - x * np.sin(angle)) / scale_y
    self.side = np.abs(self.x)
    self.size = size
    self.rng = rng

  def body(self):
    """Returns soft tissue: neck, sloping shoulders, trunk."""
    rng = self.rng
    neck, trunk = rng.normal(0.24, 0.02), rng.normal(0.95, 0.04)
    slope = _step(self.y + rng.normal(0.83, 0.03), 0.12)
    return _step(neck + (trunk - neck) * slope - self.side, 0.03)

  def lungs(self):
    """Returns both lungs, bounded by the ribs, the mediastinum and a domed diaphragm."""
    rng = self.rng
    field = np.zeros_like(self.x)
    apex = rng.normal(-0.74, 0.03)
    base = rng.normal(0.56, 0.06)
    for sign in (-1, 1):
      x = sign * self.x
      # The liver lifts the diaphragm on the viewer's left.
      floor = base + rng.normal(0.02, 0.02) - (0.07 if sign < 0 else 0.0)
      height = np.clip((self.y - apex) / (floor - apex), 0, 1.4)
      wide = rng.normal(0.76, 0.025)
      lateral = 0.16 + (wide - 0.16) * np.sqrt(
        np.clip(1 - (1 - np.minimum(height, 1)) ** 2.6, 0, 1)
      )
      medial = rng.normal(0.13, 0.015) + 0.05 * height**2
      dome = floor + 0.13 * ((x - 0.36) / 0.32) ** 2 * (x > 0.36) + 0.05 * ((x - 0.36) / 0.25) ** 2
      inside = np.minimum(np.minimum(lateral - x, x - medial), dome - self.y)
      field = np.maximum(field, _step(np.minimum(inside, self.y - apex)))
    return field

  def heart(self):
    """Returns heart, great vessels and mediastinum, denser than lung, leaning to the right."""
    rng = self.rng
    cx, cy = rng.normal(0.13, 0.03), rng.normal(0.27, 0.04)
    rx, ry = rng.normal(0.36, 0.04), rng.normal(0.29, 0.03)
    tilt = np.deg2rad(rng.normal(28, 6))
    u = (self.x - cx) * np.cos(tilt) + (self.y - cy) * np.sin(tilt)
    v = (self.y - cy) * np.cos(tilt) - (self.x - cx) * np.sin(tilt)
    ventricles = _step(1 - np.hypot(u / rx, v / ry), 0.09)
    knob = _step(1 - np.hypot((self.x - 0.12) / 0.1, (self.y + rng.normal(0.3, 0.03)) / 0.13), 0.35)
    middle = _step(rng.normal(0.15, 0.015) + 0.03 * self.y - self.side, 0.04)
    return np.maximum(np.maximum(ventricles, 0.6 * knob), 0.75 * middle)

  def ribs(self):
    """Returns the ribs: posterior ones falling outwards, fainter anterior ones rising."""
    rng = self.rng
    field = np.zeros_like(self.x)
    gap, top = rng.normal(0.165, 0.008), rng.normal(-0.72, 0.02)
    cage = _step(0.86 - self.side, 0.04)
    for sign in (-1, 1):
      x = np.clip(sign * self.x, 0, None)
      tilt = rng.normal(0, 0.02)
      for i in range(9):
        # An arch: up from the spine, over, and down along the wall.
        curve = top + i * gap - 0.10 * np.sin(np.pi * np.clip(x / 0.8, 0, 1))
        curve = curve + (0.30 + 0.02 * i) * (x / 0.8) ** 2.2 + tilt * x
        distance = self.y - curve
        rib = 0.5 * _ridge(distance, 0.045) + 0.5 * (
          _ridge(distance - 0.036, 0.013) + _ridge(distance + 0.036, 0.013)
        )
        field = field + rib * cage * (x > 0.04)
        front = top + 0.3 + i * gap + 0.42 * np.clip(1 - x / 0.8, 0, 1) ** 1.5 - 0.16
        if i < 6:
          field = field + 0.35 * _ridge(self.y - front, 0.04) * cage * _step(x - 0.3, 0.05)
    return np.clip(field, 0, 1.3)

  def spine(self):
    """Returns the vertebral column with its discs."""
    rng = self.rng
    bend = rng.normal(0, 0.02) * np.sin(2 * self.y)
    wave = np.sin(2 * np.pi * (self.y / rng.normal(0.15, 0.006) + rng.random()))
    return _step(0.085 - np.abs(self.x - bend)) * (0.8 + 0.2 * wave)

  def clavicles(self):
    """Returns both collar bones as shallow S curves."""
    rng = self.rng
    field = np.zeros_like(self.x)
    for sign in (-1, 1):
      x = sign * self.x
      y0, rise = rng.normal(-0.60, 0.025), rng.normal(0.16, 0.03)
      t = np.clip((x - 0.09) / 0.7, 0, 1)
      curve = y0 - rise * t + 0.035 * np.sin(2 * np.pi * t)
      ends = _step(x - 0.09) * _step(0.8 - x)
      field = np.maximum(field, _step(0.036 - np.abs(self.y - curve), 0.012) * ends)
    return field

  def vessels(self):
    """Returns the hila and the lung's vascular tree, fading outwards."""
    rng = self.rng
    field = np.zeros_like(self.x)
    for sign in (-1, 1):
      hx, hy = sign * rng.normal(0.22, 0.02), rng.normal(-0.03, 0.04)
      dx, dy = sign * (self.x - hx), self.y - hy
      radius = np.hypot(dx, dy)
      field += 0.55 * np.exp(-((dx / 0.09) ** 2 + (dy / 0.17) ** 2))
      theta = np.arctan2(dy, dx)
      tree = np.zeros_like(field)
      for _ in range(9):
        direction = rng.uniform(-1.35, 1.35) + rng.normal(0, 0.5) * radius
        across = np.abs(np.sin(theta - direction)) * radius
        branch = _ridge(across, 0.012 + 0.014 * np.exp(-4 * radius)) * np.exp(-2.3 * radius)
        # Branches share the hilum, where they must not add up to a bright point.
        tree = np.maximum(
          tree, branch * (np.cos(theta - direction) > 0) * _step(radius - 0.07, 0.06)
        )
      field += 0.8 * tree
    return field

  def abdomen(self):
    """Returns the tissue below the lungs, with a gastric bubble in half of the bodies."""
    rng = self.rng
    dense = _step(self.y - 0.5, 0.15)
    bx, by = rng.normal(0.42, 0.06), rng.normal(0.78, 0.04)
    bubble = _step(1 - np.hypot((self.x - bx) / 0.17, (self.y - by) / 0.09), 0.25)
    return dense - 0.8 * bubble * (rng.random() < 0.5)


def _lesion(anatomy, field_of_lung, rng):
  """Draws a lesion's place, outline and profile; none of it depends on the label."""
  # Away from the lung's rim: half a lesion behind heart or diaphragm could not be seen.
  depth = scipy.ndimage.gaussian_filter(field_of_lung, 0.045 * anatomy.size)
  weights = (depth > 0.75 * depth.max()).astype(np.float64).ravel()
  place = rng.choice(len(weights), p=weights / weights.sum())
  cx, cy = anatomy.x.ravel()[place], anatomy.y.ravel()[place]
  radius = np.exp(rng.uniform(np.log(0.15), np.log(0.32)))
  squeeze, turn = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
  dx, dy = anatomy.x - cx, anatomy.y - cy
  u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
  theta = np.arctan2(v, u)
  lobes = sum(
    rng.normal(0, 0.10 / order) * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    for order in (2, 3, 4, 5)
  )
  rho = np.hypot(u, v / squeeze) / (radius * np.clip(1 + lobes, 0.6, 1.4))
  softness = rng.uniform(0.4, 0.95)
  ramp = np.clip((1 - rho) / softness, 0, 1)
  return rho < 1, ramp * ramp * (3 - 2 * ramp)


def render(size: int, has_lesion: bool, rng: np.random.Generator) -> Film:
  """Renders one film.

  Up to 64 px it is drawn at twice the size and averaged down. The lesion's place, outline and
  size are drawn in the same way for both labels, and only then is it added or left out, so that
  neither its outline nor the anatomy tells the label.

  Args:
    size: side in pixels.
    has_lesion: adds the lesion to the attenuation.
    rng: the only source of chance.
  """
  factor = 2 if size <= 64 else 1
  anatomy = _Anatomy(size * factor, rng)
  body, lungs, heart = anatomy.body(), anatomy.lungs(), anatomy.heart()
  air = lungs * (1 - 0.93 * heart)
  outline, profile = _lesion(anatomy, air, rng)
  contrast = rng.uniform(0.3, 0.55)
  grain = size * factor
  marks = anatomy.vessels() + 0.16 * _texture(body.shape, grain * 0.02, rng)
  density = 0.60 * body
  density += 0.10 * heart * body + 0.08 * anatomy.abdomen() * body
  density -= rng.normal(0.42, 0.03) * air * body
  density += rng.normal(0.13, 0.025) * marks * air
  density += rng.normal(0.11, 0.015) * anatomy.ribs() * body * (1 - 0.7 * heart)
  density += 0.06 * anatomy.spine() * body + 0.16 * anatomy.clavicles() * body
  density += 0.025 * _texture(body.shape, grain * 0.08, rng) * body
  if has_lesion:
    density += contrast * profile * (0.25 + 0.75 * air) * body
  # Exposure and the film's response, then quantum (Poisson) and electronic (Gaussian) noise.
  image = _downsample(np.clip(density, 0, 1.2), factor) * rng.normal(1.0, 0.05)
  image = np.clip(image + rng.normal(0.02, 0.015), 0, 1) ** rng.uniform(0.85, 1.2)
  quanta = np.exp(rng.uniform(np.log(500), np.log(3000)))
  image = rng.poisson(image * quanta) / quanta
  image = image + rng.normal(0, 0.008, image.shape)
  return Film(np.clip(image, 0, 1), _downsample(outline.astype(np.float64), factor))
