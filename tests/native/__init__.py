"""The native backend against the reference: values, states, gradients, accuracy, unsupported cases."""
