"""The native backend against the reference: values, states, gradients, digits, refusals."""
