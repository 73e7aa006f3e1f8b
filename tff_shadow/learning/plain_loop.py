"""The same local training without TFF: what federated results and times are compared with."""

import numpy as np
import tensorflow as tf

from tff_shadow.data import Examples, FederatedData, client_dataset, local_training_order
from tff_shadow.models import classification_loss
from tff_shadow.observations import ClientTraining


class PlainLoop:
  """SGD on a Keras model in one tf.function that walks through a data set."""

  def __init__(self, model: tf.keras.Model, local: ClientTraining):
    """Prepares the loop; `model` is trained in place."""
    self.model = model
    self._velocity = [tf.Variable(tf.zeros_like(v)) for v in model.trainable_variables]
    self._local = local
    self._loss = classification_loss(model)

  @tf.function(reduce_retracing=True)
  def train(self, dataset: tf.data.Dataset) -> None:
    """Takes one step for every batch of OrderedDict(x, y)."""
    variables = self.model.trainable_variables
    for batch in dataset:
      with tf.GradientTape() as tape:
        loss = self._loss(batch['y'], self.model(batch['x'], training=True))
      gradients = tape.gradient(loss, variables)
      for variable, velocity, gradient in zip(variables, self._velocity, gradients, strict=True):
        velocity.assign(self._local.momentum * velocity + gradient)
        variable.assign_sub(self._local.learning_rate * velocity)

  def train_round(self, datasets: list[tf.data.Dataset], weights: list[float]) -> None:
    """One round of FedAvg: every client from the same start, then the weighted mean."""
    start = self.model.get_weights()
    mean = [np.zeros_like(array) for array in start]
    for dataset, weight in zip(datasets, weights, strict=True):
      self.model.set_weights(start)
      for velocity in self._velocity:
        velocity.assign(tf.zeros_like(velocity))
      self.train(dataset)
      for total, array in zip(mean, self.model.get_weights(), strict=True):
        total += weight / sum(weights) * array
    self.model.set_weights(mean)


def train_centrally(
  model: tf.keras.Model, data: FederatedData, local: ClientTraining, *, steps: int, seed: int
) -> None:
  """Trains `model` on the pooled images of all clients for `steps` steps of SGD."""
  pooled = Examples(
    *(
      np.concatenate([getattr(examples, field) for examples in data.clients.values()])
      for field in ('images', 'labels', 'regions')
    )
  )
  epochs = -(-steps * local.batch_size // len(pooled))
  order = local_training_order(
    len(pooled), local.batch_size, epochs, steps, np.random.default_rng(seed)
  )
  loop = PlainLoop(model, local)  # A tf.function holds its object weakly.
  loop.train(client_dataset(pooled, order, local.batch_size))
