"""Keras models train as Keras's own `fit` does, and alike under every strategy; what cannot be taken over is refused.

Keras reads its backend when it is imported, so this file sets it first.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import torch
from equality import assert_equal, reference, train
from pool import Pools

from shardwise.compat.keras import workload
from shardwise.errors import RequestError, WorkloadError
from shardwise.workload.workload import Workload

PRELOAD = ("keras",)
SAMPLES, FEATURES, CLASSES = 24, 8, 4


def data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(SAMPLES, FEATURES)).astype("float32"), np.arange(SAMPLES) % CLASSES


def perceptron(**options: Any) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(16, activation="relu", **options),
            keras.layers.Dense(CLASSES),
        ]
    )


def compiled(optimizer: Any = "adam", model: Any = None, **options: Any) -> Any:
    model = perceptron() if model is None else model
    loss = options.pop("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def whole_batches(model: Any, **fields: Any) -> Workload:
    """The workload of a model whose batch is the dataset, so that the order of the samples does not matter."""
    return workload(model, *data(), batch_size=SAMPLES, **fields)


def by_keras(model: Any, epochs: int = 4) -> list[np.ndarray[Any, Any]]:
    """Variables after Keras's own training."""
    model.fit(*data(), batch_size=SAMPLES, epochs=epochs, verbose=0, shuffle=False)
    return [np.array(variable.numpy()) for variable in model.trainable_variables]


def optimizers() -> dict[str, Callable[[], Any]]:
    kinds = keras.optimizers
    decay = kinds.schedules.ExponentialDecay(0.05, decay_steps=2, decay_rate=0.5)
    return {
        "sgd": lambda: kinds.SGD(0.1),
        "momentum": lambda: kinds.SGD(0.1, momentum=0.9),
        "nesterov": lambda: kinds.SGD(0.1, momentum=0.9, nesterov=True),
        "adam": lambda: kinds.Adam(0.01),
        "amsgrad": lambda: kinds.Adam(0.01, amsgrad=True, epsilon=1e-3),
        "adamw": lambda: kinds.AdamW(0.01, weight_decay=0.1),
        "rmsprop": lambda: kinds.RMSprop(0.01),
        "centred": lambda: kinds.RMSprop(0.01, centered=True, momentum=0.9),
        "adagrad": lambda: kinds.Adagrad(0.1),
        "schedule": lambda: kinds.SGD(decay, momentum=0.9),
        "clipped norm": lambda: kinds.SGD(0.1, global_clipnorm=0.1),
        "clipped values": lambda: kinds.SGD(0.1, clipvalue=0.01),
    }


@pytest.mark.parametrize("name", optimizers())
def test_trains_as_keras_does(workers: Pools, name: str) -> None:
    make = optimizers()[name]
    wanted = by_keras(compiled(make()))
    result = train(workers, lambda: whole_batches(compiled(make())), "single", steps=4)
    got = [result.state[key].numpy() for key in result.state]
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def excluding() -> Any:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def test_weight_decay_spares_what_keras_spares(workers: Pools) -> None:
    wanted = by_keras(compiled(excluding()))
    result = train(workers, lambda: whole_batches(compiled(excluding())), "single", steps=4)
    for one, other in zip(result.state.values(), wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=2e-6)


def test_penalties_are_trained(workers: Pools) -> None:
    def make() -> Any:
        return compiled(keras.optimizers.SGD(0.1), perceptron(kernel_regularizer="l2", activity_regularizer="l1"))

    wanted = by_keras(make())
    result = train(workers, lambda: whole_batches(make()), "single", steps=4)
    for one, other in zip(result.state.values(), wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=2e-6)


def plain() -> Workload:
    return workload(compiled(), *data(), batch_size=8)


def penalized() -> Workload:
    return workload(compiled(model=perceptron(kernel_regularizer="l2")), *data(), batch_size=8)


def dropping() -> Workload:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((FEATURES,)), keras.layers.Dense(16), keras.layers.Dropout(0.5), keras.layers.Dense(CLASSES)]
    return workload(compiled("sgd", keras.Sequential(layers)), *data(), batch_size=8)


