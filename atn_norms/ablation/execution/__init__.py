"""Run trials: in this process, in local processes, or on a cluster."""
