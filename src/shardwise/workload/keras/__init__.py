"""Keras 3 models (torch backend) as workloads.

file            content
module.py       the model as a torch module whose parameters can be split
optimizers.py   the optimizers of Keras as torch optimizers, by their formulas
compiled.py     what `model.compile` was given, as fields of a workload
saved.py        weights in .weights.h5, .h5 and .keras files
"""