def attending() -> Workload:
    """A functional model with two inputs, layer norm and attention."""
    keras.utils.set_random_seed(0)
    one, two = keras.Input((6, FEATURES)), keras.Input((6, FEATURES))
    x = keras.layers.LayerNormalization()(one + two)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    output = keras.layers.Dense(CLASSES)(keras.layers.GlobalAveragePooling1D()(x))
    generator = np.random.default_rng(0)
    inputs = [generator.normal(size=(SAMPLES, 6, FEATURES)).astype("float32") for _ in range(2)]
    return workload(compiled(model=keras.Model([one, two], output)), inputs, np.arange(SAMPLES) % CLASSES, batch_size=8)


def convolving() -> Workload:
    keras.utils.set_random_seed(0)
    layers = [
        *(keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.MaxPooling2D()),
        *(keras.layers.Flatten(), keras.layers.Dense(CLASSES)),
    ]
    images = np.random.default_rng(0).normal(size=(SAMPLES, 8, 8, 1)).astype("float32")
    return workload(compiled(model=keras.Sequential(layers)), images, np.arange(SAMPLES) % CLASSES, batch_size=8)


@pytest.mark.parametrize("factory", [plain, penalized, dropping, attending, convolving])
@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_trains_alike_under_every_strategy(workers: Pools, factory: Callable[[], Workload], strategy: str) -> None:
    assert_equal(train(workers, factory, strategy), reference(workers, factory, strategy), 2e-5)


def values(model: Any) -> list[np.ndarray[Any, Any]]:
    return [np.array(variable.numpy()) for variable in model.variables]


def legacy(path: Path, model: Any) -> None:
    """Write weights in the form in which tf.keras of TensorFlow 2 wrote .h5 files."""
    with h5py.File(path, "w") as file:
        layers = [layer for layer in model.layers if layer.variables]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{variable.name}:0".encode() for variable in layer.variables]
            group.attrs["weight_names"] = names
            for name, variable in zip(names, layer.variables, strict=True):
                group.create_dataset(name.decode(), data=variable.numpy())
        file.create_group("top_level_model_weights").attrs["weight_names"] = []


@pytest.mark.parametrize("name", ["a.weights.h5", "a.keras", "a.h5"])
def test_saved_weights_are_read(tmp_path: Path, name: str) -> None:
    saved, path = compiled(), tmp_path / name
    for variable in saved.variables:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    if name == "a.h5":
        legacy(path, saved)
    elif name == "a.keras":
        saved.save(path)
    else:
        saved.save_weights(path)
    other = perceptron()
    made = whole_batches(compiled(model=other), weights=path).model()
    for got, wanted in zip(made.state_dict().values(), values(saved), strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)


