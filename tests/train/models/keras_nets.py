"""Keras programs of the contract suite, written as a user would write them."""

from typing import Any

import keras
from keras import layers


def plain(width: int = 6) -> Any:
    return keras.Sequential(
        [
            layers.Conv2D(width, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3, activation="softmax", name="classifier"),
        ]
    )


def noisy(width: int = 6) -> Any:
    frozen = layers.Conv2D(width, 3, trainable=False)
    return keras.Sequential([frozen, layers.BatchNormalization(), layers.Dropout(0.3), layers.Flatten(), layers.Dense(3)])


def compiled() -> Any:
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(3, kernel_regularizer="l2")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9), loss=loss)
    return model


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.dense = layers.Flatten(), layers.Dense(3, name="dense")

    def call(self, x: Any) -> Any:
        return self.dense(self.flat(x))

    def transform(self, x: Any, rng: Any) -> Any:
        return x if rng is None or rng.random() < 0.5 else x[:, :, ::-1]

    def loss(self, outputs: Any, y: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)

    def schedule(self, round_: int) -> float:
        return 1 / (1 + round_)


ready = plain(4)
