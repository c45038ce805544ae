"""The study that runs when no file is given; `init` writes the same text."""

BUILTIN = """\
# Does normalizing over a window of time steps help? Four normalizers, three windows, two tasks, two seeds.
name: built-in

# Any option of a layer but input_size, which comes from the task.
model:
  cell: lstm
  hidden_size: 32
  init: paper

# What to train on. charlm reads Python's own language reference unless `text` names a UTF-8 file.
tasks:
  - {kind: adding, length: 50, validation: 500, test: 2000}
  - {kind: charlm, embedding: 32, segment: 50}

train:
  steps: 200
  batch_size: 50
  optimizer: {kind: adam, lr: 1e-2}
  clip: 3.0
  eval_every: 25

# Every combination is tried. An axis is any option by its path: norm means model.norm, train.optimizer.lr is one too.
axes:
  norm: [none, layer, batch, rms]
  window: [1, 5, 25]

# A count or a list. Two show the way; five or more are needed before a difference means much.
seeds: 2

# What the others are compared with, seed by seed.
baseline: {norm: none}
"""