def test_the_configuration_of_a_file_is_not_read(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "a.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["config.json"] = b'{"module": "os", "class_name": "system", "config": "touch ran"}'
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    made = whole_batches(compiled(), weights=path).model()
    for got, wanted in zip(made.state_dict().values(), values(model), strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("saved_model.pb", b"", "must be saved again"),
        ("a.weights.h5", b"no HDF5", "does not fit the model, or cannot be read"),
        ("a.keras", b"no zip", "does not fit the model, or cannot be read"),
        ("none.h5", None, "there is no such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=said):
        whole_batches(compiled(), weights=tmp_path / name)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    other = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(5)])
    other.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(WorkloadError, match="does not fit the model"):
        whole_batches(compiled(), weights=tmp_path / "a.weights.h5")


def refused() -> dict[str, tuple[Callable[[], Any], str]]:
    kinds, layers = keras.optimizers, keras.layers
    cross = keras.losses.SparseCategoricalCrossentropy
    noisy = [keras.Input((FEATURES,)), layers.GaussianNoise(0.1), layers.Dense(CLASSES)]
    given = keras.Input((FEATURES,))
    two = keras.Model(given, [layers.Dense(CLASSES)(given), layers.Dense(CLASSES)(given)])
    return {
        "not compiled": (perceptron, "is not compiled"),
        "optimizer": (lambda: compiled("ftrl"), "Ftrl of Keras is not known"),
        "clipnorm": (lambda: compiled(kinds.SGD(0.1, clipnorm=1.0)), "use global_clipnorm"),
        "average": (lambda: compiled(kinds.SGD(0.1, use_ema=True)), "use the workload's average"),
        "accumulation": (lambda: compiled(kinds.SGD(0.1, gradient_accumulation_steps=2)), "microbatches"),
        "sum": (lambda: compiled(loss=cross(from_logits=True, reduction="sum")), "must be the mean"),
        "no loss": (lambda: compiled(loss=None), "one loss is needed"),
        "noise": (lambda: compiled(model=keras.Sequential(noisy)), "draws random numbers"),
        "two outputs": (lambda: compiled(model=two), "several outputs"),
        "no model": (lambda: torch.nn.Linear(1, 1), "needs a Keras model"),
    }


@pytest.mark.parametrize("name", refused())
def test_refuses_in_one_line(name: str) -> None:
    make, said = refused()[name]
    with pytest.raises(WorkloadError, match=said) as caught:
        whole_batches(make())
    assert "\n" not in str(caught.value)


def test_batch_norm_is_refused_where_a_batch_is_split(workers: Pools) -> None:
    with pytest.raises(RequestError, match="couples the samples"):
        workers(2, proved, normalizing, "dp=2")
    workers(1, proved, normalizing, "single")


def normalizing() -> Workload:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((FEATURES,)), keras.layers.BatchNormalization(), keras.layers.Dense(CLASSES)]
    return workload(compiled(model=keras.Sequential(layers)), *data(), batch_size=8)


def proved(factory: Callable[[], Workload], strategy: str) -> None:
    from shardwise.parallel.program import Program
    from shardwise.run.verification.first_step import prove_first_step
    from shardwise.strategy import Strategy

    prove_first_step(Program.build(factory(), Strategy.parse(strategy)))


def test_metrics(workers: Pools) -> None:
    x, y = data()
    made = workload(compiled(metrics=["accuracy"]), x, y, batch_size=8, validation_data=(x, y))
    (evaluation,) = made.evaluations
    assert evaluation.metric == "accuracy"
    module = made.model().eval()
    output = module(torch.from_numpy(x))
    right = (output.argmax(-1).numpy() == y).mean()
    assert float(evaluation.measure(output, (torch.from_numpy(x), torch.from_numpy(y)))) == pytest.approx(right)


def test_trained_values_go_back_into_the_model() -> None:
    model = compiled()
    module: Any = whole_batches(model).model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    module.write_back()
    assert all((value == 0.5).all() for value in values(model))


@pytest.mark.parametrize("loss", ["binary_crossentropy", "mse", "binary_focal_crossentropy"])
def test_labels_may_lack_the_last_dimension(loss: str) -> None:
    model = compiled(loss=loss, model=keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1, "sigmoid")]))
    x, y = data()[0], np.arange(SAMPLES) % 2
    made = workload(model, x, y, batch_size=SAMPLES)
    batch = made.dataset[:]
    value = made.loss(made.model()(batch[0]), batch)
    assert float(value) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


def test_inputs_by_name() -> None:
    first, second = keras.Input((3,), name="first"), keras.Input((FEATURES,), name="second")
    joined = keras.layers.Concatenate()([keras.layers.Dense(2)(first), second])
    model = compiled(model=keras.Model([second, first], keras.layers.Dense(CLASSES)(joined)))
    x, y = data()
    named = {"first": x[:, :3], "second": x}
    made = workload(model, named, y, batch_size=SAMPLES, validation_data=(named, y))
    batch = made.dataset[:]
    value = made.loss(made.model()(*made.inputs(batch)), batch)
    assert float(value) == pytest.approx(model.evaluate(named, y, verbose=0), rel=1e-5)
    with pytest.raises(
        WorkloadError, match=r"x is a dict of first, third, the inputs of Keras model .* are second, first"
    ):
        workload(model, {"first": x[:, :3], "third": x}, y)
