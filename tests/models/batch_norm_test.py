import tensorflow as tf

from tff_shadow.models import build_model, freeze_batch_norm, sent_statistics


def test_clients_send_the_statistics_of_layers_that_train():
  x = inputs = tf.keras.Input((4,))
  x = tf.keras.layers.Normalization(name='given')(x)  # Mean, variance and a count.
  x = tf.keras.layers.Dense(3, name='backbone')(x)
  x = tf.keras.layers.BatchNormalization(name='frozen')(x)
  x = tf.keras.layers.BatchNormalization(name='trains')(x)
  x = tf.keras.layers.BatchNormalization(name='plain', scale=False, center=False)(x)
  model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(x))
  model.get_layer('backbone').trainable = model.get_layer('frozen').trainable = False
  variables = model.non_trainable_variables
  sent = sent_statistics(variables)
  assert [v.name for v, is_sent in zip(variables, sent, strict=True) if is_sent] == [
    'trains/moving_mean:0',
    'trains/moving_variance:0',
    'plain/moving_mean:0',
    'plain/moving_variance:0',
  ]
  built = build_model('resnet18', image_shape=(32, 32, 3), num_classes=2, norm='batch', seed=0)
  assert all(sent_statistics(built.non_trainable_variables))
  freeze_batch_norm(built)
  assert not any(sent_statistics(built.non_trainable_variables))
